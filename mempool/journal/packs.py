"""How a snapshot's bytes are laid out: packs of pages, and the manifest that says where each page lies.

docs/storage.md says it byte by byte. All numbers are little-endian; every checksum is XXH3 of 64 bits, seed 0.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from mempool.errors import ConfigError
from mempool.journal.files import Bytes
from mempool.journal.records import VERSION, Damaged, Owner, check_version

ALIGN_BYTES = 64
"""Where arrays begin, so that they can be used as they lie."""

_PACK = struct.Struct("<8sII16sQ")
_PACK_MAGIC = b"MPPAGES\0"
_MANIFEST = struct.Struct("<8sII16sQQQQ")
_MANIFEST_MAGIC = b"MPMANIF\0"
_PAGE = struct.Struct("<HHI")
_ARRAY = struct.Struct("<HQ")
_PLACE = struct.Struct("<HQQQQ")
_SUM = struct.Struct("<Q")

PACK_BYTES = ALIGN_BYTES
"""Of a pack's header, with what fills it up."""
MOST_NAME_BYTES = 1024
"""Of a page's key, and of an array's name."""
_MOST_ARRAYS = 2**16 - 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page lies.

    Attributes:
        pack: The sequence number of the pack.
        offset, num_bytes: Of the page in it, names and all.
        checksum: Of those bytes.
    """

    pack: int
    offset: int
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole snapshot.

    Attributes:
        sequence: Of the snapshots of a shard, from 1 on; the highest one counts.
        after: The number of the journal's record up to which all is in it.
        head: What else is to be known; the caller's.
        pages: Page -> where it lies; in the order that they were given in.
    """

    sequence: int
    after: int
    head: bytes
    pages: Mapping[bytes, Place]


def pack_header(owner: Owner, sequence: int) -> bytes:
    """[PACK_BYTES]"""
    packed = _PACK.pack(_PACK_MAGIC, VERSION, owner.shard, owner.digest, sequence)
    packed += _SUM.pack(xxhash.xxh3_64_intdigest(packed))
    return packed.ljust(PACK_BYTES, b"\0")


def check_pack_header(data: bytes, owner: Owner, sequence: int, path: str) -> None:
    """Raises Damaged, or ConfigError where it is another's, or of a newer format."""
    if len(data) < PACK_BYTES:
        raise Damaged(f"the header of {PACK_BYTES} bytes is cut off after {len(data)}")
    magic, version, shard, digest, found = _PACK.unpack_from(data)
    _check_magic(magic, _PACK_MAGIC)
    _check_sum(data[: _PACK.size], data[_PACK.size :])
    if any(data[_PACK.size + _SUM.size : PACK_BYTES]):
        raise Damaged("what fills up the header is not zero")
    _check_owner(version, shard, digest, owner, path)
    if found != sequence:
        raise Damaged(f"it is pack {found}: it was renamed")


def page_parts(key: bytes, arrays: Sequence[tuple[str, Sequence[Bytes]]]) -> tuple[list[Bytes], int]:
    """A page as it is written, uncopied: its key, its arrays' names and sizes, and their bytes.

    Returns:
        The parts, and how many bytes they have: a multiple of ALIGN_BYTES.
    """
    if len(arrays) > _MOST_ARRAYS:
        raise ValueError(f"a page has at most {_MOST_ARRAYS:,} arrays, and not {len(arrays):,}")
    said = bytearray(_named(key))
    sizes = []
    for name, buffers in arrays:
        coded = _named(name.encode())
        sizes.append(sum(map(len, buffers)))
        said += _ARRAY.pack(len(coded), sizes[-1]) + coded
    head = _PAGE.pack(len(key), len(arrays), len(said) - len(key)) + said
    parts: list[Bytes] = [head, bytes(-len(head) % ALIGN_BYTES)]
    for size, (_, buffers) in zip(sizes, arrays, strict=True):
        parts += (*buffers, bytes(-size % ALIGN_BYTES))
    return parts, sum(map(len, parts))


def unpack_page(data: memoryview) -> dict[str, memoryview]:
    """The arrays of a page, as views, in their order. The key that it lies under is of no interest: it may be that of
    another one that is the same. Raises Damaged."""
    try:
        key_bytes, num_arrays, said_bytes = _PAGE.unpack_from(data)
        at = _PAGE.size + key_bytes
        place = _aligned(at + said_bytes)
        arrays = {}
        for _ in range(num_arrays):
            name_bytes, size = _ARRAY.unpack_from(data, at)
            at += _ARRAY.size
            name = bytes(data[at : at + name_bytes]).decode()
            at += name_bytes
            arrays[name] = data[place : place + size]
            place = _aligned(place + size)
    except (struct.error, UnicodeDecodeError) as error:
        raise Damaged(f"what it says of its arrays makes no sense: {error}") from None
    if place != len(data):
        raise Damaged(f"its arrays have {place:,} bytes, and it has {len(data):,}")
    return arrays


def pack_manifest(manifest: Manifest, owner: Owner) -> list[bytes]:
    """The file, in parts."""
    head = _MANIFEST.pack(
        _MANIFEST_MAGIC,
        VERSION,
        owner.shard,
        owner.digest,
        manifest.sequence,
        manifest.after,
        len(manifest.head),
        len(manifest.pages),
    )
    pages = b"".join(
        _PLACE.pack(len(key), place.pack, place.offset, place.num_bytes, place.checksum) + key
        for key, place in manifest.pages.items()
    )
    digest = xxhash.xxh3_64()
    for part in (head, manifest.head, pages):
        digest.update(part)
    return [head, manifest.head, pages, _SUM.pack(digest.intdigest())]


def unpack_manifest(data: bytes, owner: Owner, path: str) -> Manifest:
    """Raises Damaged, or ConfigError where it is another's, or of a newer format."""
    if len(data) < _MANIFEST.size + _SUM.size:
        raise Damaged(f"it is cut off after {len(data)} bytes")
    magic, version, shard, digest, sequence, after, head_bytes, num_pages = _MANIFEST.unpack_from(data)
    _check_magic(magic, _MANIFEST_MAGIC)
    _check_sum(memoryview(data)[: -_SUM.size], data[-_SUM.size :])
    _check_owner(version, shard, digest, owner, path)
    at = _MANIFEST.size + head_bytes
    head = data[_MANIFEST.size : at]
    pages = {}
    try:
        for _ in range(num_pages):
            key_bytes, *place = _PLACE.unpack_from(data, at)
            at += _PLACE.size + key_bytes
            pages[data[at - key_bytes : at]] = Place(*place)
    except struct.error:
        raise Damaged(f"it has {len(pages):,} pages, and says {num_pages:,}") from None
    if at != len(data) - _SUM.size or len(pages) != num_pages:
        raise Damaged(f"it ends after {at:,} of {len(data):,} bytes")
    return Manifest(sequence, after, head, pages)


def _named(name: bytes) -> bytes:
    if not 0 < len(name) <= MOST_NAME_BYTES:
        raise ValueError(f"a page's key and an array's name have 1 to {MOST_NAME_BYTES:,} bytes, and not {len(name):,}")
    return name


def _aligned(at: int) -> int:
    return at + -at % ALIGN_BYTES


def _check_magic(found: bytes, magic: bytes) -> None:
    if found != magic:
        raise Damaged(f"it begins with {found!r}, and not with {magic!r}")


def _check_sum(data: Bytes, stored: Bytes) -> None:
    if _SUM.unpack_from(stored)[0] != xxhash.xxh3_64_intdigest(data):
        raise Damaged("its checksum is wrong")


def _check_owner(version: int, shard: int, digest: bytes, owner: Owner, path: str) -> None:
    check_version(version, path)
    if (shard, digest) != (owner.shard, owner.digest):
        raise ConfigError(
            f"{path} is of {'another pool' if digest != owner.digest else f'shard {shard}'}, and lies in the folder of "
            f"shard {owner.shard} of pool {owner.pool_id!r}. Move it back to where it came from."
        )
