"""The commands. What they do is ``mempool.rayhost``'s and ``mempool.client``'s; how it looks is ``show``'s.

Exit codes: 0 ok, 1 failed, 2 usage, 3 the pool, a shard or Ray cannot be reached.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

import mempool
from mempool.cli import bench, documents, show
from mempool.cli.outcome import UsageError, reported, undone_by_signals
from mempool.cli.target import Target, find_target
from mempool.client import Pool, connect
from mempool.config import ClusterConfig, load, set_shards
from mempool.errors import ConfigError, NotFound

_ANSWER_TIMEOUT_S = 5.0

app = typer.Typer(
    help="A pool of memory that trains behind an RPC: start it, look at it, scale it, end it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench.app, name="bench")

File = Annotated[Path, typer.Option("-f", "--file", metavar="FILE", help="The cluster file (YAML).")]
MaybeFile = Annotated[
    Path | None, typer.Option("-f", "--file", metavar="FILE", help="The cluster file: names the pool and its token.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="The pool's address, or several with commas; by default that of the file, then MEMPOOL_ADDRESS, then "
        "localhost:7077.",
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
def up(file: File) -> None:
    """Start a pool and its tables on Ray, and Ray too where there is none."""
    with reported():
        from mempool.rayhost import up as start

        config = load(file)
        with undone_by_signals():
            record = start(config, say=show.say)
        show.say(f"pool {record.name!r} is up: mempool.connect({record.address!r})")


@app.command()
def status(file: MaybeFile = None, address: Address = None, as_json: Json = False) -> None:
    """Show shards and tables."""
    with reported():
        target = find_target(file, address)
        with _connect(target) as pool:
            now = pool.status()
        if as_json:
            _print_json(documents.status(now, address=target.address))
        else:
            show.status(now, address=target.address)


@app.command()
def apply(
    file: File,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Bring the running pool to what the file says: rescale, create tables. Never drops data."""
    with reported():
        from mempool.rayhost import apply as carry_out
        from mempool.rayhost import planned

        target = find_target(file, address)
        config = _config(target)
        if dry_run:
            with _connect(target) as pool:
                changes = planned(config, pool.status())
            if not as_json:
                show.changes(changes)
        else:
            with show.rescale_progress(quiet=as_json) as (say, progress):
                changes = carry_out(config, address=target.address, token=target.token, say=say, progress=progress)
            if not as_json:
                show.outcome(changes)
        if as_json:
            _print_json(documents.changes(changes, applied=not dry_run))
        if dry_run and changes.refused:
            raise typer.Exit(1)


@app.command()
def scale(
    shards: Annotated[int, typer.Option("--shards", metavar="N", min=1, help="How many shards the pool shall have.")],
    file: MaybeFile = None,
    address: Address = None,
) -> None:
    """Change the number of shards while the pool serves; with a file, the file is edited too."""
    with reported():
        target = find_target(file, address)
        with _connect(target) as pool, show.rescale_progress() as (_, progress):
            if target.config is not None and pool.name != target.config.pool.name:
                raise ConfigError(
                    f"{file} is of pool {target.config.pool.name!r}, and at {target.address} is pool {pool.name!r}; "
                    "nothing was changed. Give that pool's file, or its --address alone"
                )
            pool.rescale(shards, progress=progress)
        if file is not None:
            set_shards(file, shards)
            show.say(f"{shards} shards; {file} says so too")
        else:
            show.say(f"{shards} shards. Set pool.shards to {shards} in the cluster file too: the next apply follows it")


@app.command()
def down(
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="NAME", help="Its name; by default the one pool started here.")
    ] = None,
) -> None:
    """End a pool and what it holds, and Ray too where `mempool up` started it."""
    with reported():
        from mempool.rayhost import down as end

        name = pool if pool is not None else _only_pool()
        end(name, say=show.say)
        show.say(f"pool {name!r} is down")


def _connect(target: Target) -> Pool:
    return connect(target.address, token=target.token, timeout_s=_ANSWER_TIMEOUT_S)


def _config(target: Target) -> ClusterConfig:
    assert target.config is not None, "the file was given"
    return target.config


def _only_pool() -> str:
    from mempool.rayhost import read_records

    names = [record.name for record in read_records()]
    if not names:
        raise NotFound("no pool was started on this machine by `mempool up`; name the one you mean with --pool NAME")
    if len(names) > 1:
        raise UsageError(f"several pools were started on this machine; name one with --pool: {', '.join(names)}")
    return names[0]


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2))
