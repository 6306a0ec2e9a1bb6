"""A commit in torch's own operations: sums, the optimizers, missed steps, norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mempool.kernels.arguments import RUN_PIECE, Paged, SortedPairs
from mempool.kernels.reference.elements import random_bits
from mempool.kernels.reference.updates import table_columns
from mempool.kernels.steps import LAST_STEP, MASTER, STATE_NAMES, DenseSchedule, OptimizerStep
from mempool.kernels.torch_ops.bags import bag_of_pairs, chunks
from mempool.kernels.torch_ops.elements import read_rows, write_rows


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.segment_sum."""
    out = torch.zeros(pairs.rows.numel(), grads.shape[1], dtype=torch.float32, device=grads.device)
    add_segments(out, torch.arange(out.shape[0], device=grads.device), pairs, weights, bags, grads)
    return out


def add_segments(
    sums: Tensor, places: Tensor, pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> None:
    """See mempool.kernels.add_segments."""
    num_pairs = pairs.order.numel()
    num_pieces = -(-pairs.starts.diff() // RUN_PIECE)
    first_piece = num_pieces.cumsum(0) - num_pieces
    rows = bag_of_pairs(pairs.starts, num_pairs)
    piece = first_piece[rows] + (torch.arange(num_pairs, device=rows.device) - pairs.starts[rows]) // RUN_PIECE
    pieces = torch.zeros(int(num_pieces.sum()), grads.shape[1], dtype=torch.float32, device=grads.device)
    for first, end in chunks(num_pairs, grads.shape[1]):
        order = pairs.order[first:end]
        parts = grads[bags[order]]
        if weights is not None:
            parts *= weights[order, None]
        pieces.index_add_(0, piece[first:end], parts)
    for number in range(int(num_pieces.max()) if num_pieces.numel() else 0):
        longer = (num_pieces > number).nonzero().squeeze(1)
        sums[places[longer]] += pieces[first_piece[longer] + number]


def _blocks(width: int, block_dim: int) -> list[tuple[int, slice]]:
    # No further than the row's width: behind it, a packed row has its scales.
    starts = range(0, width, block_dim)
    return [(block, slice(start, min(start + block_dim, width))) for block, start in enumerate(starts)]


def _moved(state: Tensor, rows: Tensor, target: Tensor, share: float) -> Tensor:
    moved = state[rows]
    moved += (target - moved) * share
    state[rows] = moved
    return moved


def _mean_squares(grads: Tensor, block_dim: int) -> Tensor:
    means = [grads[:, columns].square().mean(dim=1) for _, columns in _blocks(grads.shape[1], block_dim)]
    return torch.stack(means, dim=1)


def _update(state: dict[str, Tensor], rows: Tensor, grads: Tensor, step: OptimizerStep) -> Tensor:
    """What the step size multiplies; brings the state on."""
    if step.algorithm == "sgd":
        return grads
    states = [state[name] for name in STATE_NAMES[step.algorithm]]
    if step.algorithm == "sgd_momentum":
        return _momentum(states[0], rows, grads, step)
    if step.algorithm in ("adagrad", "rowwise_adagrad"):
        squares = grads * grads if step.algorithm == "adagrad" else _mean_squares(grads, step.block_dim)
        total = states[0][rows] + squares
        states[0][rows] = total
        update, divisor = grads, total.sqrt() + step.eps
    else:
        squares = _mean_squares(grads, step.block_dim) if step.algorithm == "rowwise_adam" else grads * grads
        update = _moved(states[0], rows, grads, 1.0 - step.beta1)
        divisor = _moved(states[1], rows, squares, 1.0 - step.beta2).sqrt() / step.root_correction + step.eps
    if divisor.shape != grads.shape:
        divisor = divisor.repeat_interleave(step.block_dim, dim=1)[:, : grads.shape[1]]
    return update / divisor


def _momentum(buffers: Tensor, rows: Tensor, grads: Tensor, step: OptimizerStep) -> Tensor:
    buffer = buffers[rows]
    fresh = (buffer == 0) & torch.signbit(buffer)  # NO_MOMENTUM; adding 0.0 keeps a gradient of -0.0 apart from it
    buffer = torch.where(fresh, grads, step.momentum * buffer + (1.0 - step.dampening) * grads) + 0.0
    buffers[rows] = buffer
    return grads + step.momentum * buffer if step.nesterov else buffer


def optimizer_step(
    paged: Paged, state: dict[str, Tensor], pairs: SortedPairs, sums: Tensor, step: OptimizerStep
) -> None:
    """See mempool.kernels.optimizer_step."""
    for first, end in chunks(sums.shape[0], paged.width):
        rows = pairs.rows[first:end]
        values = state[MASTER][rows] if MASTER in state else read_rows(paged, rows)
        grads = sums[first:end] * step.grad_scale
        if step.gradient_decay:
            grads = grads + step.gradient_decay * values
        update = _update(state, rows, grads, step)
        values = values * step.decay - step.step_size * update
        if math.isfinite(step.max_norm):
            norms = values.square().sum(dim=1, keepdim=True).sqrt()
            values = torch.where(norms > step.max_norm, values * (step.max_norm / norms), values)
        random = None
        if MASTER in state:
            state[MASTER][rows] = values
        elif step.rounding is not None and paged.rows.dtype != torch.float32:
            columns = table_columns(step.rounding, paged.width, step.block_dim)
            random = random_bits(step.rounding.key, pairs.slots[first:end], columns)
        write_rows(paged, rows, values, random)


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
    optimizer_step(paged, state, pairs, segment_sum(pairs, weights, bags, grads), step)


def catch_up(
    paged: Paged, state: dict[str, Tensor], rows: Tensor, schedule: DenseSchedule, to: int, block_dim: int
) -> None:
    """See mempool.kernels.catch_up."""
    for first, end in chunks(rows.numel(), paged.width):
        part = rows[first:end]
        missed = (to - state[LAST_STEP][part]).clamp(min=0)
        behind = missed.amax(dim=1) > 0
        _catch_up(paged, state, part[behind], missed[behind], schedule, to, block_dim)


def _catch_up(
    paged: Paged,
    state: dict[str, Tensor],
    rows: Tensor,
    missed: Tensor,
    schedule: DenseSchedule,
    to: int,
    block_dim: int,
) -> None:
    before = read_rows(paged, rows) if MASTER not in state else state[MASTER][rows]
    values, moment1, moment2 = before, state["exp_avg"][rows], state["exp_avg_sq"][rows]
    end = to + 1 - schedule.first_step
    # Never before what is recorded, whatever the state says: there is no step to read there.
    num_steps = missed.clamp(max=end).repeat_interleave(block_dim, dim=1)[:, : paged.width].to(torch.int64)
    turn = num_steps.clamp(max=schedule.horizon)
    log_decays = schedule.log_decays[end] - schedule.log_decays[end - num_steps + turn]
    turn = torch.where(log_decays.isnan(), num_steps, turn)
    for number in range(int(turn.max()) if turn.numel() else 0):
        active = number < turn
        place = torch.where(active, end - num_steps + number, 0)
        step_sizes, corrections, decays = (row[place] for row in schedule.steps)
        moment1 = torch.where(active, moment1 * schedule.beta1, moment1)
        moment2 = torch.where(active, moment2 * schedule.beta2, moment2)
        update = moment1 / (moment2.sqrt() / corrections + schedule.eps)
        values = torch.where(active, values * decays - step_sizes * update, values)
    left = (num_steps - turn).double()
    closed = left > 0
    values = torch.where(closed, values * log_decays.exp().float(), values)
    moment1 = torch.where(closed, moment1 * (schedule.beta1**left).float(), moment1)
    moment2 = torch.where(closed, moment2 * (schedule.beta2**left).float(), moment2)
    state["exp_avg"][rows], state["exp_avg_sq"][rows] = moment1, moment2
    state[LAST_STEP][rows] = state[LAST_STEP][rows].clamp(min=to)
    if MASTER in state:
        state[MASTER][rows] = values
        _write_blocks(paged, rows, values, missed > 0, block_dim)
    else:
        write_rows(paged, rows, values)


def _write_blocks(paged: Paged, rows: Tensor, values: Tensor, changed: Tensor, block_dim: int) -> None:
    """Round to nearest, and leave the stored elements and scales of blocks that have not changed."""
    kept = paged.rows[rows]
    write_rows(paged, rows, values)
    written = paged.rows[rows]
    for block, columns in _blocks(paged.width, block_dim):
        same = ~changed[:, block]
        written[same, columns] = kept[same, columns]
        if paged.packed is not None:
            first = paged.packed.scales_start + 4 * block
            written[same, first : first + 4] = kept[same, first : first + 4]
    paged.rows[rows] = written


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """See mempool.kernels.squared_norm."""
    total = torch.zeros((), dtype=torch.float64, device=sums.device)
    finite = torch.ones((), dtype=torch.bool, device=sums.device)
    for first, end in chunks(sums.shape[0], sums.shape[1]):
        total += sums[first:end].double().square().sum()
        finite &= torch.isfinite(sums[first:end]).all()
    return float(total), bool(finite)


def segment_sum_and_norm(
    pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> tuple[Tensor, float, bool]:
    """See mempool.kernels.segment_sum_and_norm."""
    sums = segment_sum(pairs, weights, bags, grads)
    return sums, *squared_norm(sums)
