"""The arithmetic of a shard, and of scoring on a trainer: each function runs on the device where its tensors are.

Triton on CUDA, Numba on the CPU, torch's own operations where those are missing; ``reference`` says in float64 what
each means. Callers never know which implementation runs. This package sees only tensors: ids come in validated.

Shape legend: B bags, L pairs in all bags, R arena rows, W arena row width, P pages, U distinct rows, H heads, K top-k,
D key dim, n half-keys of a codebook, M rows of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import (
    ALGORITHMS,
    STATE_NAMES,
    STORAGE_DTYPES,
    Algorithm,
    OptimizerStep,
    Paged,
    SortedPairs,
    num_blocks,
)
from mempool.kernels.checking import (
    check_bags,
    check_ids,
    check_matrix,
    check_product_keys,
    check_product_selection,
    check_sorted,
    check_state,
    check_topk,
    check_weights,
)
from mempool.kernels.implementation import Implementation, implementation, implementation_for

__all__ = [
    "STATE_NAMES",
    "Algorithm",
    "Implementation",
    "OptimizerStep",
    "Paged",
    "SortedPairs",
    "flat_topk",
    "fused_step",
    "gather_rows",
    "implementation",
    "initial_values",
    "num_blocks",
    "optimizer_step",
    "product_select",
    "product_topk",
    "scatter_rows",
    "segment_sum",
    "select_topk",
    "sort_pairs",
    "squared_norm",
    "warm_up",
    "weight_gradient",
    "weighted_sum",
]


def weighted_sum(paged: Paged, ids: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """Sum the weighted values of each bag.

    Accumulates in float32, pair after pair, every column apart from the others and without fused multiply-add: the sum
    over a slice of an arena's columns is bitwise the slice of the sum.

    Args:
        paged: The values.
        ids: [L] int64 slot ids; pairs that are not here contribute nothing.
        weights: [L] float32, or None for all ones.
        offsets: [B + 1] int64; the pairs of bag b are ``offsets[b]:offsets[b + 1]``. Starts with 0, ends with L.

    Returns:
        [B, W] float32.

    Raises:
        ValueError: A tensor has another shape, dtype or device.
    """
    check_bags(paged, ids, offsets)
    check_weights(weights, ids)
    return implementation_for(paged.rows.device).weighted_sum(paged, ids, weights, offsets)


def gather_rows(paged: Paged, ids: Tensor) -> Tensor:
    """Read rows.

    Args:
        paged: The values.
        ids: [M] int64 slot ids.

    Returns:
        [M, W] in the storage dtype; zeros for slots that are not here.
    """
    check_ids(paged, ids)
    return implementation_for(paged.rows.device).gather_rows(paged, ids)


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """Write rows in place; of repeated ids the last wins, slots that are not here are skipped.

    Args:
        paged: The values, written in place.
        ids: [M] int64 slot ids.
        values: [M, W] in the storage dtype.
    """
    check_ids(paged, ids)
    check_matrix("values", values, (ids.numel(), paged.rows.shape[1]), paged.rows.dtype, paged.rows.device)
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
    check_matrix("grads", grads, (offsets.numel() - 1, paged.rows.shape[1]), torch.float32, paged.rows.device)
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


def optimizer_step(
    paged: Paged, state: dict[str, Tensor], sorted_rows: Tensor, sums: Tensor, step: OptimizerStep
) -> None:
    """Apply one optimizer step to distinct rows, in place, in float32; bfloat16 rows are rounded to nearest even.

    Args:
        paged: The values; only its rows are used.
        state: The algorithm's state by name: adagrad {"sum": [R, W]}; rowwise_adagrad {"row_sum": [R, blocks]}, to
            which the mean of the squared gradient over a block's columns is added; adam {"exp_avg", "exp_avg_sq":
            [R, W]}; sgd {}. All float32.
        sorted_rows: [U] int64 arena rows, all different (``SortedPairs.rows``).
        sums: [U, W] float32 summed gradients (``segment_sum``).
        step: The rule and its numbers.
    """
    check_state(paged, state, step)
    num_distinct, width = sorted_rows.numel(), paged.rows.shape[1]
    check_matrix("sums", sums, (num_distinct, width), torch.float32, paged.rows.device)
    implementation_for(paged.rows.device).optimizer_step(paged, state, sorted_rows, sums, step)


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
    check_matrix("grads", grads, (grads.shape[0], paged.rows.shape[1]), torch.float32, paged.rows.device)
    implementation_for(paged.rows.device).fused_step(paged, state, pairs, weights, bags, grads, step)


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """Sum of squares, accumulated in float64, and whether every element is finite.

    Args:
        sums: [U, W] float32.
    """
    check_matrix("sums", sums, (sums.shape[0], sums.shape[-1]), torch.float32, sums.device)
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


def product_topk(queries: Tensor, keys: Tensor, k: int, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """Score queries against product keys and select as product_select does.

    Args:
        queries: [B, H, D] float32; the first D // 2 columns meet the first codebook.
        keys: [H, 2, n, D // 2] float32.
        k: Winners of a head, 1 to n * n.
        stride: As in product_select; n if not given.

    Returns:
        Scores [B, H, k] float32 and slot ids [B, H, k] int64, best first.
    """
    stride = keys.shape[2] if stride is None else stride
    check_product_keys(queries, keys, k, stride)
    return implementation_for(queries.device).product_topk(queries.detach(), keys.detach(), k, stride)


def flat_topk(queries: Tensor, keys: Paged, k: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """Score queries against the flat keys of every slot that is here; the k best by (score descending, id ascending).

    Slots are scored in tiles with a running top-k, so memory does not grow with the table.

    Args:
        queries: [B, D] float32.
        keys: The keys, an arena [R, D].
        k: Winners of a query, at least 1.
        num_slots: Ids from here on are no slots (the last page may be part empty).

    Returns:
        Scores [B, k] float32 and slot ids [B, k] int64, best first, padded with -inf and -1 where there are fewer
        candidates. A slot whose score is NaN is no candidate.
    """
    check_matrix("queries", queries, (queries.shape[0], keys.rows.shape[1]), torch.float32, keys.rows.device)
    check_topk("queries", queries, k, max(1, num_slots, k))
    return implementation_for(queries.device).flat_topk(queries.detach(), keys, k, num_slots)


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


def warm_up(device: torch.device | str = "cpu") -> None:
    """Compile (or load from the disk cache) every kernel that a device uses, for both storage dtypes.

    For whoever wants no request to wait for a compiler, which takes tens of seconds where the disk cache is empty.

    Args:
        device: Where the shard's arenas lie.
    """
    device = torch.device(device)
    ids = torch.tensor([0, 1, 1], device=device)
    offsets, bags = torch.tensor([0, 2, 3], device=device), torch.tensor([0, 0, 1], device=device)
    weights, grads = torch.ones(3, device=device), torch.ones(2, 4, device=device)
    for dtype in STORAGE_DTYPES:
        page_table = torch.zeros(1, dtype=torch.int32, device=device)
        paged = Paged(torch.zeros(2, 4, dtype=dtype, device=device), page_table, 1)
        weighted_sum(paged, ids, weights, offsets)
        weight_gradient(paged, ids, offsets, grads)
        scatter_rows(paged, ids, gather_rows(paged, ids))
        pairs = sort_pairs(paged, ids)
        sums = segment_sum(pairs, weights, bags, grads)
        squared_norm(sums)
        state = {
            name: torch.zeros(2, 4 if name != "row_sum" else 1, device=device)
            for names in STATE_NAMES.values()
            for name in names
        }
        for algorithm in ALGORITHMS:
            step = OptimizerStep(algorithm, lr=0.0)
            optimizer_step(paged, state, pairs.rows, sums, step)
            fused_step(paged, state, pairs, weights, bags, grads, step)
        flat_topk(grads, paged, 1, 2)
    select_topk(grads, 1)
    product_select(grads, grads, 1, 4)
    product_topk(grads[:, None], torch.ones(1, 2, 2, 2, device=device), 1)
    initial_values(0, 0, 1, 0, 1, 1.0)
