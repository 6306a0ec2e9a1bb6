"""The missed steps of a dense AdamW on the GPU."""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.gpu import tuning
from mempool.kernels.gpu.elements import STRICT, arena, contiguous, storage, store_values, tile_columns
from mempool.kernels.steps import LAST_STEP, MASTER, DenseSchedule


@triton.jit(do_not_specialize=["num_rows", "steps_stride", "first_step", "to", "horizon", "beta1", "beta2", "eps"])
def catch_up_kernel(
    rows,
    scales,
    values,
    moment1,
    moment2,
    last_step,
    targets,
    steps,
    log_decays,
    num_rows,
    steps_stride,
    first_step,
    to,
    horizon,
    beta1,
    beta2,
    eps,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    MASTERED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program some rows and a tile of whole column blocks, each of which has its own last step.

    ``steps`` are step sizes, corrections of the root and decays, ``steps_stride`` apart.
    """
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = number < num_rows
    columns, mask, block = tile_columns(tl.program_id(1), WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
    block_mask = exists[:, None] & (block * BLOCK_DIM < WIDTH)
    row = tl.load(targets + number, mask=exists, other=0)
    done_place = last_step + row[:, None] * NUM_BLOCKS + block
    done = tl.load(done_place, mask=block_mask, other=0)
    block_mask = block_mask & (done < to)
    mask = mask & block_mask[:, :, None]
    place = row[:, None, None] * WIDTH + columns
    value = tl.load(values + place, mask=mask, other=0.0)
    first = tl.load(moment1 + place, mask=mask, other=0.0)
    second = tl.load(moment2 + place, mask=mask, other=0.0)

    begin = tl.where(block_mask, tl.maximum(done + 1 - first_step, 0), 0)
    end = tl.where(block_mask, to + 1 - first_step, 0)
    # Without momentum there is nothing to follow (unless a root of 0 is divided by): the closed form holds at once.
    moving = (tl.max((first != 0.0).to(tl.int32), axis=2) > 0) | (eps <= 0.0)
    turn = tl.where(moving, tl.minimum(end, begin + horizon), begin)
    log_decay = tl.load(log_decays + end, mask=block_mask, other=0.0)
    log_decay -= tl.load(log_decays + turn, mask=block_mask, other=0.0)
    turn = tl.where(log_decay == log_decay, turn, end)

    following = tl.where(block_mask & (begin < turn), begin, 2147483647)
    for step in range(tl.min(tl.min(following, axis=1), axis=0), tl.max(tl.max(turn, axis=1), axis=0)):
        due = ((begin <= step) & (step < turn))[:, :, None]
        step_size = tl.load(steps + step)
        correction = tl.load(steps + steps_stride + step)
        decay = tl.load(steps + 2 * steps_stride + step)
        first = tl.where(due, first * beta1, first)
        second = tl.where(due, second * beta2, second)
        root = tl.div_rn(tl.sqrt_rn(second), tl.zeros_like(second) + correction)
        value = tl.where(due, value * decay - step_size * tl.div_rn(first, root + eps), value)

    rest = (end - turn).to(tl.float64)
    closed = block_mask & (turn < end)
    decay = tl.where(closed, tl.exp(log_decay).to(tl.float32), 1.0)[:, :, None]
    decay1 = tl.where(closed, tl.exp(rest * tl.full([], LOG_BETA1, tl.float64)).to(tl.float32), 1.0)[:, :, None]
    decay2 = tl.where(closed, tl.exp(rest * tl.full([], LOG_BETA2, tl.float64)).to(tl.float32), 1.0)[:, :, None]
    value = value * decay
    tl.store(moment1 + place, first * decay1, mask=mask)
    tl.store(moment2 + place, second * decay2, mask=mask)
    tl.store(values + place, value, mask=mask)
    if MASTERED:
        store_values(rows, scales, row, columns, mask, block, block_mask, value, value, STRIDE, SCALES, False)
    tl.store(done_place, tl.zeros_like(done) + to, mask=block_mask)


def _log(beta: float) -> float:
    # exp(-1e30 * n) is 0, and unlike infinity it can be multiplied with n = 0.
    return math.log(beta) if beta > 0.0 else -1e30


def catch_up(
    paged: Paged, state: dict[str, Tensor], rows: Tensor, schedule: DenseSchedule, to: int, block_dim: int
) -> None:
    """See mempool.kernels.catch_up."""
    if not rows.numel():
        return
    tile = tuning.step_tile(paged, block_dim)
    stored, scales = arena(paged)
    steps = schedule.steps
    with torch.cuda.device_of(stored):
        catch_up_kernel[tile.grid(rows.numel())](
            stored,
            scales,
            state.get(MASTER, stored),
            storage(state["exp_avg"]),
            storage(state["exp_avg_sq"]),
            state[LAST_STEP],
            contiguous(rows),
            steps,
            schedule.log_decays,
            rows.numel(),
            steps.stride(0),
            schedule.first_step,
            to,
            schedule.horizon,
            float(schedule.beta1),
            float(schedule.beta2),
            float(schedule.eps),
            LOG_BETA1=_log(schedule.beta1),
            LOG_BETA2=_log(schedule.beta2),
            MASTERED=MASTER in state,
            NUM_BLOCKS=-(-paged.width // tile.block_dim),
            **tile.options,
            **STRICT,
        )
