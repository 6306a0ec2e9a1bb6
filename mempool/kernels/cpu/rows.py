"""Rows of an arena on the CPU, one by one: read and written by slot id."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.cpu.bags import Arena, arena_of, rows_ahead
from mempool.kernels.cpu.elements import load, locate, store_block
from mempool.kernels.cpu.runtime import (
    Array,
    kernel,
    prefer_huge_pages,
    prefetch_row,
    serial,
    several_tasks,
    spread,
    storage,
    use_threads,
    view,
)

# Tasks per thread: threads that the system stops take fewer.
_TASKS_PER_THREAD = 4
# Rows that are prefetched ahead of one that is converted.
_AHEAD = 16
# Rows that are converted at once, in elements: they stay in the cache until torch has rounded them.
_CHUNK_ELEMENTS = 1 << 17


@serial
def _prefetch_slot(arena: Arena, ids: Array, position: int) -> None:
    if position < ids.shape[0]:
        row = locate(ids[position], arena.page_table, arena.page_shift)
        if row >= 0:
            prefetch_row(arena.rows, row)


@serial
def _read_task(task: int, arena: Arena, ids: Array, num_tasks: int, out: Array) -> None:
    width = out.shape[1]
    for position in range(ids.shape[0] * task // num_tasks, ids.shape[0] * (task + 1) // num_tasks):
        _prefetch_slot(arena, ids, position + _AHEAD)
        row = locate(ids[position], arena.page_table, arena.page_shift)
        if row < 0:
            out[position] = 0
            continue
        for block in range((width + arena.block_dim - 1) // arena.block_dim):
            first, end = block * arena.block_dim, min((block + 1) * arena.block_dim, width)
            values, target = arena.rows[row, first:end], out[position, first:end]
            scale = arena.scales[row, arena.first_scale + block] if arena.rows.itemsize == 1 else np.float32(1)
            for column in range(target.shape[0]):
                target[column] = scale * load(values[column])


@kernel
def _read_rows(arena: Arena, ids: Array, num_tasks: int, out: Array) -> None:
    spread(num_tasks, _read_task, (arena, ids, num_tasks, out))


@serial
def _copy_task(
    task: int, rows: Array, page_table: Array, page_shift: int, ids: Array, num_tasks: int, out: Array
) -> None:
    ahead = rows_ahead(rows.shape[1])
    for position in range(ids.shape[0] * task // num_tasks, ids.shape[0] * (task + 1) // num_tasks):
        if position + ahead < ids.shape[0]:
            row = locate(ids[position + ahead], page_table, page_shift)
            if row >= 0:
                prefetch_row(rows, row)
        row = locate(ids[position], page_table, page_shift)
        if row < 0:
            out[position] = 0
            continue
        source, target = rows[row], out[position]
        for byte in range(target.shape[0]):
            target[byte] = source[byte]


@kernel
def _copy_rows(rows: Array, page_table: Array, page_shift: int, ids: Array, num_tasks: int, out: Array) -> None:
    spread(num_tasks, _copy_task, (rows, page_table, page_shift, ids, num_tasks, out))


def _copied_rows(paged: Paged, ids: Tensor, out: Tensor) -> Tensor:
    if out.numel() == 0 or paged.rows.shape[0] == 0:
        return out.zero_()
    rows, target = (storage(of).view(np.uint8) for of in (paged.rows, out))
    num_tasks = several_tasks(use_threads(out.numel()), _TASKS_PER_THREAD)
    _copy_rows(rows, view(paged.page_table), paged.page_shift, view(ids), num_tasks, target)
    return out


def gather_rows(paged: Paged, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See mempool.kernels.gather_rows."""
    out = prefer_huge_pages(torch.empty(ids.numel(), paged.width, dtype=dtype or paged.value_dtype, device="cpu"))
    if out.dtype == paged.rows.dtype:
        return _copied_rows(paged, ids, out)
    arena, slots = arena_of(paged), view(ids)
    num_tasks = several_tasks(use_threads(out.numel()), _TASKS_PER_THREAD)
    if out.dtype == torch.float32:
        _read_rows(arena, slots, num_tasks, out.numpy())
    else:
        num_rows = max(1, _CHUNK_ELEMENTS // max(1, paged.width))
        part = torch.empty(min(num_rows, ids.numel()), paged.width, dtype=torch.float32, device="cpu")
        for first in range(0, ids.numel(), num_rows):
            part = part[: ids.numel() - first]
            _read_rows(arena, slots[first : first + num_rows], num_tasks, part.numpy())
            out[first : first + num_rows] = part
    return out


@serial
def _write_own_rows(thread: int, arena: Arena, ids: Array, values: Array, num_threads: int) -> None:
    width = values.shape[1]
    for position in range(ids.shape[0]):
        row = locate(ids[position], arena.page_table, arena.page_shift)
        if row < 0 or row % num_threads != thread:
            continue
        target = arena.rows[row]
        if arena.rows.itemsize > 1:
            target[:] = values[position]
            continue
        target[:] = 0  # padding as well
        for block in range((width + arena.block_dim - 1) // arena.block_dim):
            first, end = block * arena.block_dim, min((block + 1) * arena.block_dim, width)
            scale = store_block(values[position, first:end], target[first:end], False, 0, 0, 0)
            arena.scales[row, arena.first_scale + block] = scale


@kernel
def _write_rows(arena: Arena, ids: Array, values: Array, num_threads: int) -> None:
    # Of repeated ids the last must win: every task goes through all ids, and writes the rows that are its own.
    spread(num_threads, _write_own_rows, (arena, ids, values, num_threads))


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """See mempool.kernels.scatter_rows."""
    num_threads = use_threads(values.numel())
    _write_rows(arena_of(paged), view(ids), storage(values.detach().contiguous()), num_threads)
