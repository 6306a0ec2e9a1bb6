"""An optimizer's step on the GPU, by itself or with the sums of its gradients; norms of gradients. No atomics."""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.gpu import tuning
from mempool.kernels.gpu.elements import (
    STRICT,
    arena,
    contiguous,
    load_values,
    optional_weights,
    random_bits,
    store_values,
    tile_columns,
    tree_sum,
)
from mempool.kernels.gpu.segments import row_sums, segment_sum, sum_pieces
from mempool.kernels.steps import BLOCK_STATE, MASTER, STATE_NAMES, OptimizerStep


@triton.jit
def _block_mean(grad, mask, block, WIDTH: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Mean of the squares of each block's gradients [rows, blocks]."""
    squares = tree_sum(tl.where(mask, grad * grad, 0.0))
    count = tl.maximum(tl.minimum(WIDTH - block * BLOCK_DIM, BLOCK_DIM), 1).to(tl.float32)
    return tl.div_rn(squares, tl.broadcast_to(count, squares.shape))


@triton.jit
def _by_block(divisor, like):
    return tl.broadcast_to(divisor[:, :, None], like.shape)


@triton.jit
def _brought_on(buffer, grad, momentum, share):
    """Momentum with the gradient of a step; see torch.optim.SGD."""
    # NO_MOMENTUM; adding 0.0 keeps a gradient of -0.0 apart from it.
    fresh = (buffer == 0.0) & (buffer.to(tl.int32, bitcast=True) < 0)
    return tl.where(fresh, grad, momentum * buffer + share * grad) + 0.0


@triton.jit
def _bounded(value, mask, max_norm):
    """Rows [rows, 1, columns] of a larger norm, scaled to it."""
    norm = tl.sqrt_rn(tree_sum(tl.where(mask, value * value, 0.0)))
    larger = norm > max_norm
    share = tl.div_rn(tl.zeros_like(norm) + max_norm, tl.where(larger, norm, 1.0))
    return tl.where(_by_block(larger, value), value * _by_block(share, value), value)


@triton.jit(
    do_not_specialize=[
        "num_rows", "key", "grad_scale", "step_size", "eps", "rest1", "rest2", "correction", "decay", "gradient_decay",
        "momentum", "share", "max_norm",
    ]
)  # fmt: skip
def step_kernel(
    rows,
    scales,
    master,
    state0,
    state1,
    targets,
    slots,
    table_columns,
    sums,
    order,
    starts,
    weights,
    bags,
    grads,
    num_rows,
    key,
    grad_scale,
    step_size,
    eps,
    rest1,
    rest2,
    correction,
    decay,
    gradient_decay,
    momentum,
    share,
    max_norm,
    ALGORITHM: tl.constexpr,
    FUSED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MASTERED: tl.constexpr,
    RANDOMLY: tl.constexpr,
    CORRECTED: tl.constexpr,
    L2: tl.constexpr,
    DECAYED: tl.constexpr,
    NESTEROV: tl.constexpr,
    BOUNDED: tl.constexpr,
    COLUMNS_OF: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program some distinct rows and a tile of columns: all of a column block where scales or state belong to it.

    The summed gradient is read from sums, or (FUSED) made here as segment_sum makes it, sums being the scratch.
    COLUMNS_OF is the step's block dim, by which table_columns knows an arena's columns.
    """
    run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = run < num_rows
    columns, column_mask, block = tile_columns(tl.program_id(1), WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
    mask = column_mask & exists[:, None, None]
    block_mask = exists[:, None] & (block * BLOCK_DIM < WIDTH)
    row = tl.load(targets + run, mask=exists, other=0)
    place = row[:, None, None] * WIDTH + columns
    block_place = row[:, None] * NUM_BLOCKS + block
    # What lies in memory is asked for first: it is on its way while the gradients are looked up.
    if MASTERED:
        value = tl.load(master + place, mask=mask, other=0.0)
    else:
        value = load_values(rows, scales, row, columns, mask, block, block_mask, STRIDE, SCALES)
    if ALGORITHM == "rowwise_adagrad":
        square_sum = tl.load(state0 + block_place, mask=block_mask, other=0.0)
    elif ALGORITHM != "sgd":
        first = tl.load(state0 + place, mask=mask, other=0.0)
    if ALGORITHM == "adam" or ALGORITHM == "adamw":
        second = tl.load(state1 + place, mask=mask, other=0.0)
    elif ALGORITHM == "rowwise_adam":
        second = tl.load(state1 + block_place, mask=block_mask, other=0.0)

    if FUSED:
        shape: tl.constexpr = (ROWS, BLOCKS, BLOCK)
        total = tl.full(shape, -0.0, tl.float32)
        total = row_sums(
            order, starts, weights, bags, grads, sums, run, exists, total, columns, column_mask, WEIGHTED, WIDTH,
            UNROLL, shape,
        )  # fmt: skip
    else:
        total = tl.load(sums + run[:, None, None] * WIDTH + columns, mask=mask, other=0.0)
    grad = total * grad_scale
    if L2:
        grad = grad + gradient_decay * value
    if DECAYED:
        value = value * decay

    if ALGORITHM == "sgd":
        value = value - step_size * grad
    elif ALGORITHM == "sgd_momentum":
        first = _brought_on(first, grad, momentum, share)
        tl.store(state0 + place, first, mask=mask)
        update = first
        if NESTEROV:
            update = grad + momentum * first
        value = value - step_size * update
    elif ALGORITHM == "adagrad":
        first = first + grad * grad
        tl.store(state0 + place, first, mask=mask)
        value = value - step_size * tl.div_rn(grad, tl.sqrt_rn(first) + eps)
    elif ALGORITHM == "rowwise_adagrad":
        square_sum = square_sum + _block_mean(grad, mask, block, WIDTH, BLOCK_DIM)
        tl.store(state0 + block_place, square_sum, mask=block_mask)
        value = value - step_size * tl.div_rn(grad, _by_block(tl.sqrt_rn(square_sum) + eps, grad))
    else:
        first = first + (grad - first) * rest1
        tl.store(state0 + place, first, mask=mask)
        if ALGORITHM == "rowwise_adam":
            second = second + (_block_mean(grad, mask, block, WIDTH, BLOCK_DIM) - second) * rest2
            tl.store(state1 + block_place, second, mask=block_mask)
            root = tl.sqrt_rn(second)
            if CORRECTED:
                root = tl.div_rn(root, tl.zeros_like(root) + correction)
            divisor = _by_block(root + eps, grad)
        else:
            second = second + (grad * grad - second) * rest2
            tl.store(state1 + place, second, mask=mask)
            root = tl.sqrt_rn(second)
            if CORRECTED:
                root = tl.div_rn(root, tl.zeros_like(root) + correction)
            divisor = root + eps
        value = value - step_size * tl.div_rn(first, divisor)
    if BOUNDED:
        value = _bounded(value, mask, max_norm)

    if MASTERED:
        tl.store(master + place, value, mask=mask)
    random = value
    if RANDOMLY:
        slot = tl.load(slots + run, mask=exists, other=0)
        table_column = tl.load(table_columns + columns // COLUMNS_OF, mask=column_mask, other=0)
        random = random_bits(key, slot[:, None, None], table_column + columns % COLUMNS_OF)
    store_values(rows, scales, row, columns, mask, block, block_mask, value, random, STRIDE, SCALES, RANDOMLY)


def _launch_step(
    paged: Paged,
    state: dict[str, Tensor],
    pairs: SortedPairs,
    step: OptimizerStep,
    operands: tuple[Tensor, ...],
    *,
    fused: bool,
    weighted: bool,
) -> None:
    num_rows = pairs.rows.numel()
    if not num_rows:
        return
    names = STATE_NAMES[step.algorithm]
    bounded = not math.isinf(step.max_norm)
    blocked = paged.packed is not None or bounded or not BLOCK_STATE.isdisjoint(names)
    tile = tuning.step_tile(paged, step.block_dim if blocked else None)
    # float32 is never rounded, and what has a master is rounded to nearest.
    rounding = None if MASTER in state or paged.rows.dtype == torch.float32 else step.rounding
    rows, scales = arena(paged)
    nothing = operands[0]
    with torch.cuda.device_of(rows):
        step_kernel[tile.grid(num_rows)](
            rows,
            scales,
            state.get(MASTER, nothing),
            *[*(state[name] for name in names), nothing, nothing][:2],
            contiguous(pairs.rows),
            contiguous(pairs.slots),
            pairs.slots if rounding is None else contiguous(rounding.columns),
            *operands,
            num_rows,
            0 if rounding is None else rounding.key,
            float(step.grad_scale),
            float(step.step_size),
            float(step.eps),
            1.0 - step.beta1,
            1.0 - step.beta2,
            float(step.root_correction),
            float(step.decay),
            float(step.gradient_decay),
            float(step.momentum),
            1.0 - step.dampening,
            float(step.max_norm),
            ALGORITHM=step.algorithm,
            FUSED=fused,
            WEIGHTED=weighted,
            MASTERED=MASTER in state,
            RANDOMLY=rounding is not None,
            CORRECTED=step.corrected,
            L2=step.gradient_decay != 0.0,
            # AdamW's decay is no option: its kernel is one with and without.
            DECAYED=step.algorithm == "adamw" or step.decay != 1.0,
            NESTEROV=step.nesterov,
            BOUNDED=bounded,
            COLUMNS_OF=step.block_dim if rounding is not None else 1,
            NUM_BLOCKS=-(-paged.width // tile.block_dim),
            UNROLL=tuning.STEP_UNROLL,
            **tile.options,
            **STRICT,
        )


def optimizer_step(
    paged: Paged, state: dict[str, Tensor], pairs: SortedPairs, sums: Tensor, step: OptimizerStep
) -> None:
    """See mempool.kernels.optimizer_step."""
    sums = contiguous(sums)
    operands = (sums, pairs.rows, pairs.rows, sums, pairs.rows, sums)
    _launch_step(paged, state, pairs, step, operands, fused=False, weighted=False)


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
    bags, grads = contiguous(bags), contiguous(grads)
    scratch = sum_pieces(pairs, weights, bags, grads)
    operands = (scratch, pairs.order, pairs.starts, optional_weights(weights, grads), bags, grads)
    _launch_step(paged, state, pairs, step, operands, fused=True, weighted=weights is not None)


@triton.jit(do_not_specialize=["num_elements"])
def squared_norm_kernel(sums, partial, num_elements, TILE: tl.constexpr, CHUNK: tl.constexpr):
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
    tl.store(partial + tl.num_programs(0) + chunk, tl.sum(bad, axis=0).to(tl.float64))


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """See mempool.kernels.squared_norm. Waits for the GPU."""
    num_chunks = triton.cdiv(sums.numel(), tuning.NORM_CHUNK)
    if num_chunks == 0:
        return 0.0, True
    partial = torch.empty(2, num_chunks, dtype=torch.float64, device=sums.device)
    with torch.cuda.device_of(sums):
        squared_norm_kernel[(num_chunks,)](
            contiguous(sums), partial, sums.numel(), TILE=tuning.NORM_TILE, CHUNK=tuning.NORM_CHUNK
        )
    total, not_finite = partial.sum(dim=1).tolist()
    return total, not_finite == 0.0


def segment_sum_and_norm(
    pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> tuple[Tensor, float, bool]:
    """See mempool.kernels.segment_sum_and_norm."""
    sums = segment_sum(pairs, weights, bags, grads)
    return sums, *squared_norm(sums)
