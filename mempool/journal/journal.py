"""The journal of a shard: what is appended is durable before whoever waits for it is told; one sync for all who wait.

What records mean, and when they may go, is for others.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from copy import copy
from typing import Literal

from mempool.errors import DataLoss, Internal, InvalidRequest, MempoolError, Overloaded, RequestTooLarge, StorageFailed
from mempool.journal.files import Bytes, Files, join, views_of
from mempool.journal.reading import MARK_NAME, Record, Torn, read_chain, read_records
from mempool.journal.records import MOST_PAYLOAD_BYTES, RECORD_BYTES, Owner, pack_mark
from mempool.journal.writing import Entry, SegmentWriter
from mempool.types.running import ONLY_WHEN_RUNG, THREADS, Runner

Sync = Literal["commit", "off"]
"""commit: records are durable before anybody is told. off: they are written: a killed process loses none of them, a
power cut may lose those of the newest segment."""

SEGMENT_BYTES = 64 * 2**20
MOST_WAITING_BYTES = 256 * 2**20
_MOST_GATHERING_BYTES = 4 * 2**20
"""What nobody has rung for is written all the same when there is so much of it."""
_RETRY_AFTER_S = 0.05
_MOST_FAILURES = 1024
"""Runs of numbers that were not written, as they are remembered."""


class Journal:
    """Appends records, and reads those of an earlier life.

    A record's number is its own for ever: where writing fails, numbers are left out. What fails then is everything that
    is not synced yet, also what waits behind: it may build on what was not written. The journal itself goes on with
    what is appended after that; what failed can be appended again.

    The life of a record, in [CALLER]'s thread and in that of the journal's [WORKER]:

        [CALLER]  append gives it a number and leaves it in the batch that gathers; rings
        [WORKER]  a turn takes that batch: one write of all its buffers, one sync, the mark
        [WORKER]  the batch's future ends; meanwhile the next batch gathers

    A batch that nobody waits for (``wait=False``) is only written, and on its way to the disk: its future ends with
    that of the next one that is synced.

    Args:
        folder: The journal's own folder; it is there.
        owner: Whose records these are.
        runner: Where it writes.
        sync: When records are durable.
        after: The number of a record (``last`` as it was then) up to which the caller has all from elsewhere, as in a
            snapshot: new ones come behind it.
        segment_bytes: A segment that has so many is followed by another.
        most_waiting_bytes: What waits to be written, at most; more than that is refused.

    Attributes:
        torn: What was cut off at the end, where there was anything.

    Raises:
        DataLoss: What is there is damaged; nothing was changed.
        ConfigError: It is another shard's or pool's, or of a newer format; nothing was changed.
        StorageFailed: It cannot be read, or its torn tail not be cut off.
    """

    def __init__(
        self,
        files: Files,
        folder: str,
        *,
        owner: Owner,
        runner: Runner = THREADS,
        sync: Sync = "commit",
        after: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
        most_waiting_bytes: int = MOST_WAITING_BYTES,
    ) -> None:
        self._files = files
        self._chain = read_chain(files, folder, owner)
        self._sync = sync
        self._most_waiting_bytes = most_waiting_bytes
        self.torn: Torn | None = self._chain.torn
        last = self._chain.segments[-1].last if self._chain.segments else 0
        if last < after and sync == "commit":
            raise DataLoss(
                f"{folder} ends with record {last}, and what was made of records up to {after} is there: its segments "
                "are missing. Restore the pool from a checkpoint, or that folder from a copy. Nothing was changed."
            )
        self._tidy(folder, owner)
        durable = sync == "commit"
        self._writer = SegmentWriter(files, folder, owner, self._chain, segment_bytes=segment_bytes, durable=durable)
        self._lock = threading.Lock()
        self._next = max(last, after) + 1
        self._gathering = _Batch(self._next)
        self._writing: _Batch | None = None
        self._unsynced: list[_Batch] = []  # written, in order
        self._known_from = 0
        self._failures: deque[_Failure] = deque()
        self._num_failures = 0
        self._removals: list[tuple[int, Future[int]]] = []
        self._closing = False
        self._closed: MempoolError | None = None
        self._worker = runner.worker(self._turn, name="mempool-journal")

    @property
    def next_number(self) -> int:
        """The number of the record that is appended next."""
        return self._next

    @property
    def last(self) -> int:
        """The number of the last record that is written, and with sync on durable; 0 for none. What failed has none."""
        return self._writer.synced if self._sync == "commit" else self._writer.last

    @property
    def next_sequence(self) -> int:
        """Of the next segment that is begun: higher than those of all lives before."""
        return self._writer.sequence + 1

    @property
    def num_bytes(self) -> int:
        """Of all segments."""
        return self._writer.num_bytes

    @property
    def num_syncs(self) -> int:
        """How often records were synced since it was opened."""
        return self._writer.num_syncs

    @property
    def num_failures(self) -> int:
        """How often writing has failed since it was opened: all that waited then was left out."""
        with self._lock:
            return self._num_failures

    @property
    def waiting_bytes(self) -> int:
        """Of what was appended and is not written yet."""
        with self._lock:
            return self._waiting_bytes()

    def records(self, *, after: int = 0) -> Iterator[Record]:
        """What earlier lives appended behind number ``after``, in order. Payloads are views.

        Raises:
            DataLoss: One of them is damaged, or they do not reach back so far.
        """
        return read_records(self._files, self._chain, after=after)

    def append(
        self, kind: int, buffers: Sequence[Bytes], *, ring: bool = True, wait: bool = True, since: int | None = None
    ) -> int:
        """Leave a record to be written; its number. Returns at once. From any thread.

        Args:
            kind: What it is: 0 to 65,535, the caller's own.
            buffers: The payload, in parts. They are written as they lie: nobody changes them before it is synced.
            ring: Have it written at once; else with the next one that is, or when much has gathered.
            wait: Somebody waits for it, so it is synced when it is written; else with the next one that is.
            since: It builds on what was appended while ``num_failures`` was that.

        Raises:
            Overloaded: Too much waits to be written.
            RequestTooLarge: It is larger than a record may be.
            StorageFailed: The journal is closed; or it builds on what could not be written.
        """
        parts = views_of(buffers)
        num_bytes = sum(view.nbytes for view in parts)
        if num_bytes > MOST_PAYLOAD_BYTES:
            raise RequestTooLarge(
                f"a record of {num_bytes:,} bytes is larger than a journal's may be ({MOST_PAYLOAD_BYTES:,})"
            )
        if not 0 <= kind < 2**16:
            raise InvalidRequest(f"a record's kind is 0 to 65,535, and not {kind}")
        with self._lock:
            self._check_open()
            if since not in (None, self._num_failures):
                raise copy(self._failures[-1].error)
            gathering, waiting, number = self._gathering, self._waiting_bytes(), self._next
            refused = waiting > 0 and waiting + num_bytes + RECORD_BYTES > self._most_waiting_bytes
            if not refused:
                self._next += 1
                gathering.entries.append(Entry(number, kind, parts, num_bytes))
                gathering.num_bytes += num_bytes + RECORD_BYTES
                gathering.waited_for |= ring and wait
            # What stands in the way, or is much, may be what nobody waits for: it would lie there for ever.
            ring = ring or refused or gathering.num_bytes > _MOST_GATHERING_BYTES
            rings, gathering.rung = ring and not gathering.rung, gathering.rung or ring
        if rings:
            self._worker.ring()
        if refused:
            raise Overloaded(
                f"{waiting:,} bytes wait to be written to the journal, and {self._most_waiting_bytes:,} may: "
                "the disk is slower than what comes in. Nothing was changed; try again.",
                retry_after_s=_RETRY_AFTER_S,
            )
        return number

    def when_synced(self, number: int) -> "Future[None]":
        """Ends when this record and all before it are durable; with sync off, when they are written.

        Many share one future, and nobody can cancel it: ``asyncio.wrap_future`` gives one of one's own.

        Raises:
            InvalidRequest: There is no such record, or it is not known any more whether it was written.
        """
        with self._lock:
            if not self._known_from <= number < self._next:
                raise InvalidRequest(
                    f"record {number} is not known to the journal, which knows those from {self._known_from} "
                    f"to {self._next - 1}"
                )
            if number >= self._gathering.first:
                return self._gathering.done
            for batch in (self._writing, *reversed(self._unsynced)):
                if batch is not None and number >= batch.first:
                    return batch.done
            failure = next((one for one in self._failures if one.first <= number <= one.last), None)
        done: Future[None] = Future()
        if failure is None:
            done.set_result(None)
        else:
            done.set_exception(copy(failure.error))
        return done

    def remove_before(self, number: int) -> "Future[int]":
        """Remove the segments that have no record from ``number`` on; ends with how many bytes that were.

        Raises:
            StorageFailed: The journal is closed.
        """
        done: Future[int] = Future()
        done.set_running_or_notify_cancel()
        with self._lock:
            self._check_open()
            self._removals.append((number, done))
        self._worker.ring()
        return done

    async def close(self) -> None:
        """Write what waits, and end. Idempotent.

        Raises:
            StorageFailed: What was written last may not be durable.
        """
        with self._lock:
            self._closing = True
        self._worker.ring()
        await self._worker.join()
        if self._closed is not None:
            raise self._closed

    def _turn(self) -> float | None:
        """[WORKER] Write what has gathered."""
        with self._lock:
            batch, self._writing = self._gathering, self._gathering
            self._gathering = _Batch(self._next)
            removals, self._removals = self._removals, []
            closing_now = self._closing
        durable = self._sync == "commit"
        try:
            if batch.entries:
                self._writer.write(batch.entries, sync=durable and batch.waited_for)
        except MempoolError as error:
            self._failed(batch, error)
        except Exception as error:
            self._failed(batch, Internal(f"the journal could not write: {type(error).__name__}: {error}"))
        else:
            self._wrote(batch, durable=durable)
        for number, done in removals:
            try:
                done.set_result(self._writer.remove_before(number))
            except Exception as error:
                done.set_exception(error)
        if not closing_now:
            return ONLY_WHEN_RUNG
        try:
            self._writer.close()
        except MempoolError as error:
            self._closed = error
            self._failed(_Batch(self._next), error)
        else:
            self._end_unsynced()
        return None

    def _wrote(self, batch: "_Batch", *, durable: bool) -> None:
        """[WORKER] Whoever waits for what is durable by now is told."""
        unsynced = durable and self._writer.synced < self._writer.last
        with self._lock:
            self._writing = None
            if unsynced:
                # A new segment is begun with all of the one before synced.
                ended = [one for one in self._unsynced if one.last <= self._writer.synced]
                self._unsynced = [one for one in self._unsynced if one.last > self._writer.synced]
                if batch.entries:
                    self._unsynced.append(batch)
        if not unsynced:
            self._end_unsynced()
            batch.done.set_result(None)
            return
        for one in ended:
            one.done.set_result(None)
        if not batch.entries:
            batch.done.set_result(None)

    def _end_unsynced(self) -> None:
        with self._lock:
            ended, self._unsynced = self._unsynced, []
        for one in ended:
            one.done.set_result(None)

    def _failed(self, batch: "_Batch", error: MempoolError) -> None:
        """Tell all who wait, and those behind them. Their numbers are left out."""
        with self._lock:
            before = [one for one in self._unsynced if one.last > self._writer.synced]
            synced = [one for one in self._unsynced if one.last <= self._writer.synced]
            behind, self._gathering, self._writing, self._unsynced = self._gathering, _Batch(self._next), None, []
            first = before[0].first if before else batch.first
            self._num_failures += 1
            if self._failures and self._failures[-1].last + 1 == first:
                first = self._failures.pop().first
            # A copy has no traceback, which would keep what was to be written.
            self._failures.append(_Failure(first, self._next - 1, copy(error)))
            if len(self._failures) > _MOST_FAILURES:
                self._known_from = self._failures.popleft().last + 1
        for one in synced:
            one.done.set_result(None)
        for one in (*before, batch, behind):
            one.done.set_exception(error)

    def _waiting_bytes(self) -> int:
        return self._gathering.num_bytes + (self._writing.num_bytes if self._writing is not None else 0)

    def _check_open(self) -> None:
        if self._closing:
            raise StorageFailed("the journal is closed: nothing is written any more")

    def _tidy(self, folder: str, owner: Owner) -> None:
        """Take away what is no record, and make durable what is one: nothing new may outlive what it stands on."""
        if self._chain.segments:
            newest, unsure = self._chain.segments[-1], self._chain.unsure
            with closing(self._files.open(newest.path)) as file:
                if self.torn is not None:
                    file.truncate(self.torn.offset)
                # Written again: after a sync that failed in an earlier life, the system may take pages for clean that
                # never reached the disk.
                file.write([file.read(unsure, newest.num_bytes - unsure)], unsure)
                file.sync()
        if not self._chain.has_mark:
            with closing(self._files.open(join(folder, MARK_NAME), new=True)) as file:
                file.write([pack_mark(0, owner.shard)], 0)
        for path in self._chain.leftovers:
            with suppress(StorageFailed):
                self._files.remove(path)


class _Batch:
    """Records that are written and synced together.

    Attributes:
        first: The number of its first record, once it has one.
        rung: It is on its way to be written.
        waited_for: It is to be synced, too.
        done: Ends for all of them at once.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.entries: list[Entry] = []
        self.num_bytes = 0
        self.rung = self.waited_for = False
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()

    @property
    def last(self) -> int:
        """The number of its last record; one less than its first where it has none."""
        return self.first + len(self.entries) - 1


class _Failure:
    """Records first to last were not written, and why."""

    def __init__(self, first: int, last: int, error: MempoolError) -> None:
        self.first, self.last, self.error = first, last, error
