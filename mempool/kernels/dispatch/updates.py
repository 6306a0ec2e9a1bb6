"""A commit: pairs in their canonical order, sums of gradients, optimizer steps, norms.

Arguments are checked, the device picks the implementation.

Legend: B bags, L pairs in all bags, U distinct rows, R arena rows, W arena row width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.checking import check_catch_up, check_ids, check_matrix, check_segments, check_sorted, check_state
from mempool.kernels.implementation import implementation_for
from mempool.kernels.steps import DenseSchedule, OptimizerStep


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """Bring pairs into the canonical order: by slot id, stable, pairs that are not here left out.

    Args:
        paged: The table's page table; its values are not read.
        ids: [L] int64, int32 or uint32 slot ids, in the order in which gradients are to be summed.
    """
    ids = check_ids(paged, ids)
    return implementation_for(paged.rows.device).sort_pairs(paged, ids)


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """Sum the gradients of each distinct row, in the order of its pairs: deterministic, like weighted_sum.

    A row's pairs are summed in pieces of RUN_PIECE, each from zero, pair after pair, and the pieces' sums one after
    another: hot slots can be split over programs, and every implementation has the same order.

    Args:
        pairs: Sorted pairs.
        weights: [L] float32 by pair, or None for all ones.
        bags: [L] int64, the bag (row of grads) of each pair.
        grads: [B, W] float32.

    Returns:
        [U, W] float32, the sum of ``weights[pair] * grads[bags[pair]]``.
    """
    check_sorted(pairs, weights, bags, grads)
    return implementation_for(grads.device).segment_sum(pairs, weights, bags, grads)


def segment_sum_and_norm(
    pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> tuple[Tensor, float, bool]:
    """segment_sum, and squared_norm of what it returns, to the bit; on the CPU in one pass.

    Args:
        pairs: As in segment_sum.
        weights: As in segment_sum.
        bags: As in segment_sum.
        grads: As in segment_sum.

    Returns:
        The sums [U, W] float32, the sum of their squares in float64, and whether every element is finite.
    """
    check_sorted(pairs, weights, bags, grads)
    return implementation_for(grads.device).segment_sum_and_norm(pairs, weights, bags, grads)


def add_segments(
    sums: Tensor, places: Tensor, pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> None:
    """Add the segment sums of a part of a step's pairs to sums of parts before: bounds the memory of a large step.

    Adds the sums of the part's pieces to ``sums[places[u]]``, one after another. A row's pairs in parts that end after
    a multiple of RUN_PIECE pairs of it, added part after part, have the sum of all of them at once, to the bit.

    Args:
        sums: [V, W] float32, contiguous, changed in place; zeros before the first part.
        places: [U] int64, all different: the row of ``sums`` of each distinct row of ``pairs``.
        pairs: As in segment_sum.
        weights: As in segment_sum.
        bags: As in segment_sum.
        grads: As in segment_sum.
    """
    check_sorted(pairs, weights, bags, grads)
    check_segments(sums, places, pairs, grads.shape[1])
    implementation_for(grads.device).add_segments(sums, places, pairs, weights, bags, grads)


def optimizer_step(
    paged: Paged, state: dict[str, Tensor], pairs: SortedPairs, sums: Tensor, step: OptimizerStep
) -> None:
    """Apply one optimizer step to distinct rows, in place, in float32.

    The new values are rounded to the stored element as ``step.rounding`` says; packed rows get new scales, the largest
    magnitude of each block divided by the element's largest number.

    Args:
        paged: The values; of its page table nothing is used.
        state: The algorithm's state by name (STATE_NAMES), float32: [R, W], or [R, blocks] for "row_sum" and
            "row_exp_avg_sq", which take the mean of the squared gradient over a block's columns. With "master" [R, W]
            the step is made on those values, and the stored ones are rounded from them. Other names are left alone.
        pairs: Its rows [U], all different, and their slots.
        sums: [U, W] float32 summed gradients (``segment_sum``).
        step: The rule and its numbers.
    """
    check_state(paged, state, step)
    check_matrix("sums", sums, (pairs.rows.numel(), paged.width), torch.float32, paged.rows.device)
    implementation_for(paged.rows.device).optimizer_step(paged, state, pairs, sums, step)


def fused_step(
    paged: Paged,
    state: dict[str, Tensor],
    pairs: SortedPairs,
    weights: Tensor | None,
    bags: Tensor,
    grads: Tensor,
    step: OptimizerStep,
) -> None:
    """segment_sum and optimizer_step in one pass, without the [U, W] sums in memory; bitwise the same result.

    Args:
        paged: As in optimizer_step.
        state: As in optimizer_step.
        pairs: As in segment_sum, sorted under the same page table.
        weights: As in segment_sum.
        bags: As in segment_sum.
        grads: As in segment_sum, W columns.
        step: As in optimizer_step.
    """
    check_state(paged, state, step)
    check_sorted(pairs, weights, bags, grads)
    check_matrix("grads", grads, (grads.shape[0], paged.width), torch.float32, paged.rows.device)
    implementation_for(paged.rows.device).fused_step(paged, state, pairs, weights, bags, grads, step)


def catch_up(
    paged: Paged,
    state: dict[str, Tensor],
    rows: Tensor,
    schedule: DenseSchedule,
    *,
    to: int,
    block_dim: int,
) -> None:
    """Do the steps that rows of a dense AdamW missed: those with a gradient of zero since their last step, in place.

    For each row and block from ``last_step + 1`` to ``to``, what ``torch.optim.AdamW`` does to an element whose
    gradient is zero; then ``last_step = to``. Momentum is followed step by step for ``schedule.horizon`` steps, after
    which what is left of it changes nothing, and in closed form from there. With "master" the master is changed, and
    the stored values are rounded from it to nearest.

    Args:
        paged: The values, float32, or any with "master".
        state: "exp_avg", "exp_avg_sq" [R, W] float32, "last_step" [R, blocks] int32, and "master" if kept.
        rows: [U] int64 arena rows, all different.
        schedule: What each step does.
        to: The step up to which rows are brought; rows that are there already, or further, are left as they are.
        block_dim: Columns of a block.
    """
    check_catch_up(paged, state, rows, schedule, to, block_dim)
    implementation_for(paged.rows.device).catch_up(paged, state, rows, schedule, to, block_dim)


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """Sum of squares, accumulated in float64, and whether every element is finite.

    Args:
        sums: [U, W] float32.
    """
    if sums.dim() != 2 or sums.dtype != torch.float32:
        raise ValueError(f"sums must be float32 [U, W], got {sums.dtype} {list(sums.shape)}")
    return implementation_for(sums.device).squared_norm(sums)
