"""A commit on the CPU: pairs sorted by slot, gradients summed per slot, the optimizer's step, norms of gradients."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mempool.kernels.arguments import STATE_NAMES, OptimizerStep, Paged, SortedPairs
from mempool.kernels.cpu.elements import load, locate, store
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
_NO_STATE: Array = np.zeros((0, 0), dtype=np.float32)
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
def _first_row_of_part(starts: Array, part: int) -> int:
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
    # acc = acc + weight * grad, pair after pair in the segment's order, no fused multiply-add.
    weighted = weights.shape[0] > 0
    for column in range(acc.shape[0]):
        acc[column] = np.float32(0)
    for position in range(first, end):
        pair = order[position]
        weight = weights[pair] if weighted else np.float32(1)
        bag = bags[pair]
        for column in range(acc.shape[0]):
            acc[column] += weight * grads[bag, column]


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
def _mean_square(grads: Array, first: int, end: int, grad_scale: np.float32) -> np.float32:
    # Eight sums over the columns that are equal modulo 8: an order that vector units can follow, fixed by the source.
    sum0 = sum1 = sum2 = sum3 = sum4 = sum5 = sum6 = sum7 = np.float32(0)
    column = first
    while column + 8 <= end:
        grad0, grad1 = grads[column] * grad_scale, grads[column + 1] * grad_scale
        grad2, grad3 = grads[column + 2] * grad_scale, grads[column + 3] * grad_scale
        grad4, grad5 = grads[column + 4] * grad_scale, grads[column + 5] * grad_scale
        grad6, grad7 = grads[column + 6] * grad_scale, grads[column + 7] * grad_scale
        sum0, sum1, sum2, sum3 = sum0 + grad0 * grad0, sum1 + grad1 * grad1, sum2 + grad2 * grad2, sum3 + grad3 * grad3
        sum4, sum5, sum6, sum7 = sum4 + grad4 * grad4, sum5 + grad5 * grad5, sum6 + grad6 * grad6, sum7 + grad7 * grad7
        column += 8
    total = ((sum0 + sum4) + (sum2 + sum6)) + ((sum1 + sum5) + (sum3 + sum7))
    while column < end:
        grad = grads[column] * grad_scale
        total += grad * grad
        column += 1
    return total / np.float32(end - first)  # type: ignore[no-any-return]


@serial
def _step_row(
    algorithm: int, scalars: Array, block_dim: int, rows: Array, row: int, state0: Array, state1: Array, sums: Array
) -> None:
    grad_scale, step_size, eps = scalars[0], scalars[1], scalars[2]
    width = sums.shape[0]
    if algorithm == 0:
        for column in range(width):
            store(rows, row, column, load(rows[row, column]) - step_size * (sums[column] * grad_scale))
    elif algorithm == 1:
        for column in range(width):
            grad = sums[column] * grad_scale
            total = state0[row, column] + grad * grad
            state0[row, column] = total
            store(rows, row, column, load(rows[row, column]) - step_size * (grad / (np.sqrt(total) + eps)))
    elif algorithm == 2:
        for block in range(state0.shape[1]):
            first, end = block * block_dim, min((block + 1) * block_dim, width)
            total = state0[row, block] + _mean_square(sums, first, end, grad_scale)
            state0[row, block] = total
            divisor = np.sqrt(total) + eps
            for column in range(first, end):
                grad = sums[column] * grad_scale
                store(rows, row, column, load(rows[row, column]) - step_size * (grad / divisor))
    else:
        rest1, rest2 = scalars[3], scalars[4]
        for column in range(width):
            grad = sums[column] * grad_scale
            first_moment = state0[row, column] + (grad - state0[row, column]) * rest1
            second_moment = state1[row, column] + (grad * grad - state1[row, column]) * rest2
            state0[row, column] = first_moment
            state1[row, column] = second_moment
            divisor = np.sqrt(second_moment) + eps
            store(rows, row, column, load(rows[row, column]) - step_size * (first_moment / divisor))


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
    for position in prange(sorted_rows.shape[0]):
        _step_row(algorithm, scalars, block_dim, rows, sorted_rows[position], state0, state1, sums[position])


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
        acc = np.empty(grads.shape[1], dtype=np.float32)
        for position in range(_first_row_of_part(starts, part), _first_row_of_part(starts, part + 1)):
            _sum_segment(order, starts[position], starts[position + 1], weights, bags, grads, acc)
            _step_row(algorithm, scalars, block_dim, rows, sorted_rows[position], state0, state1, acc)


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
