"""Writing the segments of a journal: one at a time, never gone on with after a write or a sync of it has failed.

Who waits for what, and on which thread, is for ``journal``.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from mempool.errors import StorageFailed
from mempool.journal.files import Bytes, File, Files, join
from mempool.journal.reading import MARK_NAME, NEW, Chain, segment_name
from mempool.journal.records import SEGMENT_BYTES, Owner, RecordHeader, SegmentHeader, pack_mark, sum_of


@dataclass(frozen=True, slots=True)
class Entry:
    """A record that is to be written."""

    number: int
    kind: int
    buffers: Sequence[Bytes]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """A segment that is there: what it is called, its last record, its bytes."""

    path: str
    last: int
    num_bytes: int


class SegmentWriter:
    """The segments of one journal, as one process writes them. A segment that it found is not gone on with.

    After a failed sync the system may take pages for clean that never reached the disk: a second sync would say yes to
    them. So a segment is left as soon as anything of it fails; the next one says how much of it counts.

    Args:
        durable: What was written counts when it is synced: where a write or a sync fails all goes that was not.

    Attributes:
        last: The number of the last record that was written whole.
        synced: The number up to which all is synced.
        num_syncs: How often records were synced.
    """

    def __init__(
        self, files: Files, folder: str, owner: Owner, chain: Chain, *, segment_bytes: int, durable: bool = True
    ) -> None:
        self._files = files
        self._folder = folder
        self._owner = owner
        self._segment_bytes = segment_bytes
        self._durable = durable
        self._older = deque(Written(segment.path, segment.last, segment.num_bytes) for segment in chain.segments)
        self._older_bytes = sum(segment.num_bytes for segment in chain.segments)
        self._sequence = chain.segments[-1].header.sequence if chain.segments else 0
        self._file: File | None = None
        self._mark_file: File | None = None
        self._record_mark = 0
        self._end = chain.segments[-1].num_bytes if chain.segments else 0
        self._synced_end = self._end
        self.last = chain.segments[-1].last if chain.segments else 0
        self.synced = self.last
        self.num_syncs = 0

    @property
    def sequence(self) -> int:
        """Of the newest segment; 0 where there is none."""
        return self._sequence

    @property
    def num_bytes(self) -> int:
        """Of all segments, without what does not count."""
        return self._older_bytes + (self._end if self._file is not None else 0)

    def write(self, entries: Sequence[Entry], *, sync: bool) -> None:
        """Write records, all or none of them. sync: make them, and what was written before, durable.

        Raises:
            StorageFailed: None of them counts, nor, where that is to be durable, what was not synced before; the next
                one is written to a new segment.
        """
        if self._file is None or self._end >= self._segment_bytes:
            self._start(entries[0].number)
        file = self._file
        assert file is not None
        try:
            buffers: list[Bytes] = []
            for entry in entries:
                head = RecordHeader(entry.number, self.synced, entry.num_bytes, entry.kind, sum_of(entry.buffers))
                buffers += (head.pack(self._record_mark), *entry.buffers)
            written = file.write(buffers, self._end)
            if sync:
                file.sync()
            elif self._durable:
                file.begin_sync(self._end, written)
        except Exception:
            self._leave(cut=True)
            raise
        self._end += written
        self.last = entries[-1].number
        if sync:
            self._was_synced()

    def sync(self) -> None:
        """Make durable what was written without. Raises StorageFailed, as ``write``."""
        if self._file is not None and self.synced < self.last:
            try:
                self._file.sync()
            except StorageFailed:
                self._leave(cut=self._durable)
                raise
            self._was_synced()

    def remove_before(self, number: int) -> int:
        """Remove the segments all of whose records come before ``number``; how many bytes that were.

        The oldest goes first, and durably, so that what is left has no gap at any moment. The newest one stays.

        Raises:
            StorageFailed: Some may be gone.
        """
        removed = 0
        while self._older and self._older[0].last < number and (len(self._older) > 1 or self._file is not None):
            self._files.remove(self._older[0].path)
            gone = self._older.popleft()
            removed += gone.num_bytes
            self._older_bytes -= gone.num_bytes
            self._files.sync_folder(self._folder)
        return removed

    def close(self) -> None:
        """Leave the newest segment as it is. Raises StorageFailed where what was written is not durable."""
        try:
            self.sync()
            if self._mark_file is not None:
                self._mark_file.sync()
        finally:
            self._leave(cut=False)
            if self._mark_file is not None:
                with suppress(StorageFailed):
                    self._mark_file.close()

    def _was_synced(self) -> None:
        """Say so in a file of its own, before anybody is told: it tells damage of the last records from a torn tail.

        It is not synced: a killed process leaves it as it is, and after a power cut an older one only says less.
        """
        self.synced, self._synced_end = self.last, self._end
        self.num_syncs += 1
        with suppress(StorageFailed):  # the records are durable without it
            if self._mark_file is None:
                self._mark_file = self._files.open(join(self._folder, MARK_NAME))
            self._mark_file.write([pack_mark(self.synced, self._owner.shard)], 0)

    def _start(self, first: int) -> None:
        """Begin a segment: made aside, whole and durable before it gets its name, and that before any record."""
        self.sync()
        if self._file is not None:
            self._leave(cut=False)
        header = SegmentHeader(self._owner, self._sequence + 1, first, self.last, self._end)
        path = join(self._folder, segment_name(header.sequence))
        packed = header.pack()
        file = None
        try:
            file = self._files.open(path + NEW, new=True)
            file.write([packed], 0)
            file.sync()
            self._files.rename(path + NEW, path)
            file.path = path
            self._files.sync_folder(self._folder)
        except StorageFailed:
            # If it has its name, it has no record, and the next try takes its place.
            if file is not None:
                with suppress(StorageFailed):
                    file.close()
                with suppress(StorageFailed):
                    self._files.remove(path + NEW)
            raise
        self._file, self._sequence = file, header.sequence
        self._record_mark, self._end, self._synced_end = header.mark, SEGMENT_BYTES, SEGMENT_BYTES

    def _leave(self, *, cut: bool) -> None:
        """Write no more to the newest segment. cut: take away what does not count, if that can be done."""
        file, self._file = self._file, None
        if file is None:
            return
        if cut and self._durable:
            self.last, self._end = self.synced, self._synced_end
        path = join(self._folder, segment_name(self._sequence))
        self._older.append(Written(path, self.last, self._end))
        self._older_bytes += self._end
        with suppress(StorageFailed):
            if cut:
                file.truncate(self._end)
        with suppress(StorageFailed):
            file.close()
