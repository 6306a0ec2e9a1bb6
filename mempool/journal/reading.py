"""Reading a journal strictly: all that was acknowledged, in its order, or an error that names file and offset.

A tail that was being written when the power went is told from damage by what says that it was synced: a later record,
a later segment, or the file of the mark. Only a tail of which nothing says so is cut off.
"""

import re
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import pairwise

from mempool.errors import ConfigError, DataLoss
from mempool.journal.files import File, Files, join
from mempool.journal.records import (
    MARK_BYTES,
    RECORD_BYTES,
    RESTORE,
    SEGMENT_BYTES,
    Damaged,
    Owner,
    SegmentHeader,
    lost,
    mark_bytes,
    sum_of,
    unpack_mark,
    unpack_record,
    unpack_segment,
)

MARK_NAME = "synced"
NEW = ".new"
"""Ends the name of what is not whole yet."""
_SEGMENT_NAME = re.compile(r"(\d{12})\.segment")
_CHUNK_BYTES = 8 * 2**20
"""Read at once. Records are handed out as views of it."""


def segment_name(sequence: int) -> str:
    """What the file of a segment is called."""
    return f"{sequence:012d}.segment"


@dataclass(frozen=True, slots=True)
class Record:
    """One record, as it was appended.

    Attributes:
        payload: A view: its buffers one behind the other.
    """

    number: int
    kind: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Torn:
    """A tail that was cut off: it was being written when the process or the machine died, and not acknowledged.

    Attributes:
        offset: Where it began.
        why: What shows that it is not whole.
    """

    path: str
    offset: int
    num_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment that was written.

    Attributes:
        last: The number of its last record that counts; ``header.previous_last`` where it has none.
        num_bytes: How much of the file counts.
    """

    path: str
    header: SegmentHeader
    last: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Chain:
    """The segments of a journal, without a gap.

    Attributes:
        unsure: From which byte on nothing says of the newest segment's records that they were synced.
        torn: What lies behind the newest segment's last record.
        has_mark: The file of the mark is there.
        leftovers: Paths of files that never became segments.
    """

    segments: list[Segment]
    unsure: int
    torn: Torn | None
    has_mark: bool
    leftovers: list[str]


def read_chain(files: Files, folder: str, owner: Owner) -> Chain:
    """Find the segments of a folder and where the newest one ends. Changes nothing.

    Raises:
        DataLoss: Something that was acknowledged is damaged or missing; file and offset are named.
        ConfigError: These are another pool's or shard's segments, or of a newer format.
    """
    names = files.names(folder)
    found = [(int(match[1]), name) for name in names if (match := _SEGMENT_NAME.fullmatch(name))]
    marked = _read_mark(files, folder) if MARK_NAME in names else 0
    headers: list[tuple[str, SegmentHeader, int]] = []
    for sequence, name in found:
        if headers and sequence != headers[-1][1].sequence + 1:
            missing = join(folder, segment_name(headers[-1][1].sequence + 1))
            raise DataLoss(f"{missing} is missing, and later segments of this journal are there. {RESTORE}.")
        headers.append(_read_header(files, join(folder, name), owner, sequence))
    segments = []
    for (path, header, size), (_, later, _) in pairwise(headers):
        if size < later.previous_bytes:
            raise lost(path, size, f"it ends here, and had {later.previous_bytes:,} bytes")
        segments.append(Segment(path, header, later.previous_last, later.previous_bytes))
    torn, unsure = None, 0
    if headers:
        newest, unsure, torn = _find_end(files, *headers[-1], marked)
        segments.append(newest)
        marked = max(marked, newest.header.previous_last)
    last = segments[-1].last if segments else 0
    if last < marked:
        raise lost(
            segments[-1].path if segments else join(folder, segment_name(1)),
            segments[-1].num_bytes if segments else 0,
            f"records {last + 1} to {marked} were synced (says {join(folder, MARK_NAME)}) and are missing",
        )
    leftovers = [join(folder, name) for name in names if name.endswith(NEW)]
    return Chain(segments, unsure, torn, MARK_NAME in names, leftovers)


def read_records(files: Files, chain: Chain, *, after: int) -> Iterator[Record]:
    """The records behind number ``after``, in order.

    Raises:
        DataLoss: They do not reach back so far, or one of them is damaged.
    """
    segments = [segment for segment in chain.segments if segment.last > after]
    if segments and segments[0].header.previous_last > after:
        raise DataLoss(
            f"{segments[0].path} begins with record {segments[0].header.first}, and what comes after {after} is "
            f"wanted: a segment before it is missing, or the snapshot is older than this journal. {RESTORE}."
        )
    for segment in segments:
        with closing(files.open(segment.path)) as file:
            number = segment.header.previous_last
            try:
                for _, record in _scan(file, segment.header, segment.num_bytes):
                    number = record.number
                    if number > after:
                        yield record
            except _Bad as bad:
                raise lost(segment.path, bad.offset, bad.why) from None
            if number != segment.last:
                raise lost(
                    segment.path, segment.num_bytes, f"record {number} is the last, and {segment.last} should be"
                )


class _Bad(Exception):
    """No whole record begins at ``offset``, where number ``number`` should."""

    def __init__(self, offset: int, number: int, why: str) -> None:
        super().__init__(why)
        self.offset, self.number, self.why = offset, number, why


def _scan(file: File, header: SegmentHeader, size: int) -> Iterator[tuple[int, Record]]:
    """The records up to byte ``size``, each with where it ends. Raises _Bad."""
    at, number, mark = SEGMENT_BYTES, header.first, header.mark
    chunk, begin = memoryview(b""), at

    def wanted(num_bytes: int) -> int:
        """Where in the chunk byte ``at`` is; the chunk has so many bytes from there, unless the file ends before."""
        nonlocal chunk, begin
        if at + num_bytes > begin + len(chunk):
            chunk, begin = memoryview(file.read(at, min(max(num_bytes, _CHUNK_BYTES), size - at))), at
        if at + num_bytes > begin + len(chunk):
            raise _Bad(at, number, f"record {number} is cut off after {begin + len(chunk) - at} of {num_bytes:,} bytes")
        return at - begin

    while at < size:
        try:
            place = wanted(RECORD_BYTES)
            head = unpack_record(chunk, place, mark)
            if head.number != number:
                raise Damaged(f"it has number {head.number}")
            place = wanted(RECORD_BYTES + head.num_bytes) + RECORD_BYTES
            payload = chunk[place : place + head.num_bytes]
            if sum_of((payload,)) != head.payload_sum:
                raise Damaged("the payload's checksum is wrong")
        except Damaged as damage:
            raise _Bad(at, number, f"record {number} is not whole: {damage}") from None
        at += RECORD_BYTES + head.num_bytes
        yield at, Record(number, head.kind, payload)
        number += 1


def _find_end(
    files: Files, path: str, header: SegmentHeader, size: int, marked: int
) -> tuple[Segment, int, Torn | None]:
    """The newest segment up to its last whole record, where records begin that are not marked, and what is behind."""
    end, last, unsure, torn = SEGMENT_BYTES, header.previous_last, SEGMENT_BYTES, None
    with closing(files.open(path)) as file:
        try:
            for end, record in _scan(file, header, size):
                last = record.number
                unsure = end if last <= marked else unsure
        except _Bad as bad:
            synced = max(marked, _synced_behind(file, header.mark, bad.offset, size))
            if bad.number <= synced:
                raise lost(path, bad.offset, f"{bad.why}, and records up to {synced} were synced") from None
            torn = Torn(path, bad.offset, size - bad.offset, bad.why)
    return Segment(path, header, last, end), unsure, torn


def _synced_behind(file: File, mark: int, at: int, size: int) -> int:
    """The highest number that any whole header from byte ``at`` on says was synced; 0 for none."""
    pattern, highest = mark_bytes(mark), 0
    while at < size:
        chunk = file.read(at, min(_CHUNK_BYTES, size - at))
        place = chunk.find(pattern)
        while 0 <= place <= len(chunk) - RECORD_BYTES:
            with suppress(Damaged):
                highest = max(highest, unpack_record(chunk, place, mark).synced)
            place = chunk.find(pattern, place + 1)
        if at + len(chunk) >= size or len(chunk) < RECORD_BYTES:
            break
        at += len(chunk) - RECORD_BYTES + 1
    return highest


def _read_header(files: Files, path: str, owner: Owner, sequence: int) -> tuple[str, SegmentHeader, int]:
    with closing(files.open(path)) as file:
        try:
            header = unpack_segment(file.read(0, SEGMENT_BYTES), owner, path)
        except Damaged as damage:
            raise lost(path, 0, str(damage)) from None
        if header.sequence != sequence:
            raise ConfigError(f"{path} is segment {header.sequence}: it was renamed. Give it its own name back.")
        return path, header, file.size()


def _read_mark(files: Files, folder: str) -> int:
    with closing(files.open(join(folder, MARK_NAME))) as file:
        return unpack_mark(file.read(0, MARK_BYTES))
