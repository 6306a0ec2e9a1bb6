"""What commands print for people: tables and a progress bar on a terminal, plain lines anywhere else."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mempool.cli import documents
from mempool.config import Changes
from mempool.types import PoolStatus, RescaleProgress, ShardStatus
from mempool.types.pool import lost_remedy

Say = Callable[[str], None]
Watch = Callable[[RescaleProgress], None]

_PLAIN_WIDTH = 1000


def say(line: str) -> None:
    """One step, as it begins."""
    print(line, flush=True)


def counted(number: int, noun: str) -> str:
    """1, "shard" -> "1 shard"; 2 -> "2 shards"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def status(now: PoolStatus, *, address: str, stages: bool = False) -> None:
    """Shards, tables, and what is wrong; with ``stages``, what each shard's calls spend their time on."""
    console = screen()
    moving = f", going to {counted(now.wanted_shards, 'shard')}" if now.rescaling else ""
    moving += f": waiting for {now.waiting_for}" if now.waiting_for else ""
    shown = f"{counted(len(now.shards), 'shard')}, {counted(len(now.tables), 'table')}"
    console.print(f"pool {now.name} at {address}: {shown}{moving}")
    shards = grid(
        console,
        *("shard", "address", "state", "device", "pages' memory", "held for clients", "load", "up for", "incarnation"),
    )
    shares = documents.load_shares(now)
    for shard in now.shards:
        shards.add_row(
            *_shard_row(shard, shares.get(shard.info.shard)), style=None if shard.state == "ready" else "red"
        )
    console.print(shards)
    console.print(_kept(now))
    ways = {
        "through shared memory": sum(shard.near_clients for shard in now.shards),
        "by lines over TCP": sum(shard.tcp_line_clients for shard in now.shards),
    }
    if counts := ", ".join(f"{count} {way}" for way, count in ways.items() if count):
        console.print(f"clients: {counts} (counted at each shard); others come by gRPC")
    found = [documents.table(view, now) for view in now.tables]
    if found:
        tables = grid(
            console, "table", "slots", "dim", "dtype", "optimizer", "placement", "pages", "lost", "version", "updates"
        )
        for table in found:
            tables.add_row(
                table["name"], f"{table['num_slots']:,}", str(table["value_dim"]), table["dtype"], table["optimizer"],
                table["placement"], f"{table['pages']:,}", f"{table['lost_pages']:,}", f"{table['version']:,}",
                f"{table['updates_applied']:,}", style="red" if table["lost_pages"] else None,
            )  # fmt: skip
        console.print(tables)
    for line in [*_versions(now), *_forks(now)]:
        console.print(line)
    if stages:
        console.print(_stages(console, now.shards))
    for creation in now.creating:
        so_far = f"{size(creation.bytes_done)} of {size(creation.bytes_total)}"
        waits = f"waits for {creation.waiting_for}" if creation.waiting_for else ""
        console.print(f"making table {creation.table}: {waits or so_far}")
    if now.checkpoint:
        copied = sum(shard.copied_bytes for shard in now.shards)
        kept = f"; {size(copied)} of rows are kept as they were" if copied else ""
        console.print(f"taking {now.checkpoint}{kept}")
    for line in _troubles(now, found):
        console.print(line, style="red")


def changes(found: Changes) -> None:
    """What `apply` would do."""
    for line in found.lines() or ["nothing to do: the pool is as the file says"]:
        say(line)
    if found.shards_after > found.shards_before:
        say("whether Ray has room for more shards is asked when it is done")


def loads(last: RescaleProgress, *, moved: bool) -> None:
    """What `rebalance` did, or would do."""
    if not last.loads:
        say("too little was read and written lately to tell which pages are hot: nothing moves for it")
    else:
        console = screen()
        shards = grid(console, "shard", "load before", "load after")
        for load in last.loads:
            shards.add_row(str(load.shard), f"{load.before:.1%}", f"{load.after:.1%}")
        console.print(shards)
    if not moved or not last.pages_total:
        would = "pages would move" if last.pages_total else "pages have to move"
        say(f"{last.pages_total:,} {would}, {size(last.bytes_total)}")


def outcome(found: Changes) -> None:
    """What `apply` did and left aside."""
    if found.nothing:
        say("nothing to do: the pool is as the file says")
    for change in found.restart:
        say(f"left aside {change}: it takes effect when the pool is started again")


@contextmanager
def rescale_progress(*, quiet: bool = False) -> Iterator[tuple[Say, Watch]]:
    """Where steps and reports of a rescale go: nowhere, to a bar on a terminal, or to a line for each tenth.

    Ctrl-C ends the watching alone, and it is said so.
    """
    try:
        with _progress(quiet) as shown:
            yield shown
    except KeyboardInterrupt:
        print("interrupted; a rescale that has begun goes on without its watcher: see mempool status", file=sys.stderr)
        raise


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Say, Watch]]:
    console = screen()
    if quiet:
        yield _nothing, _nothing
    elif not console.is_terminal:
        yield say, _Tenths()
    else:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("pages  {task.fields[size]}"), TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("starting shards", total=None, size="")

            def watch(report: RescaleProgress) -> None:
                if not report.pages_total and not report.done:
                    return  # shards are starting
                progress.update(
                    task,
                    description=f"moving {report.table}" if report.table else "moving",
                    completed=report.pages_moved,
                    total=report.pages_total,
                    size=size(report.bytes_moved),
                )

            yield (lambda line: progress.console.print(line, markup=False)), watch


class _Tenths:
    """Says a line when another tenth of the pages has moved, and at the end."""

    def __init__(self) -> None:
        self._said = -1

    def __call__(self, report: RescaleProgress) -> None:
        if not report.pages_total and not report.done:
            return  # shards are starting
        tenth = 10 * report.pages_moved // max(report.pages_total, 1)
        if tenth > self._said or report.done:
            self._said = tenth
            verb = "moved" if report.done else "moving:"
            say(f"{verb} {report.pages_moved} of {report.pages_total} pages, {size(report.bytes_moved)}")


def _nothing(_: object) -> None:
    pass


def screen() -> Console:
    """Where lines for people go. Where nobody looks at it, none is cut to some width."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def grid(console: Console, *columns: str) -> Table:
    """Rows under these headings, without lines."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=not console.is_terminal, overflow="fold")
    return table


def _stages(console: Console, shards: Iterable[ShardStatus]) -> Table:
    """A line for each stage of each shard, what took longest in all first."""
    table = grid(console, "shard", "stage", "times", "in all", "half within", "99 % within", "longest")
    for shard in shards:
        for stage in sorted(shard.stages, key=lambda stage: -stage.total_s):
            times = (stage.total_s, stage.p50_s, stage.p99_s, stage.max_s)
            table.add_row(
                str(shard.info.shard), stage.stage, f"{stage.count:,}", *(_short_time(time) for time in times)
            )
    return table


def _shard_row(shard: ShardStatus, load: float | None) -> tuple[str, ...]:
    ready = shard.state == "ready"
    return (
        str(shard.info.shard),
        shard.info.address or "-",
        shard.state,
        shard.device or "-",
        size(shard.num_bytes) if ready else "-",
        _held(shard) if ready else "-",
        "-" if load is None or not ready else f"{load:.0%}",
        _duration(shard.uptime_s) if ready else "-",
        str(shard.info.incarnation),
    )


def _held(shard: ShardStatus) -> str:
    """What clients make it hold, of what they may."""
    held = size(shard.held_bytes + shard.context_bytes + shard.queued_bytes)
    return f"{held} of {size(shard.client_limit_bytes)}" if shard.client_limit_bytes else held


def _kept(now: PoolStatus) -> str:
    """What of it survives its processes."""
    ready = [shard for shard in now.shards if shard.state == "ready"]
    kept = [shard for shard in ready if shard.storage]
    if kept:
        journals = size(sum(shard.journal_bytes for shard in kept))
        return f"storage {os.path.dirname(kept[0].storage)}: journals of {journals}"
    return "no storage (shard.storage): a shard that dies loses its pages; take checkpoints" if ready else ""


def _versions(now: PoolStatus) -> list[str]:
    """Lines for tables whose versions are kept, by what the gates say of them."""
    lines = []
    for view in now.tables:
        tables = [table for shard in now.shards for table in shard.tables if table.table_id == view.schema.table_id]
        pins = next((table.pins for table in tables if table.pins), ())
        if pins:
            named = [f"{pin.version:,} (snapshot {pin.name})" for pin in pins if pin.name]
            read = [f"{pin.version:,} ({counted(pin.pins, 'reader')})" for pin in pins if not pin.name]
            lines.append(f"versions kept of table {view.schema.name}: {', '.join([*named, *read])}")
    if lines:
        taken = sum(shard.version_bytes for shard in now.shards)
        limit = sum(shard.version_limit_bytes for shard in now.shards)
        lines.append(f"rows as they were, for these: {size(taken)} of {size(limit)} that they may take")
    return lines


def _forks(now: PoolStatus) -> list[str]:
    """Lines for tables that share memory with those that they are forks of."""
    lines = []
    for view in now.tables:
        tables = [table for shard in now.shards for table in shard.tables if table.table_id == view.schema.table_id]
        if shared := sum(table.shared_bytes for table in tables):
            own = sum(table.num_bytes for table in tables) - shared
            lines.append(f"table {view.schema.name} is a fork: {size(own)} of its own, {size(shared)} shared")
    return lines


def _troubles(now: PoolStatus, tables: list[dict[str, object]]) -> list[str]:
    """Lines for what needs somebody's attention."""
    lines = [
        f"shard {shard.info.shard} cannot start, and is tried again: {shard.storage_refuses}"
        if shard.storage_refuses
        else f"shard {shard.info.shard} is starting"
        if shard.state == "starting"
        else f"shard {shard.info.shard} does not answer; Ray starts it again if its process died"
        for shard in now.shards
        if shard.state != "ready"
    ]
    lines += [
        f"shard {shard.info.shard} takes no change, as its storage refuses it: {shard.storage_refuses}"
        for shard in now.shards
        if shard.storage_refuses and shard.state == "ready"
    ]
    if now.unfinished:
        lines.append(now.unfinished)
    elif now.wanted_shards not in (0, len(now.shards)) and not now.rescaling:
        lines.append(
            f"the pool has {counted(len(now.shards), 'shard')} and was asked for {now.wanted_shards}: ask again with "
            f"mempool scale --shards {now.wanted_shards}"
        )
    lines += [
        f"table {table['name']} lost {table['lost_pages']} of {table['pages']} pages: it answers DATA_LOSS. "
        f"{lost_remedy(view.schema.name, view.saved)}"
        for view, table in zip(now.tables, tables, strict=True)
        if table["lost_pages"]
    ]
    return lines + _half_made(now)


def _half_made(now: PoolStatus) -> list[str]:
    """Lines for tables that are neither made nor being made: their controller died, or a shard missed that they are."""
    going_on = {creation.table_id for creation in now.creating}
    made = {view.schema.table_id for view in now.tables}
    half: dict[int, tuple[str, list[int]]] = {}
    for shard in now.shards:
        for table in shard.tables:
            if table.pending and table.table_id not in going_on:
                half.setdefault(table.table_id, (table.name, []))[1].append(shard.info.shard)
    return [
        f"table {name} is made, and shard {', '.join(map(str, shards))} has not heard so yet: it is told again"
        if table_id in made
        else f"table {name} is half made on shard {', '.join(map(str, shards))}, and nobody makes it any more: it is "
        "dropped once every shard has been heard, unless one of them knows that it is made"
        for table_id, (name, shards) in sorted(half.items())
    ]


def size(num_bytes: float) -> str:
    """As people say it: 3.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _short_time(seconds: float) -> str:
    if seconds >= 1.0:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
