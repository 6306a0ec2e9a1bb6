"""Arrays, batches and files as JSON and back: nothing is read from a file at a place that these do not allow."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from mempool.checkpoint.format.json_values import Fields, Unfit, span_text, spans, whole_number
from mempool.checkpoint.format.pages import (
    CHECKSUM_BYTES,
    Batch,
    PageArray,
    Pages,
    Per,
    Piece,
    StoredFile,
    arrays_of,
    blocks_of,
)
from mempool.checkpoint.format.tensor_file import ITEM_BYTES
from mempool.types import TableSchema

_MAX_WIDTH = 2**20
_MAX_FILE = 2**63 - 1
_MAX_NAME = 200


def array_json(array: PageArray) -> dict[str, Any]:
    found: dict[str, Any] = {"name": array.name, "per": array.per, "dtype": array.dtype}
    return found | ({"width": array.width} if array.width else {})


def parse_array(value: object, path: str) -> PageArray:
    given = Fields(value, path)
    name = given.text("name")
    if not name or len(name) > _MAX_NAME:
        raise Unfit(f"{path}.name is {name!r:.80}")
    per: Per = given.text("per", among=get_args(Per))  # type: ignore[assignment]  # it is one of them
    array = PageArray(
        name=name,
        per=per,
        dtype=given.text("dtype", among=ITEM_BYTES),
        width=given.integer("width", low=1, high=_MAX_WIDTH) if per == "slot" else 0,
    )
    given.done()
    return array


def check_arrays(schema: TableSchema, arrays: Sequence[PageArray], path: str) -> None:
    """Raises Unfit where no table of this schema has these arrays."""
    names = [array.name for array in arrays]
    if len(set(names)) != len(names) or not names:
        raise Unfit(f"{path} has names twice, or none: {names}")
    heads = sum(array.per == "head" for array in arrays)
    if heads != (schema.num_key_pages > 0):
        raise Unfit(f"{path} has {heads} arrays of heads' keys for {schema.num_key_pages} heads")


def batch_json(batch: Batch, order: Mapping[str, int]) -> dict[str, Any]:
    """order: path -> its place among the files."""
    return {
        "file": order[batch.file],
        "rows": span_text(batch.rows),
        "blocks": span_text(batch.blocks),
        "heads": span_text(batch.heads),
        "tensors": {
            name: [[piece.offset, piece.checksums.hex()] for piece in pieces] for name, pieces in batch.tensors.items()
        },
    }


def parse_batch(
    given: Fields,
    schema: TableSchema,
    arrays: tuple[PageArray, ...],
    paths: Sequence[str],
    files: Mapping[str, StoredFile],
) -> Batch:
    """A batch, every piece within its file. Raises Unfit."""
    if not paths:
        raise Unfit(f"{given.path('file')}: there are no files")
    batch = Batch(
        file=paths[given.integer("file", high=len(paths) - 1)],
        rows=spans(given.take("rows"), given.path("rows"), below=schema.num_row_pages),
        blocks=spans(given.take("blocks"), given.path("blocks"), below=schema.num_blocks),
        heads=spans(given.take("heads"), given.path("heads"), below=schema.num_key_pages),
        tensors={name: _pieces(value, path) for name, path, value in given.members("tensors")},
    )
    given.done()
    if bool(batch.rows) != bool(batch.blocks) or bool(batch.rows) == bool(batch.heads):
        raise Unfit(f"{given.path('rows')}: a batch has row pages of some blocks, or key pages")
    _check_pieces(batch, schema, arrays, files[batch.file], given.path("tensors"))
    return batch


def _pieces(value: object, path: str) -> tuple[Piece, ...]:
    if not isinstance(value, list):
        raise Unfit(f"{path} is no array")
    found: list[Piece] = []
    for piece in value:
        if not isinstance(piece, list) or len(piece) != 2 or not isinstance(piece[1], str):
            raise Unfit(f"{path} is no list of [offset, checksums]")
        try:
            checksums = bytes.fromhex(piece[1])
        except ValueError:
            raise Unfit(f"{path} has checksums that are not hexadecimal") from None
        found.append(Piece(offset=whole_number(piece[0], path, high=_MAX_FILE), checksums=checksums))
    return tuple(found)


def _check_pieces(
    batch: Batch, schema: TableSchema, arrays: tuple[PageArray, ...], file: StoredFile, path: str
) -> None:
    expected = arrays_of(arrays, batch)
    if {array.name for array in expected} != set(batch.tensors):
        raise Unfit(f"{path} are {sorted(batch.tensors)}, and {sorted(array.name for array in expected)} are expected")
    for array in expected:
        blocks = (0,) if array.per == "head" else blocks_of(array, batch.blocks)
        count = len(batch.heads) or len(batch.rows)
        pieces = batch.tensors[array.name]
        if len(pieces) != len(blocks):
            raise Unfit(f"{path}.{array.name} has {len(pieces)} pieces for {len(blocks)} blocks")
        for block, piece in zip(blocks, pieces, strict=True):
            end = piece.offset + count * array.page_bytes(schema, block)
            if len(piece.checksums) != count * CHECKSUM_BYTES or piece.offset < file.header_bytes or end > file.size:
                raise Unfit(f"{path}.{array.name} has a piece at {piece.offset} that its file has no room for")


def pages_json(pages: Pages) -> dict[str, Any]:
    return {
        "blocks": [span_text(np.flatnonzero(column).tolist()) for column in pages.row_pages.T],
        "heads": span_text(np.flatnonzero(pages.key_pages).tolist()),
    }


def parse_pages(value: object, path: str, schema: TableSchema) -> Pages:
    given = Fields(value, path)
    pages = Pages.none(schema)
    blocks = given.items("blocks")
    if len(blocks) != schema.num_blocks:
        raise Unfit(f"{given.path('blocks')} has {len(blocks)} elements for {schema.num_blocks} blocks")
    for block, (where, text) in enumerate(blocks):
        pages.row_pages[list(spans(text, where, below=schema.num_row_pages)), block] = True
    pages.key_pages[list(spans(given.take("heads"), given.path("heads"), below=schema.num_key_pages))] = True
    given.done()
    return pages


def file_json(file: StoredFile) -> dict[str, Any]:
    return {"size": file.size, "header": [file.header_bytes, f"{file.header_checksum:08x}"]}


def parse_file(given: Fields) -> StoredFile:
    size = given.integer("size", high=_MAX_FILE)
    header = given.items("header")
    if len(header) != 2:
        raise Unfit(f"{given.path('header')} is no [bytes, checksum]")
    (path, num_bytes), (_, checksum) = header
    if not isinstance(checksum, str) or len(checksum) != 2 * CHECKSUM_BYTES:
        raise Unfit(f"{path} has no checksum beside it")
    given.done()
    try:
        return StoredFile(
            size=size,
            header_bytes=whole_number(num_bytes, path, low=8, high=size),
            header_checksum=int.from_bytes(bytes.fromhex(checksum)),
        )
    except ValueError:
        raise Unfit(f"{path} has a checksum that is not hexadecimal") from None
