"""A commit, one row at a time in float64: sorting, sums, the optimizers' formulas."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.layout import num_blocks
from mempool.kernels.reference.bags import arena_row
from mempool.kernels.steps import LAST_STEP, DenseSchedule, OptimizerStep, RandomRounding


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """Pairs that are here by (slot id, position)."""
    slots = ids.tolist()
    order = sorted((pair for pair in range(len(slots)) if arena_row(paged, slots[pair]) >= 0), key=slots.__getitem__)
    starts = [place for place, pair in enumerate(order) if place == 0 or slots[pair] != slots[order[place - 1]]]
    distinct = [slots[order[place]] for place in starts]
    return SortedPairs(
        order=torch.tensor(order, dtype=torch.int64),
        rows=torch.tensor([arena_row(paged, slot) for slot in distinct], dtype=torch.int64),
        slots=torch.tensor(distinct, dtype=torch.int64),
        starts=torch.tensor([*starts, len(order)], dtype=torch.int64),
    )


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """out[u] = sum of weights[i] * grads[bags[i]] over the pairs i of segment u."""
    bounds = pairs.starts.tolist()
    out = torch.zeros(len(bounds) - 1, grads.shape[1], dtype=torch.float64)
    for segment, (first, end) in enumerate(itertools.pairwise(bounds)):
        for pair in pairs.order[first:end].tolist():
            weight = 1.0 if weights is None else float(weights[pair])
            out[segment] += weight * grads[bags[pair]].double().cpu()
    return out


def optimizer_step(
    values: Tensor, state: dict[str, Tensor], sorted_rows: Tensor, sums: Tensor, step: OptimizerStep
) -> None:
    """The optimizer's formulas on float64 ``values`` [R, W] and float64 ``state``, in place; nothing is rounded."""
    rows, grads = sorted_rows.cpu(), sums.double().cpu() * step.grad_scale
    if step.gradient_decay:
        grads = grads + step.gradient_decay * values[rows]
    blocks = [
        slice(first, min(first + step.block_dim, grads.shape[1])) for first in range(0, grads.shape[1], step.block_dim)
    ]
    if step.algorithm == "sgd":
        update = grads
    elif step.algorithm == "sgd_momentum":
        update = _momentum(state["momentum_buffer"], rows, grads, step)
    elif step.algorithm == "adagrad":
        state["sum"][rows] += grads**2
        update = grads / (state["sum"][rows].sqrt() + step.eps)
    elif step.algorithm == "rowwise_adagrad":
        update = torch.empty_like(grads)
        for block, columns in enumerate(blocks):
            state["row_sum"][rows, block] += (grads[:, columns] ** 2).mean(dim=1)
            update[:, columns] = grads[:, columns] / (state["row_sum"][rows, block].sqrt()[:, None] + step.eps)
    else:
        first = state["exp_avg"]
        first[rows] = step.beta1 * first[rows] + (1 - step.beta1) * grads
        if step.algorithm == "rowwise_adam":
            update, second = torch.empty_like(grads), state["row_exp_avg_sq"]
            for block, columns in enumerate(blocks):
                mean = (grads[:, columns] ** 2).mean(dim=1)
                second[rows, block] = step.beta2 * second[rows, block] + (1 - step.beta2) * mean
                root = second[rows, block].sqrt()[:, None] / step.root_correction
                update[:, columns] = first[rows, columns] / (root + step.eps)
        else:
            second = state["exp_avg_sq"]
            second[rows] = step.beta2 * second[rows] + (1 - step.beta2) * grads**2
            update = first[rows] / (second[rows].sqrt() / step.root_correction + step.eps)
    stepped = values[rows] * step.decay - step.step_size * update
    norms = stepped.norm(dim=1, keepdim=True)
    values[rows] = torch.where(norms > step.max_norm, stepped * (step.max_norm / norms), stepped)


def _momentum(buffers: Tensor, rows: Tensor, grads: Tensor, step: OptimizerStep) -> Tensor:
    buffer = buffers[rows]
    fresh = (buffer == 0) & torch.signbit(buffer)
    buffer = torch.where(fresh, grads, step.momentum * buffer + (1 - step.dampening) * grads) + 0.0
    buffers[rows] = buffer
    return grads + step.momentum * buffer if step.nesterov else buffer


def catch_up(
    values: Tensor, state: dict[str, Tensor], rows: Tensor, schedule: DenseSchedule, to: int, block_dim: int
) -> None:
    """Every missed step of every block, one by one, on float64 ``values`` [R, W] and moments, and "last_step"."""
    step_sizes, root_corrections, decays = schedule.steps.double().tolist()
    for row in rows.tolist():
        for block in range(num_blocks(values.shape[1], block_dim)):
            columns = slice(block * block_dim, (block + 1) * block_dim)
            value, first, second = (tensor[row, columns] for tensor in (values, state["exp_avg"], state["exp_avg_sq"]))
            for step in range(int(state[LAST_STEP][row, block]) + 1, to + 1):
                place = step - schedule.first_step
                first *= schedule.beta1
                second *= schedule.beta2
                update = first / (second.sqrt() / root_corrections[place] + schedule.eps)
                value *= decays[place]
                value -= step_sizes[place] * update
                state[LAST_STEP][row, block] = step


def table_columns(rounding: RandomRounding, width: int, block_dim: int) -> Tensor:
    """[W] int64: the table's column of each column of an arena, as ``random_bits`` takes them."""
    places = torch.arange(width, device=rounding.columns.device)
    return rounding.columns[places // block_dim] + places % block_dim


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """Sum of squares in float64 and whether all elements are finite."""
    return float(sums.double().square().sum()), bool(torch.isfinite(sums).all())
