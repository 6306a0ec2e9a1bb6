"""How a journal's bytes are laid out: the header of a segment, of a record, and the mark of what is synced.

docs/storage.md says it byte by byte. All numbers are little-endian; every checksum is XXH3 of 64 bits, seed 0.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from mempool.errors import ConfigError, DataLoss
from mempool.journal.files import Bytes

VERSION = 1
"""Of everything in a shard's folder. What a higher one wrote is refused."""

_SEGMENT = struct.Struct("<8sII16sQQQQ")
_SEGMENT_MAGIC = b"MPSEGMNT"
_RECORD = struct.Struct("<QQQIHHQ")
_MARK = struct.Struct("<8sIIQ")
_MARK_MAGIC = b"MPSYNCED"
_SUM = struct.Struct("<Q")

SEGMENT_BYTES = _SEGMENT.size + _SUM.size
RECORD_BYTES = _RECORD.size + _SUM.size
MARK_BYTES = _MARK.size + _SUM.size
MOST_PAYLOAD_BYTES = 2**30
"""Of one record."""


class Damaged(Exception):
    """These bytes are not what was written; the text says what shows it."""


RESTORE = "Restore the pool from a checkpoint, or this file from a copy"


def lost(path: str, offset: int, why: str) -> DataLoss:
    """What is stored there is damaged, and will be read as no data."""
    return DataLoss(f"{path} is damaged at byte {offset:,}: {why}. Nothing of it was read as data. {RESTORE}.")


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose files these are.

    Attributes:
        pool_id: Of the pool; two pools of one name have two.
    """

    pool_id: str
    shard: int

    @property
    def digest(self) -> bytes:
        """[16] bytes that stand for the pool's id."""
        return xxhash.xxh3_128_digest(self.pool_id.encode())


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """The beginning of a segment.

    Attributes:
        sequence: Of the segments of a journal, from 1 on, each one more than the one before.
        first: The number of its first record.
        previous_last: The number of the last record that counts before it; 0 for none.
        previous_bytes: How much of the segment before it counts; what lies behind was never acknowledged.
    """

    owner: Owner
    sequence: int
    first: int
    previous_last: int
    previous_bytes: int

    def pack(self) -> bytes:
        """[SEGMENT_BYTES]"""
        packed = _SEGMENT.pack(
            _SEGMENT_MAGIC,
            VERSION,
            self.owner.shard,
            self.owner.digest,
            self.sequence,
            self.first,
            self.previous_last,
            self.previous_bytes,
        )
        return packed + _SUM.pack(xxhash.xxh3_64_intdigest(packed))

    @property
    def mark(self) -> int:
        """What each of its records begins with, so that none of another segment is taken for one: its checksum."""
        return int(_SUM.unpack_from(self.pack(), _SEGMENT.size)[0])


def unpack_segment(data: bytes, owner: Owner, path: str) -> SegmentHeader:
    """The header of a segment of this owner.

    Raises:
        Damaged: It is none.
        ConfigError: It is another shard's or pool's, or of a newer format.
    """
    if len(data) < SEGMENT_BYTES:
        raise Damaged(f"the header of {SEGMENT_BYTES} bytes is cut off after {len(data)}")
    magic, version, shard, digest, *numbers = _SEGMENT.unpack_from(data)
    if magic != _SEGMENT_MAGIC:
        raise Damaged(f"it begins with {magic!r}, and not with {_SEGMENT_MAGIC!r}")
    _same_sum(data[: _SEGMENT.size], data[_SEGMENT.size : SEGMENT_BYTES], "the header's")
    check_version(version, path)
    if (shard, digest) != (owner.shard, owner.digest):
        raise ConfigError(
            f"{path} is a segment of {'another pool' if digest != owner.digest else f'shard {shard}'}, and lies in the "
            f"folder of shard {owner.shard} of pool {owner.pool_id!r}. Move it back to where it came from."
        )
    return SegmentHeader(owner, *numbers)


def check_version(version: int, path: str) -> None:
    """Raises ConfigError where this mempool cannot read it."""
    if version != VERSION:
        raise ConfigError(
            f"{path} is of format version {version}, and this mempool reads {VERSION}: a newer mempool wrote it. "
            "Use that one, or another path (shard.storage.path, or mempool.local's). Nothing was changed."
        )


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What stands before a record's payload.

    Attributes:
        number: Of the record; in a segment each one more than the one before.
        synced: The number up to which all was synced when this one was written.
        num_bytes: Of the payload.
        kind: What the payload is; the user's own.
        payload_sum: The payload's checksum.
    """

    number: int
    synced: int
    num_bytes: int
    kind: int
    payload_sum: int

    def pack(self, mark: int) -> bytes:
        """[RECORD_BYTES]. mark: the segment's."""
        packed = _RECORD.pack(mark, self.number, self.synced, self.num_bytes, self.kind, 0, self.payload_sum)
        return packed + _SUM.pack(xxhash.xxh3_64_intdigest(packed))


def unpack_record(data: Bytes, at: int, mark: int) -> RecordHeader:
    """The header at byte ``at`` of ``data``. Raises Damaged where it is none of this segment's."""
    found, number, synced, num_bytes, kind, _, payload_sum = _RECORD.unpack_from(data, at)
    if found != mark:
        raise Damaged("no record begins here")
    head = memoryview(data)[at : at + RECORD_BYTES]
    _same_sum(head[: _RECORD.size], head[_RECORD.size :], "a record's header's")
    return RecordHeader(number, synced, num_bytes, kind, payload_sum)


def mark_bytes(mark: int) -> bytes:
    """As it stands before each record."""
    return _SUM.pack(mark)


def sum_of(buffers: Sequence[Bytes]) -> int:
    """The checksum of buffers as if they lay one behind the other."""
    if len(buffers) == 1:
        return xxhash.xxh3_64_intdigest(buffers[0])
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest()


def pack_mark(number: int, shard: int) -> bytes:
    """[MARK_BYTES], which say that all records up to ``number`` were synced."""
    packed = _MARK.pack(_MARK_MAGIC, VERSION, shard, number)
    return packed + _SUM.pack(xxhash.xxh3_64_intdigest(packed))


def unpack_mark(data: bytes) -> int:
    """The number of ``pack_mark``; 0 where it is none: it says nothing then."""
    if len(data) != MARK_BYTES:
        return 0
    magic, _, _, number = _MARK.unpack_from(data)
    known = magic == _MARK_MAGIC and _SUM.unpack_from(data, _MARK.size)[0] == xxhash.xxh3_64_intdigest(
        data[: _MARK.size]
    )
    return int(number) if known else 0


def _same_sum(data: Bytes, stored: Bytes, whose: str) -> None:
    if _SUM.unpack(stored)[0] != xxhash.xxh3_64_intdigest(data):
        raise Damaged(f"{whose} checksum is wrong")
