"""Selection by (score descending, id ascending), by sorting."""

from __future__ import annotations

import itertools
from functools import cmp_to_key

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.reference.bags import arena_row


def _before(score: float, other: float) -> int:
    """Negative if ``score`` comes before ``other``: descending, NaN last."""
    if score != score or other != other:
        return (score != score) - (other != other)
    return (score < other) - (score > other)


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions by (score descending, NaN last, position ascending), the first k."""
    index = torch.empty(scores.shape[0], k, dtype=torch.int64)
    for row, values in enumerate(scores.tolist()):
        key = cmp_to_key(lambda a, b, values=values: _before(values[a], values[b]))  # type: ignore[misc]
        index[row] = torch.tensor(sorted(range(len(values)), key=key)[:k])  # sorted is stable: ties by position
    return scores.cpu().gather(1, index), index


def product_select(scores1: Tensor, scores2: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """Two-stage selection of the paper: top-k of each half, their sums in float32, top-k of those by (score, id)."""
    half_k = min(k, scores1.shape[1])
    half1, index1 = select_topk(scores1, half_k)
    half2, index2 = select_topk(scores2, half_k)
    sums = (half1[:, :, None] + half2[:, None, :]).flatten(1)
    ids = (index1[:, :, None] * stride + index2[:, None, :]).flatten(1)
    by_id = ids.argsort(dim=1)
    _, position = select_topk(sums.gather(1, by_id), k)
    best = ids.gather(1, by_id).gather(1, position)
    return best // stride, best % stride


def product_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """product_select on float64 products of queries and half-keys. (Ties in float64 need not be ties in float32.)"""
    num_queries, num_heads, dim = queries.shape
    halves = queries.double().cpu().reshape(num_queries, num_heads, 2, dim // 2)
    scores = torch.einsum("bhcd,hcnd->cbhn", halves, keys.double().cpu())
    scores1, scores2 = scores.reshape(2, num_queries * num_heads, keys.shape[2])
    index1, index2 = product_select(scores1, scores2, k, keys.shape[2])
    best = scores1.gather(1, index1) + scores2.gather(1, index2)
    shape = (num_queries, num_heads, k)
    return best.reshape(shape), index1.reshape(shape), index2.reshape(shape)


def product_gradient(
    queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor
) -> tuple[Tensor, Tensor]:
    """One winner after another: its gradient times its half-keys to the query's, times the query to the half-keys'."""
    half_dim = keys.shape[3]
    queries, keys, grads = queries.double().cpu(), keys.double().cpu(), grads.double().cpu()
    query_grads, key_grads = torch.zeros_like(queries), torch.zeros_like(keys)
    for query, head, rank in itertools.product(*map(range, grads.shape)):
        grad = grads[query, head, rank]
        for half, index in enumerate((index1, index2)):
            key, columns = int(index[query, head, rank]), slice(half * half_dim, (half + 1) * half_dim)
            query_grads[query, head, columns] += grad * keys[head, half, key]
            key_grads[head, half, key] += grad * queries[query, head, columns]
    return query_grads, key_grads


def flat_topk(queries: Tensor, keys: Paged, k: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """Brute force over the slots that are here; a slot whose score is NaN is no candidate."""
    slots = [slot for slot in range(num_slots) if arena_row(keys, slot) >= 0]
    table = keys.rows[[arena_row(keys, slot) for slot in slots]].double().cpu()
    scores = torch.full((queries.shape[0], k), -torch.inf, dtype=torch.float64)
    ids = torch.full((queries.shape[0], k), -1, dtype=torch.int64)
    for row in range(queries.shape[0]):
        found = [(s, i) for s, i in zip((table @ queries[row].double().cpu()).tolist(), slots, strict=True) if s == s]
        best = sorted(found, key=lambda pair: (-pair[0], pair[1]))[:k]
        for place, (score, slot) in enumerate(best):
            scores[row, place], ids[row, place] = score, slot
    return scores, ids
