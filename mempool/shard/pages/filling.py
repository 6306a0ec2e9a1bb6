"""Filling new pages with their initial values, in steps so small that others are served between any two of them.

Legend: W columns of the blocks of an arena.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.masks import RowPages, runs
from mempool.shard.pages.named_arrays import (
    LAST_STEP,
    SCALES,
    VALUES,
    Blocks,
    NamedArray,
    head_keys_shape,
    initial_columns,
    initial_head_keys,
)
from mempool.types import TableSchema

_PIECE_BYTES = 8 * 2**20
"""What is written between two chances to stop: some tens of milliseconds."""

_STEP_BYTES = 64 * 2**10
"""What a step costs besides, however little it writes."""


def filled(
    arenas: list[tuple[Arena, RowPages]], schema: TableSchema, *, last_step: int, device: torch.device
) -> Iterator[int]:
    """Write the initial values of row pages that were published in new arenas: a piece at each ``next``, its bytes.

    Args:
        arenas: Arenas, and the row pages of each, ascending; they lie side by side in that order.
        schema: The table's.
        last_step: What rows of a dense optimizer hold as the last step they have seen.
        device: The arenas'.
    """
    return _in_pieces(
        num_bytes
        for arena, row_pages in arenas
        for run in runs(row_pages)
        for num_bytes in _fill_run(arena, run, schema, last_step=last_step, device=device)
    )


def filled_head_keys(head_keys: Tensor, heads: tuple[int, ...], schema: TableSchema) -> Iterator[int]:
    """Write the initial product keys of these heads into [H, 2, n, key_dim / 2], as ``filled`` does rows."""
    return _in_pieces(_fill_heads(head_keys, heads, schema))


def _in_pieces(steps: Iterator[int]) -> Iterator[int]:
    written = spent = 0
    for num_bytes in steps:
        written, spent = written + num_bytes, spent + num_bytes + _STEP_BYTES
        if spent >= _PIECE_BYTES:
            yield written
            written = spent = 0


def _fill_run(
    arena: Arena, run: RowPages, schema: TableSchema, *, last_step: int, device: torch.device
) -> Iterator[int]:
    """Consecutive row pages, in parts of some rows, each array after the other; answers the bytes of each step."""
    page_slots = schema.page_slots
    first_slot, offset = int(run[0]) * page_slots, int(arena.page_of[run[0]]) * page_slots
    num_rows = len(run) * page_slots
    # Packed values are encoded from float32.
    row_cost = max(1, arena.page_bytes // page_slots + (4 * arena.width if schema.packed else 0))
    step = max(1, _PIECE_BYTES // row_cost)
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        rows = slice(offset + start, offset + end)
        slots = range(first_slot + start, max(first_slot + start, min(first_slot + end, schema.num_slots)))
        pages = np.arange(rows.start // page_slots, (rows.stop - 1) // page_slots + 1)
        with arena.writing(pages=torch.from_numpy(pages).to(device)):
            for array in arena.arrays:
                yield from _fill_rows(arena, array, rows, slots, last_step=last_step)
            if schema.packed:
                yield from _fill_packed(arena, slots, device)


def _fill_rows(arena: Arena, array: NamedArray, rows: slice, slots: range, *, last_step: int) -> Iterator[int]:
    held = arena.rows(array.name)[rows]
    held[len(slots) :] = 0  # slots of the last page that do not exist
    held = held[: len(slots)]
    if array.name == LAST_STEP:
        held[:] = last_step
    elif array.initial is not None:
        held[:] = array.initial
    elif array.schema.packed and array.name in (VALUES, SCALES):
        return
    else:
        yield from _draw(array, arena.blocks, slots, held)
        return
    yield held.numel() * held.element_size()


def _fill_packed(arena: Arena, slots: range, device: torch.device) -> Iterator[int]:
    (array,) = (array for array in arena.arrays if array.name == VALUES)
    values = torch.empty(len(slots), arena.width, dtype=torch.float32, device=device)
    yield from _draw(array, arena.blocks, slots, values)
    kernels.scatter_rows(arena.paged(), torch.arange(slots.start, slots.stop, device=device), values)
    yield len(slots) * arena.width


def _draw(array: NamedArray, blocks: Blocks, slots: range, into: Tensor) -> Iterator[int]:
    """Draw [len(slots), W], blocks that are neighbours together, some columns at a time."""
    step = max(1, _PIECE_BYTES // (4 * max(1, len(slots))))
    at = 0
    for first, end in _column_runs(array, blocks):
        for start in range(first, end, step):
            stop = min(start + step, end)
            drawn = initial_columns(array, slots, start, stop)
            into[:, at : at + stop - start] = drawn.to(into.device)
            at += stop - start
            yield drawn.nbytes


def _column_runs(array: NamedArray, blocks: Blocks) -> list[tuple[int, int]]:
    """The array's columns that these blocks are, as ranges of the table's."""
    if array.per == "slot":
        return [(0, array.width(blocks))]
    neighbours = runs(np.array(blocks, dtype=np.int64))
    return [
        (array.schema.block_columns(int(run[0]))[0], array.schema.block_columns(int(run[-1]))[1]) for run in neighbours
    ]


def _fill_heads(head_keys: Tensor, heads: tuple[int, ...], schema: TableSchema) -> Iterator[int]:
    codebooks, n, half_dim = head_keys_shape(schema)
    num_rows = codebooks * n
    step = max(1, _PIECE_BYTES // (4 * max(1, half_dim)))
    for place, head in enumerate(heads):
        rows = head_keys[place].view(num_rows, half_dim)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            drawn = initial_head_keys(schema, head, range(start, stop))
            rows[start:stop] = drawn.to(rows.device)
            yield drawn.nbytes
