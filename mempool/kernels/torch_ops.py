"""Every kernel in torch's own operations: what runs where Numba or Triton is missing, on any device.

Sums over pairs are made in the order of the pairs (by torch's index_add_ on the CPU); selection goes by integer ranks,
so ties are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import STATE_NAMES, OptimizerStep, Paged, SortedPairs, num_blocks

# Gathered rows held at once, in elements: bounds the memory of sums over many pairs.
_CHUNK_ELEMENTS = 1 << 22
_TILE_SLOTS = 1 << 14
_RANK_BITS = 32
_LOW_MASK = (1 << _RANK_BITS) - 1


def locate(paged: Paged, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Arena row of each id (0 where not here) and whether it is here."""
    shift = paged.page_shift
    num_pages = paged.page_table.numel()
    pages = ids >> shift
    inside = (pages >= 0) & (pages < num_pages)
    if num_pages == 0:
        return torch.zeros_like(ids), inside
    arena_pages = paged.page_table[torch.where(inside, pages, 0)].to(torch.int64)
    here = inside & (arena_pages >= 0)
    rows = (arena_pages << shift) | (ids & ((1 << shift) - 1))
    return torch.where(here, rows, 0), here


def bag_of_pairs(offsets: Tensor, num_pairs: int) -> Tensor:
    """Bag of each pair, from the bags' offsets."""
    bags = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(bags, offsets.diff(), output_size=num_pairs)


def _chunks(num_pairs: int, width: int) -> list[tuple[int, int]]:
    size = max(1, _CHUNK_ELEMENTS // max(1, width))
    return [(first, min(first + size, num_pairs)) for first in range(0, num_pairs, size)]


def weighted_sum(paged: Paged, ids: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """See mempool.kernels.weighted_sum."""
    width = paged.rows.shape[1]
    out = torch.zeros(offsets.numel() - 1, width, dtype=torch.float32, device=paged.rows.device)
    rows, here = locate(paged, ids)
    bags = bag_of_pairs(offsets, ids.numel())
    # Taking out the pairs that are not here, rather than weighing them by 0, keeps NaN in foreign rows out.
    rows, bags, weights = rows[here], bags[here], None if weights is None else weights[here]
    for first, end in _chunks(rows.numel(), width):
        values = paged.rows[rows[first:end]].float()
        if weights is not None:
            values *= weights[first:end, None]
        out.index_add_(0, bags[first:end], values)
    return out


def gather_rows(paged: Paged, ids: Tensor) -> Tensor:
    """See mempool.kernels.gather_rows."""
    rows, here = locate(paged, ids)
    out = paged.rows.new_zeros(ids.numel(), paged.rows.shape[1])
    out[here] = paged.rows[rows[here]]
    return out


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """See mempool.kernels.scatter_rows."""
    pairs = sort_pairs(paged, ids)
    last = pairs.order[pairs.starts[1:] - 1]  # index_copy_ leaves it open which of equal rows wins
    paged.rows.index_copy_(0, pairs.rows, values[last])


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.weight_gradient."""
    out = torch.zeros(ids.numel(), dtype=torch.float32, device=ids.device)
    rows, here = locate(paged, ids)
    bags = bag_of_pairs(offsets, ids.numel())
    for first, end in _chunks(ids.numel(), paged.rows.shape[1]):
        part = here[first:end].nonzero().squeeze(1) + first
        out[part] = (paged.rows[rows[part]].float() * grads[bags[part]]).sum(dim=1)
    return out


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """See mempool.kernels.sort_pairs."""
    _, here = locate(paged, ids)
    kept = here.nonzero().squeeze(1)
    sorted_ids, permutation = torch.sort(ids[kept], stable=True)
    distinct, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    starts = torch.zeros(distinct.numel() + 1, dtype=torch.int64, device=ids.device)
    torch.cumsum(counts, dim=0, out=starts[1:])
    return SortedPairs(order=kept[permutation], rows=locate(paged, distinct)[0], starts=starts)


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.segment_sum."""
    out = torch.zeros(pairs.rows.numel(), grads.shape[1], dtype=torch.float32, device=grads.device)
    segments = bag_of_pairs(pairs.starts, pairs.order.numel())
    for first, end in _chunks(pairs.order.numel(), grads.shape[1]):
        order = pairs.order[first:end]
        parts = grads[bags[order]]
        if weights is not None:
            parts *= weights[order, None]
        out.index_add_(0, segments[first:end], parts)
    return out


def _rowwise_divisor(row_sum: Tensor, rows: Tensor, grads: Tensor, step: OptimizerStep) -> Tensor:
    width = grads.shape[1]
    divisors = torch.empty_like(grads)
    for block in range(num_blocks(width, step.block_dim)):
        columns = slice(block * step.block_dim, min((block + 1) * step.block_dim, width))
        total = row_sum[rows, block] + grads[:, columns].square().mean(dim=1)
        row_sum[rows, block] = total
        divisors[:, columns] = (total.sqrt() + step.eps)[:, None]
    return divisors


def optimizer_step(
    paged: Paged, state: dict[str, Tensor], sorted_rows: Tensor, sums: Tensor, step: OptimizerStep
) -> None:
    """See mempool.kernels.optimizer_step."""
    grads = sums * step.grad_scale
    states = [state[name] for name in STATE_NAMES[step.algorithm]]
    if step.algorithm == "sgd":
        update = grads
    elif step.algorithm == "adagrad":
        total = states[0][sorted_rows] + grads * grads
        states[0][sorted_rows] = total
        update = grads / (total.sqrt() + step.eps)
    elif step.algorithm == "rowwise_adagrad":
        update = grads / _rowwise_divisor(states[0], sorted_rows, grads, step)
    else:
        first, second = states[0][sorted_rows], states[1][sorted_rows]
        first = first + (grads - first) * (1.0 - step.beta1)
        second = second + (grads * grads - second) * (1.0 - step.beta2)
        states[0][sorted_rows], states[1][sorted_rows] = first, second
        update = first / (second.sqrt() + step.eps)
    values = paged.rows[sorted_rows].float() - step.step_size * update
    paged.rows[sorted_rows] = values.to(paged.rows.dtype)


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
    optimizer_step(paged, state, pairs.rows, segment_sum(pairs, weights, bags, grads), step)


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """See mempool.kernels.squared_norm."""
    total = torch.zeros((), dtype=torch.float64, device=sums.device)
    finite = torch.ones((), dtype=torch.bool, device=sums.device)
    for first, end in _chunks(sums.shape[0], sums.shape[1]):
        total += sums[first:end].double().square().sum()
        finite &= torch.isfinite(sums[first:end]).all()
    return float(total), bool(finite)


def ranks(scores: Tensor) -> Tensor:
    """Integers, all different in a row, that order by (score descending, position ascending) when sorted descending.

    NaN ranks below every number.
    """
    bits = scores.contiguous().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits >= 0, bits, -(1 << 31) - bits)  # -0.0 becomes 0, which 0.0 is
    ordered = torch.where(scores.isnan(), -(1 << 31), ordered)
    positions = torch.arange(scores.shape[-1], device=scores.device)
    return (ordered << _RANK_BITS) | (_LOW_MASK - positions)


def positions(best: Tensor) -> Tensor:
    """The positions that ranks were made of."""
    return _LOW_MASK - (best & _LOW_MASK)


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.select_topk."""
    best = torch.topk(ranks(scores), k, dim=-1).values
    index = positions(best)
    return scores.gather(-1, index), index


def product_select(
    scores1: Tensor,
    scores2: Tensor,
    k: int,
    stride: int,  # noqa: ARG001 - ids rise with (i1, i2) for every stride of at least n
) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_select."""
    half_k = min(k, scores1.shape[-1])
    # In the order of their indices, row-major positions in the grid of sums rise with the id: ties go by id.
    index1 = select_topk(scores1, half_k)[1].sort(dim=-1).values
    index2 = select_topk(scores2, half_k)[1].sort(dim=-1).values
    grid = scores1.gather(-1, index1)[:, :, None] + scores2.gather(-1, index2)[:, None, :]
    _, position = select_topk(grid.flatten(1), k)
    return index1.gather(-1, position // half_k), index2.gather(-1, position % half_k)


def product_topk(queries: Tensor, keys: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_topk."""
    num_queries, num_heads, dim = queries.shape
    num_keys = keys.shape[2]
    scores = torch.einsum("bhcd,hcnd->cbhn", queries.reshape(num_queries, num_heads, 2, dim // 2), keys)
    scores1, scores2 = scores.reshape(2, num_queries * num_heads, num_keys)
    index1, index2 = product_select(scores1, scores2, k, stride)
    best = scores1.gather(-1, index1) + scores2.gather(-1, index2)
    shape = (num_queries, num_heads, k)
    return best.reshape(shape), (index1 * stride + index2).reshape(shape)


def merge_best(best_scores: Tensor, best_ids: Tensor, scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best k of what was found so far and of new candidates, whose ids all lie above; NaN marks an empty place."""
    all_scores = torch.cat([best_scores, scores], dim=1)
    all_ids = torch.cat([best_ids, ids.expand(scores.shape[0], -1)], dim=1)
    best, index = select_topk(all_scores, k)
    return best, all_ids.gather(1, index)


def flat_topk(queries: Tensor, keys: Paged, k: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.flat_topk."""
    device = queries.device
    scores = torch.full((queries.shape[0], k), torch.nan, device=device)
    ids = torch.full((queries.shape[0], k), -1, dtype=torch.int64, device=device)
    num_slots = min(num_slots, keys.page_table.numel() << keys.page_shift)
    for first in range(0, num_slots, _TILE_SLOTS):
        slots = torch.arange(first, min(first + _TILE_SLOTS, num_slots), device=device)
        rows, here = locate(keys, slots)
        tile_scores = queries @ keys.rows[rows[here]].float().T
        scores, ids = merge_best(scores, ids, tile_scores, slots[here], k)
    missing = scores.isnan()
    return scores.masked_fill(missing, -torch.inf), ids.masked_fill(missing, -1)


def initial_values(
    seed: int, *, slots_start: int, num_slots: int, column_start: int, num_columns: int, std: float
) -> Tensor:
    """See mempool.kernels.initial_values."""
    from mempool.kernels import reference

    out = torch.empty(num_slots, num_columns, dtype=torch.float32)
    for first, end in _chunks(num_slots, num_columns):
        out[first:end] = reference.initial_values(
            seed,
            slots_start=slots_start + first,
            num_slots=end - first,
            column_start=column_start,
            num_columns=num_columns,
            std=std,
        )
    return out
