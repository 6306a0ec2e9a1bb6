"""Reading an arena on the CPU: weighted sums of bags, rows, and the gradient of the weights. Also writing rows."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.cpu.elements import load, locate
from mempool.kernels.cpu.runtime import (
    Array,
    optional_weights,
    parallel,
    reassociating,
    serial,
    storage,
    use_threads,
    view,
)


@parallel
def _weighted_sum(
    rows: Array, page_table: Array, page_shift: int, ids: Array, weights: Array, offsets: Array, out: Array
) -> None:
    # Per column: acc = acc + w * v, pair after pair, no fused multiply-add. Four pairs share one pass over the columns
    # to save loads and stores of acc; the order of the additions stays that of the pairs.
    width = rows.shape[1]
    weighted = weights.shape[0] > 0
    for bag in prange(offsets.shape[0] - 1):
        acc = out[bag]
        for column in range(width):
            acc[column] = np.float32(0)
        found = 0
        row0 = row1 = row2 = 0
        weight0 = weight1 = weight2 = np.float32(0)
        for pair in range(offsets[bag], offsets[bag + 1]):
            row = locate(ids[pair], page_table, page_shift)
            if row < 0:
                continue
            weight = weights[pair] if weighted else np.float32(1)
            if found == 0:
                row0, weight0, found = row, weight, 1
            elif found == 1:
                row1, weight1, found = row, weight, 2
            elif found == 2:
                row2, weight2, found = row, weight, 3
            else:
                for column in range(width):
                    total = acc[column] + weight0 * load(rows[row0, column])
                    total = total + weight1 * load(rows[row1, column])
                    total = total + weight2 * load(rows[row2, column])
                    acc[column] = total + weight * load(rows[row, column])
                found = 0
        if found > 0:
            for column in range(width):
                acc[column] += weight0 * load(rows[row0, column])
        if found > 1:
            for column in range(width):
                acc[column] += weight1 * load(rows[row1, column])
        if found > 2:
            for column in range(width):
                acc[column] += weight2 * load(rows[row2, column])


def weighted_sum(paged: Paged, ids: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """See mempool.kernels.weighted_sum."""
    out = torch.empty(offsets.numel() - 1, paged.rows.shape[1], dtype=torch.float32)
    use_threads(ids.numel() * paged.rows.shape[1])
    _weighted_sum(
        storage(paged.rows),
        view(paged.page_table),
        paged.page_shift,
        view(ids),
        optional_weights(weights),
        view(offsets),
        out.numpy(),
    )
    return out


@parallel
def _gather_rows(rows: Array, page_table: Array, page_shift: int, ids: Array, out: Array) -> None:
    for position in prange(ids.shape[0]):
        row = locate(ids[position], page_table, page_shift)
        if row < 0:
            for column in range(rows.shape[1]):
                out[position, column] = 0
        else:
            for column in range(rows.shape[1]):
                out[position, column] = rows[row, column]


def gather_rows(paged: Paged, ids: Tensor) -> Tensor:
    """See mempool.kernels.gather_rows."""
    out = torch.empty(ids.numel(), paged.rows.shape[1], dtype=paged.rows.dtype)
    use_threads(ids.numel() * paged.rows.shape[1])
    _gather_rows(storage(paged.rows), view(paged.page_table), paged.page_shift, view(ids), storage(out))
    return out


@serial
def _scatter_rows(rows: Array, page_table: Array, page_shift: int, ids: Array, values: Array) -> None:
    # On one thread: with repeated ids the last must win, whatever the threads do. The copy is bound by memory anyway.
    for position in range(ids.shape[0]):
        row = locate(ids[position], page_table, page_shift)
        if row >= 0:
            for column in range(rows.shape[1]):
                rows[row, column] = values[position, column]


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """See mempool.kernels.scatter_rows."""
    _scatter_rows(
        storage(paged.rows), view(paged.page_table), paged.page_shift, view(ids), storage(values.detach().contiguous())
    )


@reassociating
def _weight_gradient(
    rows: Array, page_table: Array, page_shift: int, ids: Array, offsets: Array, grads: Array, out: Array
) -> None:
    # Vector lanes are summed apart and added at the end: the order is fixed by the width, so runs repeat bitwise.
    for bag in prange(offsets.shape[0] - 1):
        for pair in range(offsets[bag], offsets[bag + 1]):
            row = locate(ids[pair], page_table, page_shift)
            total = np.float32(0)
            if row >= 0:
                for column in range(rows.shape[1]):
                    total += load(rows[row, column]) * grads[bag, column]
            out[pair] = total


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.weight_gradient."""
    out = torch.empty(ids.numel(), dtype=torch.float32)
    use_threads(ids.numel() * paged.rows.shape[1])
    _weight_gradient(
        storage(paged.rows),
        view(paged.page_table),
        paged.page_shift,
        view(ids),
        view(offsets),
        view(grads),
        out.numpy(),
    )
    return out
