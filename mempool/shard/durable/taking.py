"""A snapshot while the shard works: the small state at one boundary between two jobs, pages copied out piece by piece.

Rows of a page that changed since the last snapshot, and is not copied out yet, are copied by whoever writes to them
first. What a snapshot is on the disk is ``mempool.journal``'s.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from mempool.errors import DataLoss, MempoolError
from mempool.journal import Snapshot
from mempool.shard.durable.encoding import joined
from mempool.shard.durable.pages import heads_arrays, heads_key, page_key
from mempool.shard.durable.records import (
    Attached,
    Decided,
    Dropped,
    Gone,
    Held,
    Kept,
    Prepared,
    RecordOf,
    Schedule,
    Stopped,
)
from mempool.shard.durable.store import Store
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.capture import ArenaCut
from mempool.shard.pages.masks import Mask
from mempool.shard.pages.named_arrays import Blocks
from mempool.shard.tenancy import Tenancy
from mempool.types import AttachTable, Envelope, ForkPoint, PreparePart, PrepareRequest
from mempool.types.caller import Caller, calling
from mempool.types.running import THREADS, Runner, to_its_end

_LOG = logging.getLogger("mempool.shard")

_PIECE_BYTES = 4 * 2**20
"""Pages are copied out in pieces of about this size, other jobs in between."""

_AGAIN_S = 1.0
"""After one that was due and could not be taken, or of whose segments none could be removed."""

_Page = tuple[bytes, list[tuple[str, Tensor]]]


class Cut:
    """One snapshot at its boundary. All on the engine's thread, but for what ``Taking`` does with it.

    Attributes:
        head: The small state.
        kept: Keys of pages that are as they were in the snapshot before.
        same: Of a fork's pages that were not written to since, nor those of the table that it is a fork of: their keys.
        synced: Ends with the number of the record that it comes behind, once that is durable.
    """

    def __init__(self, store: Store, tenancy: Tenancy, marks: "WeakKeyDictionary[Arena, int]") -> None:
        self.synced = store.when_synced()
        records: list[RecordOf] = [Dropped(table_id) for table_id in tenancy.ended]
        records += (Gone(*decided) for decided in tenancy.decisions.of_dropped())
        tables = tuple(tenancy.tables.values())
        for part in (_tables, _steps, _decisions):  # of all tables: a step may be of several, and is decided at one
            for table in tables:
                records += part(table)
        self.head = joined(records)
        newest = store.snapshots.newest
        before = frozenset(() if newest is None else newest.pages)
        self.kept: list[bytes] = []
        self.same: dict[bytes, bytes] = {}
        self._table_of = {
            arena: table.table_id for table in tables for arena in table.storage.arenas.values() if not table.lost_pages
        }
        self._pages: list[_Page] = []
        self.arenas: list[ArenaCut] = []
        try:
            for table in tables:
                if table.storage.num_lost:
                    continue
                if table.storage.heads:
                    self._pages.append((heads_key(table.table_id), heads_arrays(table)))
                for blocks, arena in table.storage.arenas.items():
                    self._mark(table, blocks, arena, marks.get(arena), before)
        except BaseException:  # no memory, say
            self.end()
            raise

    def _mark(
        self, table: HostedTable, blocks: Blocks, arena: Arena, mark: int | None, before: frozenset[bytes]
    ) -> None:
        written = None if mark is None else frozenset(arena.written_since(mark).tolist())
        changed: dict[int, bytes] = {}
        same, base_id = self._same(arena)
        for row_page in np.flatnonzero(arena.page_of >= 0).tolist():
            key, place = page_key(table.table_id, row_page, blocks), int(arena.page_of[row_page])
            if written is not None and place not in written and key in before:
                self.kept.append(key)
            elif same is not None and same[row_page]:
                self.same[key] = page_key(base_id, row_page, blocks)
            else:
                changed[place] = key
        self.arenas.append(ArenaCut(arena, changed, page_slots=table.storage.schema.page_slots))

    def _same(self, arena: Arena) -> tuple[Mask | None, int]:
        """[row pages] which are those of another table, and its id; None: none are known to be."""
        base = None if arena.forked is None else arena.forked[0]()
        if base is None or base not in self._table_of:
            return None, 0
        return arena.same_pages(), self._table_of[base]

    def take(self) -> list[_Page]:
        """Some pages; none: there are no more."""
        if self._pages:
            taken, self._pages = self._pages, []
            return taken
        for cut in self.arenas:
            if taken := cut.take(_PIECE_BYTES):
                return taken
        return []

    def end(self) -> None:
        """Whoever writes copies nothing any more."""
        for cut in self.arenas:
            cut.end_copying()


def _tables(table: HostedTable) -> Iterator[RecordOf]:
    """A table without its pages and steps."""
    table_id, lost = table.table_id, table.storage.num_lost > 0
    yield Attached(
        AttachTable(
            view=table.view,
            mode="lost" if lost else "empty",
            ledger=table.ledger.snapshot(),
            pending=table.pending,
            fork=None if table.fork_of is None else ForkPoint(table_id=table.fork_of),
        )
    )
    if (schedule := table.storage.schedule) is not None and not lost:
        yield Schedule(table_id, schedule.first_step, schedule.steps.cpu(), schedule.log_decays.cpu())
        yield from (Stopped(table_id, step) for step in schedule.stops)
    kept = table.order.kept()
    for first in range(0, len(kept), 512):
        yield Kept(kept[first : first + 512])


def _steps(table: HostedTable) -> Iterator[RecordOf]:
    """What is held of steps, and which are prepared."""
    table_id = table.table_id
    for step_id, sequence, update in table.updates.all_held():
        yield Held(table_id, step_id, sequence, update)
    for prepared in table.updates.prepared():
        part = PreparePart(
            envelope=Envelope(table_id=table_id, epoch=0, incarnation=0),
            step_id=prepared.step_id,
            sequences=prepared.sequences,
        )
        decider_table, decider_step = prepared.decider
        request = PrepareRequest(parts=(part,), want_norm=False, decider_table=decider_table, decider_step=decider_step)
        yield Prepared(request)


def _decisions(table: HostedTable) -> Iterator[RecordOf]:
    """The steps that are decided here and not applied."""
    for step in table.order.waiting() if table.is_gate else ():
        yield Decided((step, *table.others.get(step.version, ())))


class Taking:
    """Takes the snapshots of a shard, one at a time, while it works.

    Args:
        store: Where they go.
        tenancy: What they are of.
        on_thread: Runs a job on the engine's thread.
        runner: Writes, elsewhere.
    """

    def __init__(
        self,
        store: Store,
        tenancy: Tenancy,
        *,
        on_thread: Callable[[str, Callable[[Any], Any]], Awaitable[Any]],
        runner: Runner = THREADS,
    ) -> None:
        self._store = store
        self._tenancy = tenancy
        self._on_thread = on_thread
        self._runner = runner
        self._marks: WeakKeyDictionary[Arena, int] = WeakKeyDictionary()
        self._task: asyncio.Task[None] | None = None
        self._not_before_s = float("-inf")
        self._closed = False
        self._one = asyncio.Lock()

    def restored(self, arenas: dict[Arena, int]) -> None:
        """Pages of these arenas are as in the newest snapshot, but for what was written since ``writes`` was that."""
        self._marks.update(arenas)

    def poke(self) -> None:
        """On the loop: begin one where it is due and none is under way."""
        if self._task is None and not self._closed and self._store.is_half_full:
            loop = asyncio.get_running_loop()
            if loop.time() < self._not_before_s:
                return
            with calling(Caller()):  # whoever has asked for something else waits for nothing of this
                self._task = loop.create_task(self._try())
            self._task.add_done_callback(self._done)

    def _done(self, _: "asyncio.Task[None]") -> None:
        self._task = None

    async def close(self) -> None:
        """Give up the one that is under way; none is begun any more, as the folder is let go. Repeatable."""
        self._closed = True
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _try(self) -> None:
        try:
            if await self.take() and await self._store.removed():
                return
        except MempoolError as error:
            _LOG.warning("no snapshot could be taken, and the journal grows on: %s", error)
        self._not_before_s = asyncio.get_running_loop().time() + _AGAIN_S

    async def take(self) -> bool:
        """Take one now. Returns whether there is one: not while pages are on their way, or being filled.

        Raises:
            StorageFailed: The one before counts.
        """
        async with self._one:
            return await self._take()

    async def _take(self) -> bool:
        cut: Cut | None = await self._on_thread("snapshot", lambda _: self._cut())
        if cut is None:
            return False
        try:
            number = await asyncio.wrap_future(cut.synced)
            with self._store.snapshots.begin(after=number) as snapshot:
                for key in cut.kept:
                    snapshot.keep(key)
                while pages := await self._on_thread("snapshot", lambda _: cut.take()):
                    await self._written(lambda pages=pages: _write(snapshot, pages))  # type: ignore[misc]
                for key, other in cut.same.items():
                    while other in cut.same:  # of a fork of a fork
                        other = cut.same[other]
                    snapshot.same(key, other)
                await self._written(lambda: snapshot.finish(cut.head))
        except DataLoss:  # of what was to be written anew from the disk; memory has it
            self._marks.clear()
            raise
        finally:
            await asyncio.shield(self._on_thread("snapshot", lambda _: cut.end()))
        self._marks.update({one.arena: one.writes for one in cut.arenas})
        self._store.snapshot_taken(number)
        return True

    async def _written(self, work: Callable[[], object]) -> None:
        """Do this elsewhere. Whoever gives the snapshot up waits for its end, too: it is not to remove a pack whose
        manifest gets its name just then, nor to let the folder go."""
        await to_its_end(self._runner.run(work))

    def _cut(self) -> Cut | None:
        for table in self._tenancy.tables.values():
            if table.frozen or table.bytes_to_fill or table.restored or table.forked or not table.staging.is_empty:
                return None
        return Cut(self._store, self._tenancy, self._marks)


def _write(snapshot: Snapshot, pages: list[_Page]) -> None:
    for key, arrays in pages:
        snapshot.write(key, [(name, [array.numpy().data]) for name, array in arrays])
