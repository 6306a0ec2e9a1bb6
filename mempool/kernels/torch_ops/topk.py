"""Selection and scoring in torch's own operations.

torch.topk does not say which of equal scores it takes: rows where that matters go by integer ranks instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mempool.kernels.arguments import Paged
from mempool.kernels.torch_ops.bags import locate

_TILE_SLOTS = 1 << 14
# Scores held at once: bounds the memory of large batches, and keeps them in the cache on a CPU.
_CHUNK_SCORES = 1 << 20
_RANK_BITS = 32
_LOW_MASK = (1 << _RANK_BITS) - 1


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
    # One more than asked for: where scores fall from each to the next, NaN nowhere, no other choice was possible.
    best, index = torch.topk(scores, min(k + 1, scores.shape[-1]), dim=-1)
    decided = (best[..., :-1] > best[..., 1:]).all(-1) & ~best[..., 0].isnan()
    index = index[..., :k].contiguous()
    open_rows = (~decided).nonzero().squeeze(-1)
    if open_rows.numel():
        index[open_rows] = positions(torch.topk(ranks(scores[open_rows]), k, dim=-1).values)
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


def product_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    deterministic: bool,  # noqa: ARG001 - torch has no product in a fixed order
) -> tuple[Tensor, Tensor, Tensor]:
    """See mempool.kernels.product_indices. torch.matmul gives a query other bits alone than in a batch, always."""
    num_queries, num_heads, _ = queries.shape
    num_keys, half_dim = keys.shape[2:]
    scores = queries.new_empty(num_queries, num_heads, k)
    index1, index2 = (torch.empty_like(scores, dtype=torch.int64) for _ in range(2))
    chunk = max(1, _CHUNK_SCORES // max(1, num_heads * num_keys))
    for first in range(0, num_queries, chunk):
        part = slice(first, min(first + chunk, num_queries))
        scores1, scores2 = (
            torch.bmm(half.transpose(0, 1), keys[:, number].transpose(1, 2)).flatten(0, 1)
            for number, half in enumerate((queries[part, :, :half_dim], queries[part, :, half_dim:]))
        )
        best1, best2 = product_select(scores1, scores2, k, num_keys)
        found = scores1.gather(-1, best1) + scores2.gather(-1, best2)
        for out, value in ((scores, found), (index1, best1), (index2, best2)):
            out[part] = value.view(num_heads, -1, k).transpose(0, 1)
    return scores, index1, index2


def parts_topk(
    queries: Tensor,  # noqa: ARG001
    keys: Tensor,  # noqa: ARG001
    k: int,  # noqa: ARG001
    ranges: tuple[tuple[int, int], ...],  # noqa: ARG001
) -> tuple[Tensor, Tensor] | None:
    """See mempool.kernels.parts_topk. Nothing here does better than pairs."""
    return None


def product_gradient(
    queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor
) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_gradient."""
    num_queries, num_heads, k = grads.shape
    num_keys, half_dim = keys.shape[2:]
    query_grads, key_grads = torch.zeros_like(queries), torch.zeros_like(keys)
    if grads.numel() == 0:
        return query_grads, key_grads
    heads = torch.arange(num_heads, device=grads.device)[:, None]
    flat_grads = grads.reshape(-1)
    # Winners are pairs of a query and a half-key: each side's gradient is a weighted sum of the other's vectors.
    pair_query = torch.arange(num_queries * num_heads, device=grads.device).repeat_interleave(k)
    starts = torch.arange(0, grads.numel(), k, device=grads.device)
    for half, index in enumerate((index1, index2)):
        columns = slice(half * half_dim, (half + 1) * half_dim)
        chosen = (index + heads * num_keys).reshape(-1)
        own_keys = keys[:, half].reshape(-1, half_dim)
        sums = F.embedding_bag(chosen, own_keys, starts, mode="sum", per_sample_weights=flat_grads)
        query_grads[..., columns] = sums.view(num_queries, num_heads, half_dim)
        by_key, order = torch.sort(chosen, stable=True)
        distinct, counts = torch.unique_consecutive(by_key, return_counts=True)
        own_queries = queries[..., columns].reshape(-1, half_dim)
        sums = F.embedding_bag(
            pair_query[order],
            own_queries,
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=flat_grads[order],
        )
        key_grads[distinct // num_keys, half, distinct % num_keys] = sums
    return query_grads, key_grads


def _merge_best(best_scores: Tensor, best_ids: Tensor, scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best k of what was found so far and of new candidates, whose ids all lie above; NaN marks an empty place."""
    all_scores = torch.cat([best_scores, scores], dim=1)
    all_ids = torch.cat([best_ids, ids], dim=1)
    best, index = select_topk(all_scores, k)
    return best, all_ids.gather(1, index)


def flat_topk(
    queries: Tensor,
    keys: Paged,
    k: int,
    num_slots: int,
    deterministic: bool,  # noqa: ARG001 - torch has no product in a fixed order
) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.flat_topk. torch.matmul gives a score other bits for another cut of the keys, always."""
    device = queries.device
    scores = torch.full((queries.shape[0], k), torch.nan, dtype=torch.float32, device=device)
    ids = torch.full((queries.shape[0], k), -1, dtype=torch.int64, device=device)
    num_slots = min(num_slots, keys.page_table.numel() << keys.page_shift)
    for first in range(0, num_slots, _TILE_SLOTS):
        slots = torch.arange(first, min(first + _TILE_SLOTS, num_slots), device=device)
        rows, here = locate(keys, slots)
        own_slots = slots[here]
        if own_slots.numel() == 0:
            continue
        tile_scores = queries @ keys.rows[rows[here]].float().T
        best, index = select_topk(tile_scores, min(k, own_slots.numel()))
        scores, ids = _merge_best(scores, ids, best, own_slots[index], k)
    missing = scores.isnan()
    return scores.masked_fill(missing, -torch.inf), ids.masked_fill(missing, -1)
