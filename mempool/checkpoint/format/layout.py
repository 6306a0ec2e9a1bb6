"""From pages to files and back: which pages to write together, and where each page of a table lies.

Shapes: P row pages, C column blocks, H heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mempool.checkpoint.format.pages import Batch, PageArray, Pages
from mempool.types import TableSchema

BATCH_BYTES = 16 * 2**20
"""Of pages that are in memory together, about: of a single larger page, its own."""
FILE_BYTES = 2**30
"""Of a data file, about."""

_MAX_PATTERNS = 16

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Pages to read or write together: all of ``rows`` x ``blocks``, or key pages."""

    rows: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()

    def num_bytes(self, schema: TableSchema, arrays: Sequence[PageArray]) -> int:
        per_row = sum(_row_bytes(schema, arrays, block) for block in self.blocks)
        return len(self.rows) * per_row + len(self.heads) * _head_bytes(schema, arrays)


def group_pages(
    schema: TableSchema, arrays: Sequence[PageArray], pages: Pages, *, batch_bytes: int = BATCH_BYTES
) -> Iterator[PageGroup]:
    """Cut pages into groups of about ``batch_bytes``: rows of the same blocks together, in order; then keys."""
    for rows, blocks in _rectangles(pages.row_pages):
        at_once = max(1, batch_bytes // max(1, sum(_row_bytes(schema, arrays, block) for block in blocks)))
        for first in range(0, len(rows), at_once):
            yield PageGroup(rows=tuple(rows[first : first + at_once].tolist()), blocks=blocks)
    heads = np.flatnonzero(pages.key_pages).tolist()
    at_once = max(1, batch_bytes // max(1, _head_bytes(schema, arrays)))
    for first in range(0, len(heads), at_once):
        yield PageGroup(heads=tuple(heads[first : first + at_once]))


def _rectangles(pages_PC: npt.NDArray[np.bool_]) -> Iterator[tuple[npt.NDArray[np.int64], tuple[int, ...]]]:
    """The pages as rows x blocks: rows of the same blocks together, or block by block where that makes too many."""
    patterns, which = np.unique(pages_PC, axis=0, return_inverse=True)
    if len(patterns) > max(_MAX_PATTERNS, pages_PC.shape[1]):
        for block in range(pages_PC.shape[1]):
            rows = np.flatnonzero(pages_PC[:, block])
            if len(rows):
                yield rows, (block,)
        return
    for index, pattern in enumerate(patterns):
        if pattern.any():
            yield np.flatnonzero(which.reshape(-1) == index), tuple(np.flatnonzero(pattern).tolist())


def group_files(
    schema: TableSchema, arrays: Sequence[PageArray], groups: Iterator[PageGroup], *, file_bytes: int = FILE_BYTES
) -> Iterator[tuple[PageGroup, ...]]:
    """The groups of each file, which is full at about ``file_bytes``."""
    held: list[PageGroup] = []
    num_bytes = 0
    for group in groups:
        size = group.num_bytes(schema, arrays)
        if held and num_bytes + size > file_bytes:
            yield tuple(held)
            held, num_bytes = [], 0
        held.append(group)
        num_bytes += size
    if held:
        yield tuple(held)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Places:
    """Where pages lie: the batch, -1 where none has the page, and the place in that batch.

    Attributes:
        batch, at: [P, C].
        key_batch, key_at: [H].
    """

    batch: Int32s
    at: Int32s
    key_batch: Int32s
    key_at: Int32s


def places(schema: TableSchema, batches: Sequence[Batch]) -> Places:
    """Where each page lies: of several batches that have it, in the last."""
    shape = (schema.num_row_pages, schema.num_blocks)
    found = Places(
        batch=np.full(shape, -1, np.int32),
        at=np.zeros(shape, np.int32),
        key_batch=np.full(schema.num_key_pages, -1, np.int32),
        key_at=np.zeros(schema.num_key_pages, np.int32),
    )
    for index, batch in enumerate(batches):
        cells = np.ix_(batch.rows, batch.blocks) if batch.rows else None
        if cells is not None:
            found.batch[cells] = index
            found.at[cells] = np.arange(len(batch.rows), dtype=np.int32)[:, None]
        heads = list(batch.heads)
        found.key_batch[heads] = index
        found.key_at[heads] = np.arange(len(heads), dtype=np.int32)
    return found


def live_batches(schema: TableSchema, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Those of which any page counts still, in order."""
    where = places(schema, batches)
    live = np.zeros(len(batches) + 1, np.bool_)
    live[where.batch] = True
    live[where.key_batch] = True
    return tuple(batch for index, batch in enumerate(batches) if live[index])


def live_bytes(schema: TableSchema, arrays: Sequence[PageArray]) -> int:
    """Bytes of a table's pages alone: what files of all of them have, but for headers."""
    rows = sum(_row_bytes(schema, arrays, block) for block in range(schema.num_blocks))
    return schema.num_row_pages * rows + schema.num_key_pages * _head_bytes(schema, arrays)


def _row_bytes(schema: TableSchema, arrays: Sequence[PageArray], block: int) -> int:
    return sum(array.page_bytes(schema, block) for array in arrays if array.per != "head")


def _head_bytes(schema: TableSchema, arrays: Sequence[PageArray]) -> int:
    return sum(array.page_bytes(schema, 0) for array in arrays if array.per == "head")
