"""The commands. What they do is ``mempool.rayhost``'s and ``mempool.client``'s; how it looks is ``show``'s.

Exit codes: 0 ok, 1 failed, 2 usage, 3 the pool, a shard or Ray cannot be reached.

A command imports what it needs when it runs: help is there at once, and who only looks at a pool loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import mempool
from mempool.cli import bench, checkpoints, exchange, plan, table
from mempool.cli.outcome import UsageError, reported, undone_by_signals

_CHANGE_TIMEOUT_S = 15.0

app = typer.Typer(
    help="A pool of memory that trains behind an RPC: start it, look at it, scale it, end it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench.app, name="bench")
checkpoints.add_to(app)
exchange.add_to(app)
plan.add_to(app)
table.add_to(app)

File = Annotated[Path, typer.Option("-f", "--file", metavar="FILE", help="The cluster file (YAML).")]
MaybeFile = Annotated[
    Path | None, typer.Option("-f", "--file", metavar="FILE", help="The cluster file: names the pool and its token.")
]
PoolName = Annotated[
    str | None, typer.Option("--pool", metavar="NAME", help="The name of a pool that was started on this machine.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="The pool's address, or several with commas. Where nothing names a pool: MEMPOOL_ADDRESS, then the only "
        "pool that was started on this machine, then localhost:7077.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, with stable keys, and nothing else.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(mempool.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    file: File,
    timeout_s: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=1,
            help="How long Ray, and then the pool, may take to start. Ray's 60 s begin anew while it makes progress.",
        ),
    ] = 300.0,
) -> None:
    """Start a pool and its tables on Ray, and Ray too where there is none."""
    with reported():
        from mempool.cli import show
        from mempool.config import load

        config = load(file)
        from mempool.rayhost import up as start

        with undone_by_signals():
            record = start(config, say=show.say, timeout_s=timeout_s)
        show.say(f"pool {record.name!r} is up: mempool.connect({record.address!r})")


@app.command()
def status(
    file: MaybeFile = None,
    pool: PoolName = None,
    address: Address = None,
    stages: Annotated[
        bool,
        typer.Option("--stages", help="Also show what each shard has spent its time on since it started."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show shards and tables."""
    with reported():
        from mempool.cli import documents
        from mempool.cli.target import find_target

        target = find_target(file, pool, address)
        now = target.status()
        if as_json:
            _print_json(documents.status(now, address=target.address))
        else:
            from mempool.cli import show

            show.status(now, address=target.address, stages=stages)


@app.command()
def apply(
    file: File,
    pool: PoolName = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Bring the running pool to what the file says: rescale, create tables. Never drops data."""
    with reported():
        from mempool.cli import documents, show
        from mempool.cli.target import find_target
        from mempool.cli.waiting import told_waits
        from mempool.rayhost import apply as carry_out
        from mempool.rayhost import planned

        target = find_target(file, pool, address)
        config = target.config
        assert config is not None, "the file was given"
        if dry_run:
            changes = planned(config, target.status())
            if not as_json:
                show.changes(changes)
        else:
            with (
                show.rescale_progress(quiet=as_json) as (say, progress),
                told_waits(target.status, say=say, progress=progress) as report,
            ):
                changes = carry_out(config, address=target.address, token=target.token, say=say, progress=report)
            if not as_json:
                show.outcome(changes)
        if as_json:
            _print_json(documents.changes(changes, applied=not dry_run))
        if dry_run and changes.refused:
            raise typer.Exit(1)


@app.command()
def scale(
    count: Annotated[
        int | None,
        typer.Argument(metavar="N", min=1, show_default=False, help="How many shards the pool shall have."),
    ] = None,
    shards: Annotated[int | None, typer.Option("--shards", metavar="N", min=1, help="The same, as an option.")] = None,
    file: MaybeFile = None,
    pool: PoolName = None,
    address: Address = None,
) -> None:
    """Change the number of shards while the pool serves; with a file, the file is edited too."""
    with reported():
        from mempool.cli import show
        from mempool.cli.target import connected, find_target
        from mempool.cli.waiting import told_waits
        from mempool.config import set_shards
        from mempool.errors import ConfigError

        wanted = {number for number in (count, shards) if number is not None}
        if len(wanted) != 1:
            raise UsageError("say how many shards the pool shall have, once: mempool scale 3, or --shards 3")
        (shards,) = wanted
        target = find_target(file, pool, address)
        with (
            connected(target, timeout_s=_CHANGE_TIMEOUT_S) as client,
            show.rescale_progress() as (say, progress),
            told_waits(target.status, say=say, progress=progress) as report,
        ):
            if target.config is not None and client.name != target.config.pool.name:
                raise ConfigError(
                    f"{file} is of pool {target.config.pool.name!r}, and at {target.address} is pool {client.name!r}; "
                    "nothing was changed. Give that pool's file, or its --address alone"
                )
            client.rescale(shards, progress=report)
        said = show.counted(shards, "shard")
        if file is not None:
            set_shards(file, shards)
            show.say(f"{said}; {file} says so too")
        else:
            show.say(f"{said}. Set pool.shards to {shards} in the cluster file too: the next apply follows it")


@app.command()
def rebalance(
    file: MaybeFile = None,
    pool: PoolName = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would move, and move nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Even the load of the shards while the pool serves, by how much their pages are read and written lately."""
    with reported():
        from mempool.cli import documents, show
        from mempool.cli.target import connected, find_target
        from mempool.cli.waiting import told_waits

        target = find_target(file, pool, address)
        with (
            connected(target, timeout_s=_CHANGE_TIMEOUT_S) as client,
            show.rescale_progress(quiet=as_json or dry_run) as (say, progress),
            told_waits(target.status, say=say, progress=progress) as report,
        ):
            last = client.rebalance(dry_run=dry_run, progress=report)
        if as_json:
            _print_json(documents.rebalanced(last, applied=not dry_run))
        else:
            show.loads(last, moved=not dry_run)


@app.command()
def down(
    file: MaybeFile = None,
    pool: PoolName = None,
    address: Address = None,
    drop: Annotated[
        bool, typer.Option("--drop", help="Remove what its shards have kept (shard.storage), too. Asks first.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """End a pool, and Ray too where `mempool up` started it. What it has in storage stays, unless it is dropped."""
    with reported():
        from mempool.cli import show
        from mempool.cli.target import find_target, named

        # A name is enough: a pool that no record knows may run on the Ray of this machine.
        if pool is not None and file is None and address is None:
            name, config = pool, None
        else:
            target = find_target(file, pool, address)
            name, config = named(target), target.config
        if drop and not yes:
            typer.confirm(f"Remove all tables of pool {name!r}, with what its shards have kept, for good?", abort=True)
        from mempool.rayhost import down as end

        end(name, say=show.say, drop=drop, config=config)
        show.say(f"pool {name!r} is down")


def _print_json(document: object) -> None:
    import json

    print(json.dumps(document, indent=2))
