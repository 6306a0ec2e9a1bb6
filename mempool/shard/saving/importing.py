"""Pages of a new table out of a file of its rows: values and keys are the file's, all else is as in any new table.

Read off the engine's thread, some megabytes at a time, however little of a row's columns is wanted here.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mempool import kernels
from mempool.checkpoint.exchange.table_source import TableSource as FileSource
from mempool.checkpoint.format.layout import PageGroup, group_pages
from mempool.checkpoint.format.pages import Pages
from mempool.shard.pages.capture import page_arrays
from mempool.shard.pages.named_arrays import (
    HEAD_KEYS,
    KEYS,
    MASTER,
    SCALES,
    VALUES,
    Blocks,
    NamedArray,
    head_keys_shape,
    initial_columns,
    initial_head_keys,
    packed_layout,
)
from mempool.shard.pages.storage import Storage
from mempool.types import PageBatch, TableSchema, TableSource
from mempool.types.keys import is_key_table

ROWS_BYTES = 4 * 2**20
"""Of the file's rows that are in memory together."""


def imported_pages(source: TableSource, storage: Storage, pages: Pages, *, batch_bytes: int) -> Iterator[PageBatch]:
    """Pages of a table whose rows lie in a file.

    Args:
        source: The file, and what its tensors are called.
        storage: Of the table that takes them.
        pages: Which.
        batch_bytes: Of a batch, about.

    Raises:
        NotFound: There is no such file.
        InvalidRequest: It has no such tensors, or they do not fit the table.
        DataLoss: It is damaged, or not whole.
    """
    file = FileSource(source.url, values=source.table or None, keys=source.keys or None)
    file.check(storage.schema)
    for group in group_pages(storage.schema, page_arrays(storage), pages, batch_bytes=batch_bytes):
        yield PageBatch(
            table_id=storage.schema.table_id,
            row_pages=np.array(group.rows, dtype=np.int64),
            blocks=group.blocks,
            key_pages=group.heads,
            arrays=_heads(file, storage.schema, group) if group.heads else _rows(file, storage, group),
            version=0,
        )


def _heads(file: FileSource, schema: TableSchema, group: PageGroup) -> dict[str, Tensor]:
    shape = head_keys_shape(schema)
    keys = torch.empty((len(group.heads), *shape))
    for at, head in enumerate(group.heads):
        if file.layout.keys is None:
            keys[at] = initial_head_keys(schema, head, range(shape[0] * shape[1])).view(shape)
        else:
            keys[at] = file.head_keys(schema, head)
    return {HEAD_KEYS: keys}


def _rows(file: FileSource, storage: Storage, group: PageGroup) -> dict[str, Tensor]:
    schema, blocks = storage.schema, group.blocks
    held = {array.name: array for array in storage.arrays.values() if array.width(blocks)}
    arrays = {
        name: torch.zeros(len(group.rows) * schema.page_slots, array.width(blocks), dtype=array.dtype)
        for name, array in held.items()
    }
    for at, slots in _pieces(schema, group.rows):
        into = {name: array[at : at + len(slots)] for name, array in arrays.items()}
        for name, array in held.items():
            if array.initial is not None:
                into[name][:] = array.initial
        _put_values(file, schema, held[VALUES], blocks, slots, into)
        if KEYS in held:
            into[KEYS][:] = _keys(file, schema, held[KEYS], slots)
    return arrays


def _pieces(schema: TableSchema, rows: tuple[int, ...]) -> Iterator[tuple[int, range]]:
    """Slots that there are, some of one piece of the file at a time, and where they begin in the batch."""
    most = max(1, ROWS_BYTES // (4 * schema.value_dim))
    cuts = [at for at in range(1, len(rows)) if rows[at] != rows[at - 1] + 1]
    for begin, end in pairwise([0, *cuts, len(rows)]):
        first = rows[begin] * schema.page_slots
        last = min(first + (end - begin) * schema.page_slots, schema.num_slots)
        for slot in range(first, last, most):
            yield begin * schema.page_slots + slot - first, range(slot, min(slot + most, last))


def _put_values(
    file: FileSource, schema: TableSchema, array: NamedArray, blocks: Blocks, slots: range, into: dict[str, Tensor]
) -> None:
    if is_key_table(schema):
        keys = file.own_keys(schema, slots)
        into[VALUES][:] = initial_columns(array, slots, 0, schema.value_dim) if keys is None else keys
        return
    every = tuple(range(schema.num_blocks))
    columns = array.copies(blocks, into=blocks, out_of=every)
    coded = file.coded(schema, slots.start, len(slots))
    if coded is not None:  # bit for bit as they were, which values that are encoded again need not be
        codes, scales = coded
        for to, out_of in columns:
            into[VALUES][:, to] = codes[:, out_of]
        into[SCALES][:] = scales[:, list(blocks)]
        return
    read = file.values(slots.start, len(slots))
    packed = packed_layout(schema, blocks)
    if packed is None:
        for name in (VALUES, MASTER):
            if name in into:
                for to, out_of in columns:
                    into[name][:, to] = read[:, out_of]
        return
    values = torch.empty(len(slots), packed.width)
    for to, out_of in columns:
        values[:, to] = read[:, out_of]
    rows = torch.zeros(len(slots), packed.row_bytes, dtype=torch.uint8)
    paged = kernels.Paged(rows, torch.zeros(1, dtype=torch.int32), max(0, len(slots) - 1).bit_length(), packed)
    kernels.scatter_rows(paged, torch.arange(len(slots)), values)
    into[VALUES][:] = rows[:, : packed.width]
    ends = packed.scales_start + 4 * packed.num_blocks
    into[SCALES][:] = rows[:, packed.scales_start : ends].contiguous().view(torch.float32)
    if MASTER in into:
        into[MASTER][:] = values


def _keys(file: FileSource, schema: TableSchema, array: NamedArray, slots: range) -> Tensor:
    if file.layout.keys is None:
        return initial_columns(array, slots, 0, array.width((0,)))
    return file.flat_keys(schema, slots.start, len(slots))
