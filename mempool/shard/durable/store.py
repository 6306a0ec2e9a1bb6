"""The store of one shard: its folder, journal and snapshots as one thing to which records are added and waited for.

Memory may be ahead of the disk, and nobody is told of what is: answers wait (``settled``). What the disk refused is
kept here and added again, in order, until it is taken. What records do is ``replay``'s, when snapshots are taken
``taking``'s.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from mempool.agreement.ledger import StepLog
from mempool.errors import MempoolError, RequestTooLarge, StorageFailed
from mempool.journal import Bytes, DiskFiles, Files, Journal, ShardFolder, Snapshots, Sync
from mempool.journal.journal import SEGMENT_BYTES
from mempool.journal.records import MOST_PAYLOAD_BYTES
from mempool.shard.durable.encoding import apart, decode, encode
from mempool.shard.durable.records import Applied, Begun, CaughtUp, Decided, Held, Over, RecordOf, Unstaged
from mempool.types import DecidedStep, StepId
from mempool.types.running import THREADS, Runner

_LOG = logging.getLogger("mempool.shard")
JOURNAL_LIMIT_BYTES = 2**30
_EARLY_BYTES = 64 * 2**10
"""Updates that are held are waited for by nobody: one that has so many is written at once, so that what is waited for
next has less to wait for; smaller ones go with that."""
_UNASKED_BYTES = 32 * 2**20
"""So many of them are synced all the same: they are kept here until then, and their trainer may be gone."""
_LEAST_SEGMENT_BYTES = 2**10
_HEADER_BYTES = 2**20
"""Of a record besides its tensors, at most."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A record that is not synced yet. number: in the journal, 0 where that has refused it."""

    position: int
    kind: int
    parts: list[Bytes]
    number: int


class Store:
    """What one shard keeps on its disk. What earlier lives left is read, then it is a ``Log``.

    Args:
        path: shard.storage.path.
        pool, pool_id, shard: Whose it is.
        files: Where it lies.
        runner: Where it is written.
        sync: When records are durable.
        journal_limit: Bytes that the journal may have on the disk: a snapshot is taken when it has half.

    Attributes:
        incarnation: Of this life: higher than those of all before.
        snapshots: Its snapshots.
        journal: Its journal.

    Raises:
        ConfigError, DataLoss, StorageFailed: As ``ShardFolder``, ``Snapshots`` and ``Journal``. Nothing was changed.
    """

    keeps = True

    def __init__(
        self,
        path: str,
        *,
        pool: str,
        pool_id: str,
        shard: int,
        files: Files | None = None,
        runner: Runner = THREADS,
        sync: Sync = "commit",
        journal_limit: int = JOURNAL_LIMIT_BYTES,
    ) -> None:
        files = DiskFiles() if files is None else files
        self.journal_limit = journal_limit
        self._folder = ShardFolder(files, path, pool=pool, pool_id=pool_id, shard=shard)
        try:
            owner = self._folder.owner
            self.snapshots = Snapshots(files, self._folder.snapshots, owner=owner)
            newest = self.snapshots.newest
            self.after = 0 if newest is None else newest.after
            self.journal = Journal(
                files,
                self._folder.journal,
                owner=owner,
                runner=runner,
                sync=sync,
                after=self.after,
                segment_bytes=max(_LEAST_SEGMENT_BYTES, min(SEGMENT_BYTES, journal_limit // 8)),
            )
        except BaseException:
            self._folder.close()
            raise
        if (torn := self.journal.torn) is not None:
            _LOG.warning(
                "%s is cut off at %d, as what was written last is not whole: %s", torn.path, torn.offset, torn.why
            )
        self.incarnation = self.journal.next_sequence  # each life begins a segment
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._position = self._awaited = self._synced = 0
        self._unasked_bytes = 0
        self._error: MempoolError | None = None
        self._trying = False
        self._failures = 0
        self._removed: Future[int] | None = None
        self._sleepers: list[tuple[int, Callable[[MempoolError | None], None]]] = []

    @property
    def path(self) -> str:
        """Its folder."""
        return self._folder.path

    def take_head(self) -> Iterator[RecordOf]:
        """The head of the newest snapshot, once. Raises DataLoss where it is not what one has."""
        newest = self.snapshots.newest
        yield from () if newest is None else apart(newest.head)

    def records(self) -> Iterator[RecordOf]:
        """What earlier lives appended behind it, in order. Raises DataLoss where that is damaged, or missing."""
        for entry in self.journal.records(after=self.after):
            yield decode(entry.kind, entry.payload)

    @property
    def is_half_full(self) -> bool:
        """Whether a snapshot is to be taken, so that the journal keeps to its limit. From any thread."""
        return self.journal.num_bytes * 2 > self.journal_limit and (self._removed is None or self._removed.done())

    def snapshot_taken(self, number: int) -> None:
        """All up to that record is in the newest snapshot: what is before it may go."""
        self.after = number
        with suppress(StorageFailed):  # it is closed
            self._removed = self.journal.remove_before(number + 1)

    async def removed(self) -> bool:
        """Whether that could go, once it has been tried."""
        removed = self._removed
        if removed is None:
            return True
        try:
            await asyncio.wrap_future(removed)
        except StorageFailed as error:
            _LOG.warning("what a snapshot has made needless is left in the journal: %s", error)
            return False
        return True

    async def close(self) -> None:
        """Write what waits, and let the folder go. Repeatable."""
        try:
            await self.journal.close()
        finally:
            self._folder.close()

    # On the engine's thread

    def require(self, num_bytes: int = 0) -> None:
        """See ``Log``. What the disk has refused is tried again."""
        if num_bytes + _HEADER_BYTES > MOST_PAYLOAD_BYTES:
            raise RequestTooLarge(
                f"{num_bytes:,} bytes are more than a record of a shard's journal may have ({MOST_PAYLOAD_BYTES:,}): "
                "send fewer rows at a time. Nothing was changed."
            )
        if self._error is None:
            return
        error = self._error
        self.try_again()
        raise copy(error)

    @property
    def fails(self) -> bool:
        """Whether the disk has refused something that it has not taken since."""
        return self._error is not None

    @property
    def said(self) -> dict[str, str | int]:
        """What a ``ShardStatus`` says of it. From any thread."""
        error = self._error
        return {
            "storage": self.path,
            "journal_bytes": self.journal.num_bytes,
            "storage_refuses": "" if error is None else error.message,
        }

    def add(self, record: RecordOf) -> None:
        """Keep a record; whoever waits is told when it is durable, or why it is not."""
        self._add(*encode(record), awaited=not isinstance(record, Held))

    def steps_of(self, table_id: int) -> StepLog:
        """What a table's ledger tells goes into records."""
        return _Steps(self, table_id)

    def caught_up_of(self, table_id: int) -> Callable[[Tensor, bool], None]:
        """See ``Log``. Where a step follows it does the same to these slots, so that nobody needs to wait."""
        return lambda slots, for_step: self._add(*encode(CaughtUp(table_id, slots)), awaited=not for_step)

    def unstaged_of(self, table_id: int) -> Callable[[], None]:
        """See ``Log``."""
        return lambda: self.add(Unstaged(table_id))

    def try_again(self) -> None:
        """Append what the disk has refused once more, unless that is under way."""
        failures = self.journal.num_failures
        with self._lock:
            if self._error is None or self._trying:
                return
            self._trying = True
            # After a failure nothing that waits is on its way any more; where the journal was only full, some is.
            lost = failures != self._failures
            refused = [one for one in self._waiting if lost or not one.number]
            self._waiting = deque(one for one in self._waiting if not lost and one.number)
            self._failures = failures
            if not refused:
                self._error, self._trying = None, False
        for place, one in enumerate(refused):
            last = one is refused[-1]
            if not self._append(one, ring=last, wait=last):
                with self._lock:
                    self._waiting.extend(replace(late, number=0) for late in refused[place + 1 :])
                return

    def _add(self, kind: int, parts: list[Bytes], *, awaited: bool) -> None:
        num_bytes = sum(len(part) for part in parts)
        with self._lock:
            self._position += 1
            one = _Waiting(self._position, kind, parts, 0)
            if awaited:
                self._awaited = one.position
            if self._error is not None:  # in order: behind what the disk has not taken
                self._waiting.append(one)
                return
            self._unasked_bytes += num_bytes
            synced = awaited or self._unasked_bytes > _UNASKED_BYTES
            if synced:
                self._unasked_bytes = 0
        self._append(one, ring=synced or num_bytes >= _EARLY_BYTES, wait=synced)

    def _append(self, one: _Waiting, *, ring: bool, wait: bool) -> bool:
        """Give a record to the journal. Returns whether that has taken it."""
        try:
            number = self.journal.append(one.kind, one.parts, ring=ring, wait=wait, since=self._failures)
        except MempoolError as refusal:
            with self._lock:
                self._waiting.append(replace(one, number=0))
            self._failed(refusal)
            return False
        with self._lock:
            self._waiting.append(replace(one, number=number))
        if wait:
            self.journal.when_synced(number).add_done_callback(partial(self._told, one.position, self._failures))
        return True

    # On any thread

    @property
    def is_settled(self) -> bool:
        """Whether ``settled`` would not wait. Without the lock, which a signal's handler may find taken by whom it has
        interrupted: both only grow, and what was awaited is read first."""
        return self._awaited <= self._synced

    async def settled(self) -> None:
        """Wait until all that was added, but for updates that are only held, is durable.

        Raises:
            StorageFailed: The disk does not take it. It stays to be asked for.
        """
        with self._lock:
            awaited = self._awaited
            if awaited <= self._synced:
                return
            if self._error is not None and not self._trying:
                raise copy(self._error)
            loop = asyncio.get_running_loop()
            done: asyncio.Future[None] = loop.create_future()
            self._sleepers.append((awaited, partial(_wake, loop, done)))
        await done

    def when_synced(self) -> "Future[int]":
        """Ends with the number of the newest record once that is durable. On the engine's thread."""
        ended: Future[int] = Future()
        ended.set_running_or_notify_cancel()  # nobody can cancel it: whoever is woken after it would not be
        with self._lock:
            number = max((one.number for one in self._waiting), default=self.journal.last)
            if self._error is not None:
                ended.set_exception(copy(self._error))
                return ended
            position = self._position
            if position <= self._synced or not self._waiting:
                ended.set_result(number)
                return ended
            self._sleepers.append((position, partial(_end, ended, number)))
            last = self._waiting[-1]
        if last.number:  # updates that are only held are on nobody's way yet
            self.add(Begun(self.incarnation))
        return ended

    def _told(self, position: int, failures: int, done: "Future[None]") -> None:
        """[JOURNAL] What was added up to that position is durable, or failed; failures: as it was appended."""
        error = done.exception()
        if error is not None:
            if failures == self._failures:  # else it is appended again by now
                self._failed(error if isinstance(error, MempoolError) else StorageFailed(str(error)))
            return
        with self._lock:
            self._synced = max(self._synced, position)
            while self._waiting and self._waiting[0].position <= self._synced:
                self._waiting.popleft()
            if self._trying:
                self._trying = False
                if all(one.number for one in self._waiting):
                    self._error = None
            woken = [wake for at, wake in self._sleepers if at <= self._synced]
            self._sleepers = [one for one in self._sleepers if one[0] > self._synced]
        for wake in woken:
            wake(None)

    def _failed(self, error: MempoolError) -> None:
        """All who wait are told, and what waits is kept, to be appended again."""
        with self._lock:
            self._error, self._trying = copy(error), False
            woken, self._sleepers = self._sleepers, []
        for _, wake in woken:
            wake(error)


class _Steps:
    """The ``StepLog`` of one table."""

    def __init__(self, store: Store, table_id: int) -> None:
        self._store = store
        self._table_id = table_id

    def applied(self, step: DecidedStep, others: tuple[DecidedStep, ...]) -> None:
        """See ``StepLog``."""
        self._store.add(Applied(step, others))

    def numbered(self, step: DecidedStep) -> None:
        """See ``StepLog``."""
        self._store.add(Decided((step,)))

    def over(self, step_id: StepId) -> None:
        """See ``StepLog``."""
        self._store.add(Over(self._table_id, step_id))


def _wake(loop: asyncio.AbstractEventLoop, done: "asyncio.Future[None]", error: MempoolError | None) -> None:
    def settle() -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(copy(error))

    with suppress(RuntimeError):  # the loop is closed, and so nobody waits
        loop.call_soon_threadsafe(settle)


def _end(ended: "Future[int]", number: int, error: MempoolError | None) -> None:
    if error is None:
        ended.set_result(number)
    else:
        ended.set_exception(copy(error))
