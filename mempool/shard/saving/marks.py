"""Marks of a shard's tables, and the parts of a checkpoint that are written from them, beside all other work.

A mark is made while its table is frozen; from then on rows are copied before they are written to first (``capture``).
A part is written group by group: read out on the engine's thread, written on another one, the next is read meanwhile.
Between two groups the engine's thread is left to others, where there are any. Copies that are needed still are bounded:
above that, steps are held off until the writer has caught up. Which moment, and who commits, is not here.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from mempool.checkpoint.commit import number_of
from mempool.checkpoint.format.layout import PageGroup
from mempool.checkpoint.format.manifest import part_bytes
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.stores import open_store
from mempool.checkpoint.stores.places import check_place
from mempool.checkpoint.writer import PartWriter
from mempool.errors import InvalidRequest, MempoolError, NotFound, StalePlacement, StorageFailed
from mempool.shard import bounds
from mempool.shard.durable.records import Stopped
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.capture import Capture, Marks, changed_since, mark, page_arrays, pages_here
from mempool.shard.steps.budget import MIB
from mempool.shard.tenancy import Tenancy
from mempool.types import MarkTable, PartProgress, ReleaseMark, ShardInfo, WritePart
from mempool.types.caller import Caller, calling
from mempool.types.running import Clock, Runner, to_its_end

COPY_BYTES = 256 * MIB
"""Of rows that are kept as they were, of all tables: above that no further step is begun."""
_GROUP_BYTES = 4 * MIB
"""Read out in one job: some milliseconds."""
_PAUSES = 12
"""While others use the engine, so many times as long as a group was read out it is theirs before the next one is."""
_LONGEST_PAUSE_S = 2.0
"""Whatever held up the one before: a machine that stands still for a while would end the checkpoint as stalled."""
_IN_USE_S = 1.0
"""So long after its thread has worked for others it counts as used: a trainer computes between two calls."""
_IN_USE_SHARE = 0.03
"""Of its time, looked at each ``_LOOK_S``: what is asked now and then, by whoever watches, is no use."""
_LOOK_S = 0.1
_MAX_LEASE_S = 3600.0
"""A mark whose part is written has it in any case: others' parts may take so long, and it costs nothing."""
_MAX_WAIT_S = 30.0


Run = Callable[[str, Callable[[Any], Any], Any], Awaitable[Any]]
"""Runs a job on the engine's thread: what it is called, the job, what it is given."""


@dataclass(eq=False, kw_only=True)
class Mark:
    """A table as it was at one version.

    Attributes:
        owned: The pages of this shard; changed: those of them to write, where the others are read from ``since``.
        over: Why it is of no use any more; "" while it is.
        writing: Writes the part; ``asked``: where to.
        pause_s: So long the engine's thread is left to others before the next group is read out.
    """

    request: MarkTable
    table: HostedTable
    capture: Capture
    owned: Pages
    changed: Pages | None
    marks: Marks
    step_count: int
    updates_applied: int
    ends_s: float
    over: str = ""
    writing: "asyncio.Task[bytes] | None" = None
    asked: tuple[str, str, int] | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    pause_s: float = 0.0


@dataclass(kw_only=True)
class Saving:
    """The marks of one shard: one a table at most.

    Args:
        info: Which shard this is.
        tenancy: Its tables.
        control, jobs: Run on the engine's thread: before what clients ask; among it.
        clock: Seconds, monotonic.
        busy_s: Seconds that the engine's thread has worked, for whomever.
        runner: Writes.
        copy_bytes: Of copied rows, of all tables together.
    """

    info: ShardInfo
    tenancy: Tenancy
    control: Run
    jobs: Run
    clock: Clock
    busy_s: Callable[[], float]
    runner: Runner
    copy_bytes: int = COPY_BYTES
    _marks: dict[int, Mark] = field(default_factory=dict)
    _read_s: float = 0.0
    _looked: tuple[float, float] = (0.0, 0.0)
    _used_s: float = -math.inf

    # Calls

    async def mark(self, request: MarkTable) -> None:
        """As ``PageHost.mark_table``."""
        bounds.check_token(request.token)
        if not request.token or not 0.0 < request.lease_s <= _MAX_LEASE_S:
            raise InvalidRequest(
                f"a mark has a token and a lease of at most {_MAX_LEASE_S:g} s; got {bounds.shown(request.token)} and "
                f"{request.lease_s:g} s. Nothing was changed."
            )
        bounds.check_number("version", request.version)
        _check_name(request.since, empty=True)
        await self.control("mark_table", self._mark, request)

    async def write(self, request: WritePart) -> PartProgress:
        """As ``PageHost.write_part``."""
        check_place(request.url)
        _check_name(request.checkpoint)
        bounds.check_number("since_version", request.since_version)
        found = self._find(request.table_id, request.token)
        found.ends_s = max(found.ends_s, self.clock() + found.request.lease_s)
        asked = request.url, request.checkpoint, request.since_version
        if found.writing is None:
            found.asked = asked
            with calling(Caller()):  # it goes on where the call ends
                found.writing = asyncio.create_task(self._write(found, request))
            found.writing.add_done_callback(_retrieved)
        elif asked != found.asked:
            raise InvalidRequest(
                f"mark {request.token!r} is being written to {found.asked}, and is asked for as {asked}; a mark is "
                "written once. Nothing was changed."
            )
        await asyncio.wait({found.writing}, timeout=min(max(0.0, request.wait_s), _MAX_WAIT_S))
        done = found.writing.done()
        if not done:
            self._find(request.table_id, request.token)
        return PartProgress(
            bytes_done=found.bytes_done,
            bytes_total=found.bytes_total,
            updates_applied=found.updates_applied,
            part=found.writing.result() if done else b"",
        )

    async def release(self, request: ReleaseMark) -> None:
        """As ``PageHost.release_mark``."""
        bounds.check_token(request.token)
        _check_name(request.kept, empty=True)
        found = self._marks.get(request.table_id)
        if found is not None and found.request.token == request.token:
            await self.control("release_mark", self._release, request)
            await _ended(found.writing)

    async def close(self) -> None:
        """End what is written."""
        for found in list(self._marks.values()):
            await _ended(found.writing)

    # On the engine's thread

    def expire(self) -> bool:
        """End marks whose lease is over, or whose table is gone. Returns whether there are any."""
        for table_id, found in list(self._marks.items()):
            if self.clock() >= found.ends_s:
                self._end(table_id, "its controller was not heard of within its lease")
            elif not self._is_there(found):
                self._end(table_id, "its table was dropped")
        return bool(self._marks)

    def crowded(self) -> bool:
        """Whether copies take what they may: no further step is begun until the writer has caught up."""
        return self._used_bytes > self.copy_bytes

    @property
    def _used_bytes(self) -> int:
        """Of copies that are needed still."""
        return sum(found.capture.used_bytes for found in self._marks.values())

    @property
    def num_bytes(self) -> int:
        """Of copies. On any thread."""
        return sum(found.capture.num_bytes for found in list(self._marks.values()))

    def _mark(self, request: MarkTable) -> None:
        table = self.tenancy.table(request.table_id)
        present = self._marks.get(request.table_id)
        if present is not None and present.request.token == request.token:
            return
        table.check_ready()
        table.check_whole()
        table.let_go()
        table.rounds.require(request.token)
        if table.ledger.version != request.version or table.order.any_waiting:
            raise StalePlacement(
                f"table {table.view.schema.name!r} is at version {table.ledger.version} on shard {self.info.shard}, "
                f"and is to be marked at {request.version}: owners differ. Nothing was changed",
                shard=self.info.shard,
            )
        self.tenancy.log.require()
        self._end(request.table_id, "another checkpoint was begun")
        schedule = table.storage.schedule
        if schedule is not None and schedule.stop(schedule.last_step):
            self.tenancy.log.add(Stopped(request.table_id, schedule.last_step))
        owned, changed = pages_here(table.storage), changed_since(table.storage, request.since)
        self._marks[request.table_id] = Mark(
            request=request,
            table=table,
            capture=Capture(table.storage, owned if changed is None else changed),
            owned=owned,
            changed=changed,
            marks=Marks(table.storage),
            step_count=table.ledger.step,
            updates_applied=table.ledger.updates_applied,
            ends_s=self.clock() + request.lease_s,
        )
        if len(self._marks) == 1:  # what was before says nothing of who uses it now
            self._looked, self._used_s = (self.clock(), self.busy_s() - self._read_s), -math.inf
        table.storage.crowded = self.crowded
        table.storage.on_change = partial(self._end, request.table_id)

    def _release(self, request: ReleaseMark) -> None:
        found = self._marks.get(request.table_id)
        if found is not None and found.request.token == request.token:
            if request.kept and not found.over:
                mark(found.table.storage, request.kept, found.marks)
            self._end(request.table_id, "it was released")

    def _end(self, table_id: int, why: str) -> None:
        found = self._marks.pop(table_id, None)
        if found is not None:
            found.over = why
            found.capture.close()
            found.table.storage.on_change = _nothing
            found.table.storage.crowded = _never
            found.table.go_on()
            self._wake()

    def _wake(self) -> None:
        for found in self._marks.values():
            found.table.go_on()

    def _export(self, asked: tuple[Mark, PageGroup]) -> dict[str, Tensor]:
        found, group = asked
        if found.over:
            raise self._gone(found.request.table_id, found.over)
        was_crowded = self.crowded()
        began_s = self.clock()
        arrays = found.capture.export(group.rows, group.blocks, group.heads)
        found.pause_s = self._pause_s(began_s, self.clock() - began_s)
        if was_crowded and not self.crowded():
            self._wake()
        return arrays

    def _whole(self, found: Mark) -> None:
        """All of it is written: what changes from now on is remembered, and not copied."""
        found.capture.close()
        found.ends_s = max(found.ends_s, self.clock() + _MAX_LEASE_S)
        self._wake()

    def _pause_s(self, now_s: float, read_s: float) -> float:
        """How long to pause after a group that took so long. The fuller copies are, the shorter: above their bound all
        steps would wait for the writer."""
        others_s = self.busy_s() - self._read_s
        self._read_s += read_s
        before_s, others_before_s = self._looked
        if now_s - before_s >= _LOOK_S:
            if others_s - others_before_s > _IN_USE_SHARE * (now_s - before_s):
                self._used_s = now_s
            self._looked = now_s, others_s
        if now_s - self._used_s > _IN_USE_S:
            return 0.0
        room = max(0.0, 1.0 - self._used_bytes / max(1, self.copy_bytes))
        return min(_LONGEST_PAUSE_S, _PAUSES * read_s * room)

    # Writing

    async def _write(self, found: Mark, request: WritePart) -> bytes:
        table, since = found.table, found.request.since if found.changed is not None else None

        def begin() -> PartWriter:
            return PartWriter(
                open_store(request.url),
                request.checkpoint,
                f"shard-{self.info.shard}",
                schema=table.view.schema,
                arrays=page_arrays(table.storage),
                version=found.request.version,
                step_count=found.step_count,
                owned=found.owned,
                changed=found.changed,
                since=since,
                since_version=request.since_version if since else 0,
                batch_bytes=_GROUP_BYTES,
            )

        writer = await self._elsewhere(begin)
        found.bytes_total = writer.num_bytes
        groups = writer.groups()
        group = next(groups, None)
        reading = asyncio.ensure_future(self._read(found, group))
        try:
            while group is not None:
                arrays = await reading
                group = next(groups, None)
                reading = asyncio.ensure_future(self._read(found, group))
                await self._elsewhere(partial(writer.write, arrays))
                del arrays
                found.bytes_done = writer.written_bytes
            part: bytes = await self._elsewhere(lambda: part_bytes(writer.part()))
            await self.control("save", self._whole, found)
            return part
        except BaseException as error:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            leave = partial(writer.__exit__, type(error), error, None)
            await asyncio.shield(self._elsewhere(leave))
            raise

    async def _read(self, found: Mark, group: PageGroup | None) -> dict[str, Tensor]:
        """Read a group out, once the engine's thread was left to others for a while. None: nothing is left to read."""
        if group is None:
            return {}
        await asyncio.sleep(found.pause_s)
        arrays: dict[str, Tensor] = await self.jobs("save", self._export, (found, group))
        return arrays

    async def _elsewhere(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``. Who is cancelled meanwhile waits for it first: a file is written by one at a time."""
        try:
            return await to_its_end(self.runner.run(work, name="mempool-checkpoint"))
        except MempoolError:
            raise
        except Exception as error:  # of the user's fsspec package, say
            raise StorageFailed(
                f"shard {self.info.shard} could not write its part of a checkpoint ({type(error).__name__}: {error}). "
                "No checkpoint counts; take it again",
                shard=self.info.shard,
            ) from error

    # Which mark is meant

    def _find(self, table_id: int, token: str) -> Mark:
        found = self._marks.get(table_id)
        if found is None or found.request.token != token:
            raise self._gone(table_id, "it was never made, or its shard was started anew")
        return found

    def _gone(self, table_id: int, why: str) -> NotFound:
        return NotFound(
            f"shard {self.info.shard} has no such mark of table {table_id} any more: {why}. The checkpoint is not "
            "whole, and counts for nothing; take it again",
            shard=self.info.shard,
        )

    def _is_there(self, found: Mark) -> bool:
        try:
            return self.tenancy.table(found.request.table_id) is found.table
        except NotFound:
            return False


def _nothing(_: str) -> None:
    pass


def _never() -> bool:
    return False


def _check_name(name: str, *, empty: bool = False) -> None:
    if not (empty and not name) and number_of(name) is None:
        raise InvalidRequest(
            f"{bounds.shown(name)} is no checkpoint's name, as '000012-7e19cac2' is. Nothing was changed."
        )


def _retrieved(task: "asyncio.Task[bytes]") -> None:
    """Whoever asked for it may be gone: what it ended with is no news to asyncio."""
    if not task.cancelled():
        task.exception()


async def _ended(task: "asyncio.Task[bytes] | None") -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
