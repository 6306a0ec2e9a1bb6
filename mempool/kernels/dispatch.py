"""Each function of the kernels' contract: arguments are checked, the device picks the implementation.

Shape legend: B bags, L pairs in all bags, R arena rows, W arena row width, P pages, U distinct rows, H heads, K top-k,
D key dim, n half-keys of a codebook, M rows of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.checking import (
    check_bags,
    check_catch_up,
    check_ids,
    check_matrix,
    check_output_dtype,
    check_product_gradient,
    check_product_keys,
    check_product_selection,
    check_segments,
    check_sorted,
    check_state,
    check_topk,
    check_weights,
)
from mempool.kernels.implementation import implementation_for
from mempool.kernels.steps import DenseSchedule, OptimizerStep


def weighted_sum(
    paged: Paged,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sum the weighted values of each bag.

    Accumulates in float32, pair after pair, every column apart from the others and by fused multiply-adds, rounded once
    a pair: the sum over a slice of an arena's columns is bitwise the slice of the sum. Of packed rows, the weight is
    first multiplied with the block's scale, then with the element. The sum is rounded to ``dtype`` once, at the end.
    Where neither Numba nor Triton is there, torch's own operations round each product too.

    Args:
        paged: The values.
        ids: [L] int64 slot ids; pairs that are not here contribute nothing.
        weights: [L] float32, or None for all ones.
        offsets: [B + 1] int64; the pairs of bag b are ``offsets[b]:offsets[b + 1]``. Starts with 0, ends with L.
        dtype: Of the result: float32, bfloat16 or float16.

    Returns:
        [B, W] in ``dtype``.

    Raises:
        ValueError: A tensor has another shape, dtype or device.
    """
    check_bags(paged, ids, offsets)
    check_weights(weights, ids)
    check_output_dtype(dtype)
    return implementation_for(paged.rows.device).weighted_sum(paged, ids, weights, offsets, dtype)


def gather_rows(paged: Paged, ids: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Read rows.

    Args:
        paged: The values.
        ids: [M] int64 slot ids.
        dtype: Of the result: float32, bfloat16 or float16; None for ``paged.value_dtype``, the stored bits as they are.

    Returns:
        [M, W] in ``dtype``; zeros for slots that are not here.
    """
    check_ids(paged, ids)
    dtype = paged.value_dtype if dtype is None else dtype
    check_output_dtype(dtype)
    return implementation_for(paged.rows.device).gather_rows(paged, ids, dtype)


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """Write rows in place; of repeated ids the last wins, slots that are not here are skipped.

    Packed rows get new scales, and elements rounded to nearest, ties to even.

    Args:
        paged: The values, written in place.
        ids: [M] int64 slot ids.
        values: [M, W] in ``paged.value_dtype``.
    """
    check_ids(paged, ids)
    check_matrix("values", values, (ids.numel(), paged.width), paged.value_dtype, paged.rows.device)
    implementation_for(paged.rows.device).scatter_rows(paged, ids, values)


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor) -> Tensor:
    """Gradient of weighted_sum with respect to the weights: ``<grads[bag], V[id]>`` for each pair.

    Args:
        paged: The values.
        ids: [L] int64 slot ids.
        offsets: [B + 1] int64, as in weighted_sum.
        grads: [B, W] float32, the gradient of the sums.

    Returns:
        [L] float32, 0 for pairs that are not here. Accumulated in float32.
    """
    check_bags(paged, ids, offsets)
    check_matrix("grads", grads, (offsets.numel() - 1, paged.width), torch.float32, paged.rows.device)
    return implementation_for(paged.rows.device).weight_gradient(paged, ids, offsets, grads)


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """Bring pairs into the canonical order: by slot id, stable, pairs that are not here left out.

    Args:
        paged: The table's page table; its values are not read.
        ids: [L] int64 slot ids, in the order in which gradients are to be summed.
    """
    check_ids(paged, ids)
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


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row by (score descending, index ascending); NaN never wins over a number.

    torch.topk does not say which of equal scores it takes; this does. Not differentiable: gather the scores again by
    the index for a gradient.

    Args:
        scores: [M, n] float32.
        k: Winners of a row, 1 to n.

    Returns:
        Values [M, k] float32 and index [M, k] int64, best first.
    """
    check_topk("scores", scores, k, scores.shape[-1])
    return implementation_for(scores.device).select_topk(scores.detach(), k)


def product_select(scores1: Tensor, scores2: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """The two-stage selection of product keys, given the scores of both halves.

    Takes the top min(k, n) of each half by (score descending, index ascending), then of their float32 sums the top k
    by (score descending, id ascending), ``id = i1 * stride + i2``. (Memory Layers at Scale, arXiv 2412.09764.)

    Args:
        scores1: [M, n] float32, scores of the first halves.
        scores2: [M, n] float32, scores of the second halves.
        k: Winners, 1 to n * n.
        stride: Distance of ids that differ by one in i1; at least n.

    Returns:
        i1 [M, k] and i2 [M, k], int64, best first.
    """
    num_keys = scores1.shape[-1]
    check_product_selection(num_keys, k, stride)
    check_matrix("scores1", scores1, (scores1.shape[0], num_keys), torch.float32, scores1.device)
    check_matrix("scores2", scores2, (scores1.shape[0], num_keys), torch.float32, scores1.device)
    return implementation_for(scores1.device).product_select(scores1.detach(), scores2.detach(), k, stride)


def product_topk(
    queries: Tensor, keys: Tensor, k: int, stride: int | None = None, *, deterministic: bool = True
) -> tuple[Tensor, Tensor]:
    """Score queries against product keys and select as product_select does, without keeping the half scores.

    Args:
        queries: [B, H, D] float32; the first D // 2 columns meet the first codebook.
        keys: [H, 2, n, D // 2] float32.
        k: Winners of a head, 1 to n * n.
        stride: As in product_select; n if not given.
        deterministic: Half scores are summed in a fixed order, so that a query has the same bits alone and in any
            batch. False leaves the order to whatever is fastest; results then agree to rounding.

    Returns:
        Scores [B, H, k] float32 and slot ids [B, H, k] int64, best first.
    """
    stride = keys.shape[2] if stride is None else stride
    check_product_selection(keys.shape[2], k, stride)
    scores, index1, index2 = product_indices(queries, keys, k, deterministic=deterministic)
    return scores, index1 * stride + index2


def product_indices(
    queries: Tensor, keys: Tensor, k: int, *, deterministic: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """product_topk with the chosen half-keys in place of slot ids, as the gradient needs them.

    Args:
        queries: As in product_topk.
        keys: As in product_topk.
        k: As in product_topk.
        deterministic: As in product_topk.

    Returns:
        Scores [B, H, k] float32, i1 and i2 [B, H, k] int64, best first.
    """
    check_product_keys(queries, keys, k, keys.shape[2])
    return implementation_for(queries.device).product_topk(queries.detach(), keys.detach(), k, deterministic)


def product_gradient(
    queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the scores of product_indices with respect to queries and keys.

    Only chosen half-keys are read and only they get a gradient. Sums are made in float32 in a fixed order: of a query
    by the rank of its winners; of a half-key by (query, rank).

    Args:
        queries: [B, H, D] float32.
        keys: [H, 2, n, D // 2] float32.
        index1: [B, H, K] int64, the chosen half-keys of the first codebook.
        index2: [B, H, K] int64, of the second.
        grads: [B, H, K] float32, the gradient of the scores.

    Returns:
        [B, H, D] and [H, 2, n, D // 2] float32; zeros for half-keys that were not chosen.
    """
    check_product_gradient(queries, keys, index1, index2, grads)
    implementation = implementation_for(queries.device)
    return implementation.product_gradient(queries.detach(), keys.detach(), index1, index2, grads.detach())


def flat_topk(
    queries: Tensor, keys: Paged, k: int, num_slots: int, *, deterministic: bool = True
) -> tuple[Tensor, Tensor]:
    """Score queries against the flat keys of every slot that is here; the k best by (score descending, id ascending).

    Slots are scored in tiles with a running top-k, so memory does not grow with the table.

    Args:
        queries: [B, D] float32.
        keys: The keys, an arena [R, D] of float32 or bfloat16.
        k: Winners of a query, at least 1.
        num_slots: Ids from here on are no slots (the last page may be part empty).
        deterministic: A score has the same bits in any batch and for any cut of the keys over arenas and shards. False
            leaves the order of its sum to whatever is fastest.

    Returns:
        Scores [B, k] float32 and slot ids [B, k] int64, best first, padded with -inf and -1 where there are fewer
        candidates. A slot whose score is NaN is no candidate.
    """
    check_matrix("queries", queries, (queries.shape[0], keys.width), torch.float32, keys.rows.device)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if keys.packed is not None:
        raise ValueError(f"keys must be float32 or bfloat16, got {keys.element}")
    return implementation_for(queries.device).flat_topk(queries.detach(), keys, k, num_slots, deterministic)


def initial_values(
    seed: int, slots_start: int, num_slots: int, column_start: int, num_columns: int, std: float
) -> Tensor:
    """Initial values of a table: N(0, std**2), each a function of (seed, slot, column) alone.

    Every slicing, machine and implementation gives the same bits; see reference.initial_values for the generator.

    Args:
        seed: The table's seed.
        slots_start: First slot.
        num_slots: Slots, one a row.
        column_start: First column.
        num_columns: Columns.
        std: Standard deviation.

    Returns:
        [num_slots, num_columns] float32 on the CPU.
    """
    return implementation_for(torch.device("cpu")).initial_values(
        seed,
        slots_start=slots_start,
        num_slots=num_slots,
        column_start=column_start,
        num_columns=num_columns,
        std=std,
    )
