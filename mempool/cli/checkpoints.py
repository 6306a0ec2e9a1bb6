"""Commands about checkpoints: take one, restore tables, and look at a place without any pool.

What they do is ``mempool.client``'s and ``mempool.checkpoint``'s. Those that only look load no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mempool.cli.outcome import FAILED, UsageError, reported

if TYPE_CHECKING:
    from mempool.checkpoint.stores import Store
    from mempool.types import CheckpointProgress

TIMEOUT_S = 15.0

Place = Annotated[str, typer.Argument(metavar="PLACE", help="A folder, or a URL as s3://bucket/run-7.")]
File = Annotated[
    Path | None, typer.Option("-f", "--file", metavar="FILE", help="The cluster file: names the pool and its token.")
]
PoolName = Annotated[
    str | None, typer.Option("--pool", metavar="NAME", help="The name of a pool that was started on this machine.")
]
Address = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="The pool's address, or several with commas.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, with stable keys, and nothing else.")]
Tables = Annotated[
    list[str] | None, typer.Option("--table", metavar="NAME", help="A table; may be repeated. Without it, all tables.")
]
Name = Annotated[str | None, typer.Option("--checkpoint", metavar="NAME", help="Which one; without it, the newest.")]


def add_to(app: typer.Typer) -> None:
    """Make these commands ``app``'s."""
    for command in (checkpoint, restore, checkpoints, inspect, verify):
        app.command()(command)


def checkpoint(
    place: Place,
    file: File = None,
    pool: PoolName = None,
    address: Address = None,
    table: Tables = None,
    keep: Annotated[
        int | None, typer.Option("--keep", metavar="N", min=1, help="Remove all but the N newest once it is whole.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Write all pages, also those that did not change.")] = False,
    extra: Annotated[
        str | None, typer.Option("--extra", metavar="JSON", help="A JSON object of your own, kept with it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the pool's tables as they are at one moment, while it trains and serves on."""
    with reported():
        from mempool.cli import show
        from mempool.cli.target import connected, find_target

        own = _own(extra)
        target = find_target(file, pool, address)
        with connected(target, timeout_s=TIMEOUT_S) as client, bar(as_json, "writing") as moved:

            def report(now: CheckpointProgress) -> None:
                moved(now.bytes_done, now.bytes_total, now.doing or "written")

            done = client.checkpoint(
                place, tables=table or None, keep=keep, incremental=not full, extra=own, progress=report
            )
        versions = {each.table: each.version for each in done.tables}
        if as_json:
            print_document(
                {
                    "place": done.url,
                    "name": done.name,
                    "tables": versions,
                    "bytes": done.bytes_total,
                    "held_s": done.held_s,
                }
            )
        else:
            listed = ", ".join(f"{name} at version {version}" for name, version in versions.items())
            show.say(f"checkpoint {done.name} is in {done.url}: {listed}; {done.bytes_total:,} bytes were written")


def restore(
    place: Place,
    file: File = None,
    pool: PoolName = None,
    address: Address = None,
    name: Name = None,
    table: Tables = None,
    called: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="What the table shall be called, where it is one alone.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of tables of these names, once all pages are there.")
    ] = False,
    layout: Annotated[
        str | None, typer.Option("--layout", metavar="LAYOUT", help="auto, columns, rows or grid; else as it was.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make tables of a checkpoint's, in a pool of any number of shards."""
    with reported():
        from mempool.cli import show
        from mempool.cli.target import connected, find_target

        target = find_target(file, pool, address)
        with connected(target, timeout_s=TIMEOUT_S) as client, bar(as_json, "reading") as moved:
            tables = client.restore(
                place,
                checkpoint=name,
                tables=table or None,
                name=called,
                replace=replace,
                layout=layout,
                progress=lambda now: moved(now.bytes_done, now.bytes_total, f"reading {now.table}"),
            )
            found = [{"name": each.name, "num_slots": each.num_slots, "value_dim": each.value_dim} for each in tables]
        if as_json:
            print_document({"place": place, "tables": found})
        else:
            show.say(f"restored from {place}: {', '.join(str(each['name']) for each in found)}")


def checkpoints(
    place: Place,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="NAME", help="Remove this one, and files that no other one needs.")
    ] = None,
    keep: Annotated[int | None, typer.Option("--keep", metavar="N", min=1, help="Remove all but the N newest.")] = None,
    as_json: Json = False,
) -> None:
    """List the checkpoints of a place; or remove some. Needs no pool."""
    with reported():
        from mempool.checkpoint import looking, removal
        from mempool.cli import show

        if remove is not None and keep is not None:
            raise UsageError("--remove and --keep both say what goes; give one of them")
        store = _store(place)
        gone = None
        if remove is not None:
            gone = removal.remove(store, remove)
        elif keep is not None:
            gone = removal.keep_newest(store, keep)
        found = looking.checkpoints(store)
        if as_json:
            removed = {} if gone is None else {"removed": list(gone.checkpoints), "removed_bytes": gone.num_bytes}
            print_document({"place": store.url, "checkpoints": found, **removed})
            return
        if gone is not None:
            show.say(
                f"removed {', '.join(gone.checkpoints) or 'nothing'}: {gone.files} files, {gone.num_bytes:,} bytes"
            )
        for each in found:
            show.say(_line(each))
        if not found:
            show.say(f"{store.url} has no checkpoint")


def inspect(place: Place, name: Name = None, as_json: Json = False) -> None:
    """Show what a checkpoint has. Needs no pool; exits with 1 where a file is missing."""
    with reported():
        from mempool.checkpoint import looking
        from mempool.cli import show

        found = looking.inspect(_store(place), name)
        if as_json:
            print_document(found)
        else:
            show.say(_line(found))
            for table in found["tables"]:
                schema = table["schema"]
                show.say(
                    f"  {table['name']}: {schema['num_slots']:,} x {schema['value_dim']} {schema['dtype']}, version "
                    f"{table['version']}, step {table['step_count']}, {table['bytes']:,} bytes"
                )
            if found["extra"]:
                show.say(f"  extra: {json.dumps(found['extra'])}")
            for problem in found["problems"]:
                show.say(f"  {problem}")
        if found["problems"]:
            raise typer.Exit(FAILED)


def verify(place: Place, name: Name = None, as_json: Json = False) -> None:
    """Read a checkpoint whole and check each byte. Needs no pool; exits with 1 where anything is damaged."""
    with reported():
        from mempool.checkpoint import looking
        from mempool.cli import show

        with bar(as_json, "reading") as moved:
            found = looking.verify(_store(place), name, progress=lambda done, total: moved(done, total, "reading"))
        if as_json:
            print_document(
                {
                    "name": found.name,
                    "files": found.files,
                    "bytes": found.num_bytes,
                    "damages": [
                        {"file": each.file, "offset": each.offset, "length": each.length, "what": each.what}
                        for each in found.damages
                    ],
                }
            )
        else:
            for each in found.damages:
                where = "" if each.offset is None else f", bytes {each.offset:,} on"
                show.say(f"{each.file}{where}: {each.what}")
            said = f"{len(found.damages)} damages" if found.damages else "whole"
            show.say(f"checkpoint {found.name}: {said}; {found.files} files, {found.num_bytes:,} bytes were read")
        if found.damages:
            raise typer.Exit(FAILED)


def _store(place: str) -> Store:
    from mempool.checkpoint.stores import open_store
    from mempool.checkpoint.stores.places import absolute

    return open_store(absolute(place))


def _own(extra: str | None) -> dict[str, Any] | None:
    if extra is None:
        return None
    try:
        found = json.loads(extra)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--extra is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError("--extra is no JSON object: write '{\"key\": ...}'")
    return found


def _line(found: dict[str, Any]) -> str:
    if "problem" in found:
        return f"{found['name']}: {found['problem']}"
    versions = ", ".join(f"{name} at version {version}" for name, version in found["versions"].items())
    return (
        f"{found['name']}  {found['created']}  pool {found['pool']}: {versions}; {found['live_bytes']:,} bytes, "
        f"{found['own_bytes']:,} of them its own"
    )


@contextmanager
def bar(quiet: bool, begun: str) -> Iterator[Callable[[int, int, str], None]]:
    """Where progress in bytes goes: to a bar on a terminal, and nowhere else."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _nothing
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(begun, total=None)

        def moved(done: int, total: int, doing: str) -> None:
            progress.update(task, description=doing, completed=done, total=total or None)

        yield moved


def _nothing(_done: int, _total: int, _doing: str) -> None:
    pass


def print_document(document: object) -> None:
    """What ``--json`` prints."""
    print(json.dumps(document, indent=2))
