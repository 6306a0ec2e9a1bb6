"""A commit on the CPU: pairs sorted by slot, gradients summed per slot, the optimizer's step, norms of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mempool.kernels.arguments import STATE_NAMES, OptimizerStep, Paged, SortedPairs
from mempool.kernels.cpu.elements import load, locate, stored
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

_ALGORITHM_NUMBERS = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "adam": 3}
_RADIX_BITS = 11
_NO_STATE: Array = np.zeros((1, 0), dtype=np.float32)
# Rows are handed to threads in parts with about as many pairs each; more parts than threads even out hot slots.
_NUM_PARTS = 64
# Rows of one partial sum of squares: fixed, so that the result does not depend on the number of threads.
_NORM_CHUNK_ROWS = 256


@serial
def _sort_pairs(
    ids: Array, page_table: Array, page_shift: int, order: Array, rows: Array, starts: Array
) -> tuple[int, int]:
    # Stable radix sort of the ids that are here, least significant digit first; then the run lengths.
    num_pairs = 0
    largest = np.int64(0)
    keys = np.empty(ids.shape[0], dtype=np.int64)
    for pair in range(ids.shape[0]):
        if locate(ids[pair], page_table, page_shift) >= 0:
            keys[num_pairs] = ids[pair]
            order[num_pairs] = pair
            largest = max(largest, ids[pair])
            num_pairs += 1
    other_keys = np.empty(num_pairs, dtype=np.int64)
    other_order = np.empty(num_pairs, dtype=np.int64)
    counts = np.empty(1 << _RADIX_BITS, dtype=np.int64)
    mask = (1 << _RADIX_BITS) - 1
    shift = 0
    while largest >> shift > 0:
        counts[:] = 0
        for position in range(num_pairs):
            counts[(keys[position] >> shift) & mask] += 1
        total = 0
        for digit in range(counts.shape[0]):
            count = counts[digit]
            counts[digit] = total
            total += count
        for position in range(num_pairs):
            digit = (keys[position] >> shift) & mask
            target = counts[digit]
            counts[digit] = target + 1
            other_keys[target] = keys[position]
            other_order[target] = order[position]
        for position in range(num_pairs):
            keys[position] = other_keys[position]
            order[position] = other_order[position]
        shift += _RADIX_BITS
    num_rows = 0
    for position in range(num_pairs):
        if position == 0 or keys[position] != keys[position - 1]:
            rows[num_rows] = locate(keys[position], page_table, page_shift)
            starts[num_rows] = position
            num_rows += 1
    starts[num_rows] = num_pairs
    return num_pairs, num_rows


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """See mempool.kernels.sort_pairs."""
    order, rows = torch.empty(ids.numel(), dtype=torch.int64), torch.empty(ids.numel(), dtype=torch.int64)
    starts = torch.empty(ids.numel() + 1, dtype=torch.int64)
    num_pairs, num_rows = _sort_pairs(
        view(ids), view(paged.page_table), paged.page_shift, order.numpy(), rows.numpy(), starts.numpy()
    )
    return SortedPairs(order=order[:num_pairs], rows=rows[:num_rows], starts=starts[: num_rows + 1])


@serial
def _first_row_of_part(starts: Array, part: int) -> Any:
    # First row u with at least part / _NUM_PARTS of all pairs before it; the last part ends behind the last row.
    num_rows = starts.shape[0] - 1
    if part >= _NUM_PARTS:
        return num_rows
    wanted = starts[num_rows] * part // _NUM_PARTS
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if starts[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@serial
def _sum_segment(order: Array, first: int, end: int, weights: Array, bags: Array, grads: Array, acc: Array) -> None:
    # acc = acc + weight * grad from zero, pair after pair in the segment's order, no fused multiply-add.
    weighted = weights.shape[0] > 0
    for position in range(first, end):
        pair = order[position]
        weight = weights[pair] if weighted else np.float32(1)
        grad = grads[bags[pair]]
        if position == first:
            for column in range(acc.shape[0]):
                acc[column] = np.float32(0) + weight * grad[column]
        else:
            for column in range(acc.shape[0]):
                acc[column] += weight * grad[column]


@parallel
def _segment_sum(order: Array, starts: Array, weights: Array, bags: Array, grads: Array, out: Array) -> None:
    for part in prange(_NUM_PARTS):
        for row in range(_first_row_of_part(starts, part), _first_row_of_part(starts, part + 1)):
            _sum_segment(order, starts[row], starts[row + 1], weights, bags, grads, out[row])


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.segment_sum."""
    out = torch.empty(pairs.rows.numel(), grads.shape[1], dtype=torch.float32)
    use_threads(pairs.order.numel() * grads.shape[1])
    _segment_sum(view(pairs.order), view(pairs.starts), optional_weights(weights), view(bags), view(grads), out.numpy())
    return out


@serial
def _mean_square(grads: Array, grad_scale: np.float32, lanes: Array) -> Any:
    # A sum for the columns equal modulo 8 each: an order that vector units can follow, fixed by the source.
    width = grads.shape[0]
    for lane in range(8):
        lanes[lane] = np.float32(0)
    for group in range(width // 8):
        part = grads[8 * group : 8 * group + 8]
        for lane in range(8):
            grad = part[lane] * grad_scale
            lanes[lane] += grad * grad
    rest = grads[width - width % 8 :]
    for lane in range(rest.shape[0]):
        grad = rest[lane] * grad_scale
        lanes[lane] += grad * grad
    total = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
    return total / np.float32(width)


@serial
def _step_row(
    algorithm: int,
    scalars: Array,
    block_dim: int,
    values: Array,
    state0: Array,
    state1: Array,
    sums: Array,
    lanes: Array,
) -> None:
    grad_scale, step_size, eps = scalars[0], scalars[1], scalars[2]
    width = sums.shape[0]
    if algorithm == 0:
        for column in range(width):
            values[column] = stored(load(values[column]) - step_size * (sums[column] * grad_scale), values)
    elif algorithm == 1:
        for column in range(width):
            grad = sums[column] * grad_scale
            total = state0[column] + grad * grad
            state0[column] = total
            values[column] = stored(load(values[column]) - step_size * (grad / (np.sqrt(total) + eps)), values)
    elif algorithm == 2:
        for block in range(state0.shape[0]):
            first, end = block * block_dim, min((block + 1) * block_dim, width)
            block_sums, block_values = sums[first:end], values[first:end]
            square_sum = state0[block] + _mean_square(block_sums, grad_scale, lanes)
            state0[block] = square_sum
            divisor = np.sqrt(square_sum) + eps
            for column in range(block_sums.shape[0]):
                grad = block_sums[column] * grad_scale
                block_values[column] = stored(load(block_values[column]) - step_size * (grad / divisor), values)
    else:
        rest1, rest2 = scalars[3], scalars[4]
        for column in range(width):
            grad = sums[column] * grad_scale
            moment1 = state0[column] + (grad - state0[column]) * rest1
            moment2 = state1[column] + (grad * grad - state1[column]) * rest2
            state0[column] = moment1
            state1[column] = moment2
            values[column] = stored(load(values[column]) - step_size * (moment1 / (np.sqrt(moment2) + eps)), values)


@parallel
def _optimizer_step(
    algorithm: int,
    scalars: Array,
    block_dim: int,
    rows: Array,
    state0: Array,
    state1: Array,
    sorted_rows: Array,
    sums: Array,
) -> None:
    num_rows = sorted_rows.shape[0]
    for part in prange(_NUM_PARTS):
        lanes = np.empty(8, dtype=np.float32)
        for position in range(num_rows * part // _NUM_PARTS, num_rows * (part + 1) // _NUM_PARTS):
            row = sorted_rows[position]
            # State that the algorithm does not keep has one row, which nobody reads.
            own0, own1 = state0[row % state0.shape[0]], state1[row % state1.shape[0]]
            _step_row(algorithm, scalars, block_dim, rows[row], own0, own1, sums[position], lanes)


@parallel
def _fused_step(
    algorithm: int,
    scalars: Array,
    block_dim: int,
    rows: Array,
    state0: Array,
    state1: Array,
    sorted_rows: Array,
    order: Array,
    starts: Array,
    weights: Array,
    bags: Array,
    grads: Array,
) -> None:
    for part in prange(_NUM_PARTS):
        acc, lanes = np.empty(grads.shape[1], dtype=np.float32), np.empty(8, dtype=np.float32)
        for position in range(_first_row_of_part(starts, part), _first_row_of_part(starts, part + 1)):
            _sum_segment(order, starts[position], starts[position + 1], weights, bags, grads, acc)
            row = sorted_rows[position]
            own0, own1 = state0[row % state0.shape[0]], state1[row % state1.shape[0]]
            _step_row(algorithm, scalars, block_dim, rows[row], own0, own1, acc, lanes)


def _step_arguments(
    paged: Paged, state: dict[str, Tensor], step: OptimizerStep
) -> tuple[int, Array, int, Array, Array, Array]:
    states = [storage(state[name]) for name in STATE_NAMES[step.algorithm]]
    scalars = np.array(
        [step.grad_scale, step.step_size, step.eps, 1.0 - step.beta1, 1.0 - step.beta2], dtype=np.float32
    )
    state0, state1 = [*states, _NO_STATE, _NO_STATE][:2]
    return _ALGORITHM_NUMBERS[step.algorithm], scalars, step.block_dim, storage(paged.rows), state0, state1


def optimizer_step(
    paged: Paged, state: dict[str, Tensor], sorted_rows: Tensor, sums: Tensor, step: OptimizerStep
) -> None:
    """See mempool.kernels.optimizer_step."""
    use_threads(4 * sums.numel())
    _optimizer_step(*_step_arguments(paged, state, step), view(sorted_rows), view(sums))


def fused_step(
    paged: Paged,
    state: dict[str, Tensor],
    pairs: SortedPairs,
    weights: Tensor | None,
    bags: Tensor,
    grads: Tensor,
    step: OptimizerStep,
) -> None:
    """See mempool.kernels.fused_step."""
    use_threads((pairs.order.numel() + 4 * pairs.rows.numel()) * grads.shape[1])
    _fused_step(
        *_step_arguments(paged, state, step),
        view(pairs.rows),
        view(pairs.order),
        view(pairs.starts),
        optional_weights(weights),
        view(bags),
        view(grads),
    )


@reassociating
def _squared_norm(sums: Array, partial: Array, finite: Array) -> None:
    for chunk in prange(partial.shape[0]):
        total = 0.0
        all_finite = True
        for row in range(chunk * _NORM_CHUNK_ROWS, min((chunk + 1) * _NORM_CHUNK_ROWS, sums.shape[0])):
            # Bits of an exponent that is all ones are the non-finite elements.
            largest = np.uint32(0)
            for column in range(sums.shape[1]):
                element = sums[row, column]
                total += np.float64(element) * np.float64(element)
                largest = max(largest, np.float32(element).view(np.uint32) & np.uint32(0x7F800000))
            all_finite = all_finite and largest != np.uint32(0x7F800000)
        partial[chunk] = total
        finite[chunk] = all_finite


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """See mempool.kernels.squared_norm."""
    num_chunks = -(-sums.shape[0] // _NORM_CHUNK_ROWS)
    partial, finite = np.empty(num_chunks, dtype=np.float64), np.empty(num_chunks, dtype=np.bool_)
    use_threads(sums.numel())
    _squared_norm(view(sums), partial, finite)
    # One after the other: numpy's own sum is fixed as well, but its order is not documented.
    return float(sum(partial.tolist())), bool(finite.all())
