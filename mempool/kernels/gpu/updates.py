"""A commit on the GPU: gradients summed per slot, the optimizer's step, norms of gradients. No atomics anywhere."""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels.arguments import STATE_NAMES, OptimizerStep, Paged, SortedPairs
from mempool.kernels.gpu.elements import STRICT, contiguous, load, optional_weights, storage, store, tile

_NORM_TILE = 1024
_NORM_CHUNK = 1 << 16


@triton.jit
def _pair_gradient(order, weights, bags, grads, position, end, width, columns, mask, WEIGHTED: tl.constexpr):
    """Weight times gradient of one sorted pair over the program's columns, and whether the pair exists."""
    exists = position < end
    pair = tl.load(order + position, mask=exists, other=0)
    bag = tl.load(bags + pair, mask=exists, other=0)
    part = tl.load(grads + bag * width + columns, mask=mask & exists, other=0.0)
    if WEIGHTED:
        part = part * tl.load(weights + pair, mask=exists, other=0.0)
    return part, exists


@triton.jit
def _sum_segment(
    order, starts, weights, bags, grads, segment, width, columns, mask, WEIGHTED: tl.constexpr, TILE: tl.constexpr
):
    """Sum of one segment in the order of its pairs; four are read at once, then added one after the other."""
    first = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    acc = tl.zeros([TILE], dtype=tl.float32)
    for position in range(first, end, 4):
        part0, exists0 = _pair_gradient(order, weights, bags, grads, position, end, width, columns, mask, WEIGHTED)
        part1, exists1 = _pair_gradient(order, weights, bags, grads, position + 1, end, width, columns, mask, WEIGHTED)
        part2, exists2 = _pair_gradient(order, weights, bags, grads, position + 2, end, width, columns, mask, WEIGHTED)
        part3, exists3 = _pair_gradient(order, weights, bags, grads, position + 3, end, width, columns, mask, WEIGHTED)
        acc = tl.where(exists0, acc + part0, acc)
        acc = tl.where(exists1, acc + part1, acc)
        acc = tl.where(exists2, acc + part2, acc)
        acc = tl.where(exists3, acc + part3, acc)
    return acc


@triton.jit
def segment_sum_kernel(order, starts, weights, bags, grads, out, width, WEIGHTED: tl.constexpr, TILE: tl.constexpr):
    """One program a distinct row and tile of columns."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = columns < width
    acc = _sum_segment(order, starts, weights, bags, grads, segment, width, columns, mask, WEIGHTED, TILE)
    tl.store(out + segment * width + columns, acc, mask=mask)


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.segment_sum."""
    num_rows, width = pairs.rows.numel(), grads.shape[1]
    out = torch.empty(num_rows, width, dtype=torch.float32, device=grads.device)
    if num_rows:
        with torch.cuda.device_of(out):
            segment_sum_kernel[(num_rows, triton.cdiv(width, tile(width)))](
                contiguous(pairs.order),
                contiguous(pairs.starts),
                optional_weights(weights, out),
                contiguous(bags),
                contiguous(grads),
                out,
                width,
                WEIGHTED=weights is not None,
                TILE=tile(width),
                **STRICT,
            )
    return out


@triton.jit
def step_kernel(
    rows,
    state0,
    state1,
    sorted_rows,
    sums,
    order,
    starts,
    weights,
    bags,
    grads,
    width,
    tile_columns,
    grad_scale,
    step_size,
    eps,
    rest1,
    rest2,
    ALGORITHM: tl.constexpr,
    FUSED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a distinct row and tile of columns; for row-wise state a tile is a column block.

    The summed gradient is read from sums, or (FUSED) made here as segment_sum makes it.
    """
    segment = tl.program_id(0).to(tl.int64)
    tile_number = tl.program_id(1).to(tl.int64)
    columns = tile_number * tile_columns + tl.arange(0, TILE)
    mask = (tl.arange(0, TILE) < tile_columns) & (columns < width)
    if FUSED:
        total = _sum_segment(order, starts, weights, bags, grads, segment, width, columns, mask, WEIGHTED, TILE)
    else:
        total = tl.load(sums + segment * width + columns, mask=mask, other=0.0)
    grad = total * grad_scale
    row = tl.load(sorted_rows + segment)
    place = row * width + columns
    value = load(rows + place, mask)
    if ALGORITHM == "sgd":
        update = grad
    elif ALGORITHM == "adagrad":
        square_sum = tl.load(state0 + place, mask=mask, other=0.0) + grad * grad
        tl.store(state0 + place, square_sum, mask=mask)
        update = tl.div_rn(grad, tl.sqrt_rn(square_sum) + eps)
    elif ALGORITHM == "rowwise_adagrad":
        block = state0 + row * tl.num_programs(1) + tile_number
        num_columns = tl.minimum(tile_columns, width - tile_number * tile_columns)
        squares = tl.sum(tl.where(mask, grad * grad, 0.0), axis=0)
        mean = squares / num_columns.to(tl.float32)
        square_sum = tl.load(block) + mean
        tl.store(block, square_sum)
        update = tl.div_rn(grad, tl.zeros([TILE], dtype=tl.float32) + (tl.sqrt_rn(square_sum) + eps))
    else:
        first = tl.load(state0 + place, mask=mask, other=0.0)
        second = tl.load(state1 + place, mask=mask, other=0.0)
        first = first + (grad - first) * rest1
        second = second + (grad * grad - second) * rest2
        tl.store(state0 + place, first, mask=mask)
        tl.store(state1 + place, second, mask=mask)
        update = tl.div_rn(first, tl.sqrt_rn(second) + eps)
    store(rows + place, value - step_size * update, mask)


def _launch_step(
    paged: Paged, state: dict[str, Tensor], step: OptimizerStep, *, fused: bool, weighted: bool, operands: list[Tensor]
) -> None:
    width = paged.rows.shape[1]
    num_rows = operands[0].numel()
    if not num_rows:
        return
    states = [state[name] for name in STATE_NAMES[step.algorithm]]
    nothing = torch.empty(0, dtype=torch.float32, device=paged.rows.device)
    state0, state1 = [*states, nothing, nothing][:2]
    if step.algorithm == "rowwise_adagrad":
        tile_columns = min(step.block_dim, width)
        num_columns = int(triton.next_power_of_2(tile_columns))
    else:
        tile_columns = num_columns = tile(width)
    with torch.cuda.device_of(paged.rows):
        step_kernel[(num_rows, triton.cdiv(width, tile_columns))](
            storage(paged.rows),
            state0,
            state1,
            *operands,
            width,
            tile_columns,
            float(step.grad_scale),
            float(step.step_size),
            float(step.eps),
            1.0 - step.beta1,
            1.0 - step.beta2,
            ALGORITHM=step.algorithm,
            FUSED=fused,
            WEIGHTED=weighted,
            TILE=num_columns,
            **STRICT,
        )


def optimizer_step(
    paged: Paged, state: dict[str, Tensor], sorted_rows: Tensor, sums: Tensor, step: OptimizerStep
) -> None:
    """See mempool.kernels.optimizer_step."""
    rows, sums = contiguous(sorted_rows), contiguous(sums)
    _launch_step(paged, state, step, fused=False, weighted=False, operands=[rows, sums, rows, rows, sums, rows, sums])


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
    grads = contiguous(grads)
    operands = [contiguous(pairs.rows), grads, contiguous(pairs.order), contiguous(pairs.starts)]
    operands += [optional_weights(weights, grads), contiguous(bags), grads]
    _launch_step(paged, state, step, fused=True, weighted=weights is not None, operands=operands)


@triton.jit
def squared_norm_kernel(sums, partial, not_finite, num_elements, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """One program a chunk of elements: its sum of squares, and how many elements are inf or NaN."""
    chunk = tl.program_id(0).to(tl.int64)
    total = tl.zeros([TILE], dtype=tl.float64)
    bad = tl.zeros([TILE], dtype=tl.int32)
    for start in range(0, CHUNK, TILE):
        places = chunk * CHUNK + start + tl.arange(0, TILE)
        element = tl.load(sums + places, mask=places < num_elements, other=0.0)
        bad += ((element.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
        total += element.to(tl.float64) * element.to(tl.float64)
    tl.store(partial + chunk, tl.sum(total, axis=0))
    tl.store(not_finite + chunk, tl.sum(bad, axis=0))


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """See mempool.kernels.squared_norm."""
    num_chunks = triton.cdiv(sums.numel(), _NORM_CHUNK)
    if num_chunks == 0:
        return 0.0, True
    partial = torch.empty(num_chunks, dtype=torch.float64, device=sums.device)
    not_finite = torch.empty(num_chunks, dtype=torch.int32, device=sums.device)
    with torch.cuda.device_of(sums):
        squared_norm_kernel[(num_chunks,)](
            contiguous(sums), partial, not_finite, sums.numel(), TILE=_NORM_TILE, CHUNK=_NORM_CHUNK
        )
    return float(partial.sum()), not bool(not_finite.any())
