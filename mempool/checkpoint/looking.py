"""Looking at checkpoints: which there are, what one has, whether each byte is as it was written. Loads no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mempool.checkpoint.commit import missing_files, names, read_manifest
from mempool.checkpoint.format.layout import live_bytes, places
from mempool.checkpoint.format.manifest import Manifest, TableState
from mempool.checkpoint.format.pages import CHECKSUM_BYTES, Batch, PageArray, Piece, arrays_of, blocks_of, wrong_pages
from mempool.checkpoint.format.schema_json import schema_json
from mempool.checkpoint.stores import Store
from mempool.errors import DataLoss, MempoolError

_READ_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something of a checkpoint that is not as it was written. offset, length: None for a whole file."""

    file: str
    offset: int | None
    length: int | None
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What ``verify`` found. pages: Parts of pages (one array of one page each) that were read."""

    name: str
    files: int
    pages: int
    num_bytes: int
    damages: tuple[Damage, ...]


def checkpoints(store: Store) -> list[dict[str, Any]]:
    """Every checkpoint of a place, oldest first, as plain data; of one that cannot be read: its name and "problem"."""
    return [_summary(store, name) for name in names(store.list())]


def inspect(store: Store, name: str | None = None) -> dict[str, Any]:
    """What a checkpoint has, as plain data. Raises as ``read_manifest``."""
    manifest = read_manifest(store, name)
    return {
        **_described(manifest),
        "written_by": manifest.written_by,
        "extra": dict(manifest.extra),
        "problems": missing_files(store, manifest),
        "tables": [_table(name, table) for name, table in manifest.tables.items()],
    }


def verify(store: Store, name: str | None = None, *, progress: Callable[[int, int], None] | None = None) -> Verified:
    """Read all of a checkpoint and check it.

    Args:
        store: The place.
        name: The checkpoint; None for the newest.
        progress: Told the bytes read so far, and all there are.

    Raises:
        NotFound, DataLoss, InvalidRequest: The manifest cannot be read.
    """
    manifest = read_manifest(store, name)
    total = sum(file.size for file in manifest.files.values())
    found: list[Damage] = []
    pages = num_bytes = 0
    for path, file in manifest.files.items():
        whole = Piece(offset=0, checksums=file.header_checksum.to_bytes(CHECKSUM_BYTES))
        found += _damages(store, path, [(whole, file.header_bytes, "its header")])
        num_bytes += file.header_bytes
        for table in manifest.tables.values():
            for batch in table.batches:
                if batch.file == path:
                    pieces = list(_pieces(table, batch))
                    found += _damages(store, path, pieces)
                    pages += sum(len(piece.checksums) // CHECKSUM_BYTES for piece, _, _ in pieces)
                    num_bytes += sum(size * len(piece.checksums) // CHECKSUM_BYTES for piece, size, _ in pieces)
                    if progress is not None:
                        progress(num_bytes, total)
    return Verified(
        name=manifest.name, files=len(manifest.files), pages=pages, num_bytes=num_bytes, damages=tuple(found)
    )


def _pieces(table: TableState, batch: Batch) -> Iterator[tuple[Piece, int, str]]:
    """Every piece of a batch with the bytes of one of its pages, and what it is."""
    for array in arrays_of(table.arrays, batch):
        blocks = (0,) if array.per == "head" else blocks_of(array, batch.blocks)
        for block, piece in zip(blocks, batch.tensors[array.name], strict=True):
            yield piece, array.page_bytes(table.schema, block), _what(table, array, block)


def _what(table: TableState, array: PageArray, block: int) -> str:
    where = "" if array.per == "head" else f", block {block}"
    return f"{array.name!r} of table {table.schema.name!r}{where}"


def _damages(store: Store, path: str, pieces: list[tuple[Piece, int, str]]) -> Iterator[Damage]:
    for piece, size, what in pieces:
        count = len(piece.checksums) // CHECKSUM_BYTES
        at_once = max(1, _READ_BYTES // max(1, size))
        for first in range(0, count, at_once):
            checksums = piece.checksums[CHECKSUM_BYTES * first : CHECKSUM_BYTES * (first + at_once)]
            buffer = bytearray(len(checksums) // CHECKSUM_BYTES * size)
            offset = piece.offset + first * size
            try:
                store.read_into(path, offset, memoryview(buffer))
            except DataLoss as error:
                yield Damage(file=path, offset=None, length=None, what=str(error))
                return
            for index in wrong_pages(checksums, memoryview(buffer)):
                yield Damage(file=path, offset=offset + index * size, length=size, what=f"{what}: another checksum")


def _summary(store: Store, name: str) -> dict[str, Any]:
    try:
        return _described(read_manifest(store, name))
    except MempoolError as error:
        return {"name": name, "problem": str(error)}


def _described(manifest: Manifest) -> dict[str, Any]:
    own = f"{manifest.name}/"
    return {
        "name": manifest.name,
        "number": manifest.number,
        "pool": manifest.pool,
        "created": manifest.created,
        "bases": list(manifest.bases),
        "versions": {name: table.version for name, table in manifest.tables.items()},
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files.values()),
        "own_bytes": sum(file.size for path, file in manifest.files.items() if path.startswith(own)),
        "live_bytes": sum(live_bytes(table.schema, table.arrays) for table in manifest.tables.values()),
    }


def _table(name: str, table: TableState) -> dict[str, Any]:
    where = places(table.schema, table.batches)
    return {
        "name": name,
        "version": table.version,
        "step_count": table.step_count,
        "schema": schema_json(table.schema),
        "arrays": [{"name": array.name, "per": array.per, "dtype": array.dtype} for array in table.arrays],
        "pages": int(where.batch.size + where.key_batch.size),
        "bytes": live_bytes(table.schema, table.arrays),
    }
