"""Selection on the CPU by (score descending, id ascending): top-k of rows, of product keys, of flat keys.

Scores are summed in the order of the key dimension, one query apart from the others, so they do not depend on the batch
nor on how keys are spread over shards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.cpu.elements import load, locate
from mempool.kernels.cpu.runtime import Array, parallel, serial, storage, use_threads, view

# Up to here an insertion into a sorted buffer is cheaper than sorting the whole row.
_INSERTION_K = 128
_TASK_ROWS = 16
_TILE_SLOTS = 128


@serial
def _rank(score: np.float32, position: int) -> Any:
    """An integer that orders (score descending, position ascending) when compared descending; NaN below all numbers."""
    bits = np.int64(np.float32(score).view(np.int32))
    ordered = bits if bits >= 0 else np.int64(-0x80000000) - bits  # -0.0 becomes 0, which 0.0 is
    if score != score:
        ordered = np.int64(-0x80000000)
    return (ordered << np.int64(32)) | np.int64(0xFFFFFFFF - position)


@serial
def _position(rank: Any) -> Any:
    return 0xFFFFFFFF - (rank & np.int64(0xFFFFFFFF))


@serial
def _insert(best: Array, count: int, rank: Any) -> Any:
    """Insert into the descending buffer of ranks, of which ``count`` are filled; returns the new count."""
    k = best.shape[0]
    slot = count if count < k else k - 1
    while slot > 0 and best[slot - 1] < rank:
        best[slot] = best[slot - 1]
        slot -= 1
    best[slot] = rank
    return min(count + 1, k)


@serial
def _select_row(scores: Array, best: Array, all_ranks: Array) -> None:
    """Ranks of the best scores into ``best``, descending; ``all_ranks`` is scratch as long as the row for large k."""
    k = best.shape[0]
    if k > _INSERTION_K:
        for position in range(scores.shape[0]):
            all_ranks[position] = _rank(scores[position], position)
        ascending = np.sort(all_ranks)
        for slot in range(k):
            best[slot] = ascending[scores.shape[0] - 1 - slot]
        return
    count = 0
    threshold = np.float32(np.nan)
    for position in range(scores.shape[0]):
        # Positions rise, so an equal score never displaces an earlier one: a plain comparison decides.
        if count == k and (scores[position] <= threshold or scores[position] != scores[position]):
            continue
        count = _insert(best, count, _rank(scores[position], position))
        threshold = scores[_position(best[k - 1])] if count == k else np.float32(np.nan)


@parallel
def _select_topk(scores: Array, values: Array, index: Array) -> None:
    num_rows, k = values.shape
    for task in prange((num_rows + _TASK_ROWS - 1) // _TASK_ROWS):
        best = np.empty(k, dtype=np.int64)
        all_ranks = np.empty(scores.shape[1] if k > _INSERTION_K else 0, dtype=np.int64)
        for row in range(task * _TASK_ROWS, min((task + 1) * _TASK_ROWS, num_rows)):
            _select_row(scores[row], best, all_ranks)
            for slot in range(k):
                position = _position(best[slot])
                index[row, slot] = position
                values[row, slot] = scores[row, position]


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.select_topk."""
    values = torch.empty(scores.shape[0], k, dtype=torch.float32)
    index = torch.empty(scores.shape[0], k, dtype=torch.int64)
    use_threads(scores.numel())
    _select_topk(view(scores), values.numpy(), index.numpy())
    return values, index


@serial
def _select_product(
    scores1: Array,
    scores2: Array,
    half1: Array,
    half2: Array,
    grid_best: Array,
    all_ranks: Array,
    scratch: Array,
    out_scores: Array,
    out1: Array,
    out2: Array,
) -> None:
    """The paper's two-stage selection for one query: top-k of each half, then of their sums.

    Ties go by (index of half 1, index of half 2), which is by id for every stride of at least n.
    """
    k = out1.shape[0]
    half_k = half1.shape[0]
    _select_row(scores1, half1, all_ranks)
    _select_row(scores2, half2, all_ranks)
    # Where an index stands among the chosen indices: row-major position in that grid rises with the id.
    index1, grid1, place1 = scratch[0], scratch[1], scratch[2]
    index2, grid2, place2 = scratch[3], scratch[4], scratch[5]
    for slot in range(half_k):
        index1[slot], index2[slot] = _position(half1[slot]), _position(half2[slot])
    for slot in range(half_k):
        own1, own2, below1, below2 = index1[slot], index2[slot], 0, 0
        for other in range(half_k):
            below1 += index1[other] < own1
            below2 += index2[other] < own2
        grid1[slot], grid2[slot] = below1, below2
        place1[below1], place2[below2] = slot, slot
    if k > _INSERTION_K:
        grid = np.empty(half_k * half_k, dtype=np.int64)
        for slot1 in range(half_k):
            for slot2 in range(half_k):
                score = scores1[index1[slot1]] + scores2[index2[slot2]]
                grid[slot1 * half_k + slot2] = _rank(score, grid1[slot1] * half_k + grid2[slot2])
        ascending = np.sort(grid)
        for slot in range(k):
            grid_best[slot] = ascending[half_k * half_k - 1 - slot]
    else:
        count = 0
        for slot1 in range(half_k):
            score1 = scores1[index1[slot1]]
            for slot2 in range(half_k):
                score = score1 + scores2[index2[slot2]]
                rank = _rank(score, grid1[slot1] * half_k + grid2[slot2])
                if count < k or rank > grid_best[k - 1]:
                    count = _insert(grid_best, count, rank)
                elif (rank >> np.int64(32)) < (grid_best[k - 1] >> np.int64(32)) and score == score:
                    break  # sums only fall along a row (but for NaN), so the rest of it cannot get in
    for slot in range(k):
        position = _position(grid_best[slot])
        out1[slot] = index1[place1[position // half_k]]
        out2[slot] = index2[place2[position % half_k]]
        out_scores[slot] = scores1[out1[slot]] + scores2[out2[slot]]


@parallel
def _product_select(scores1: Array, scores2: Array, half_k: int, index1: Array, index2: Array) -> None:
    num_rows, k = index1.shape
    for task in prange((num_rows + _TASK_ROWS - 1) // _TASK_ROWS):
        half1, half2 = np.empty(half_k, dtype=np.int64), np.empty(half_k, dtype=np.int64)
        grid_best, out_scores = np.empty(k, dtype=np.int64), np.empty(k, dtype=np.float32)
        scratch = np.empty((6, half_k), dtype=np.int64)
        all_ranks = np.empty(scores1.shape[1], dtype=np.int64)
        for row in range(task * _TASK_ROWS, min((task + 1) * _TASK_ROWS, num_rows)):
            _select_product(
                scores1[row],
                scores2[row],
                half1,
                half2,
                grid_best,
                all_ranks,
                scratch,
                out_scores,
                index1[row],
                index2[row],
            )


def product_select(
    scores1: Tensor,
    scores2: Tensor,
    k: int,
    stride: int,  # noqa: ARG001 - ids rise with (i1, i2) for every stride of at least n
) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_select."""
    index1 = torch.empty(scores1.shape[0], k, dtype=torch.int64)
    index2 = torch.empty(scores1.shape[0], k, dtype=torch.int64)
    use_threads(2 * scores1.numel())
    _product_select(view(scores1), view(scores2), min(k, scores1.shape[1]), index1.numpy(), index2.numpy())
    return index1, index2


@serial
def _score(query: Array, keys_by_dim: Array, num_keys: int, scores: Array) -> None:
    """scores[j] = sum over d of query[d] * keys_by_dim[d, j], in the order of d, no fused multiply-add."""
    num_dims = keys_by_dim.shape[0]
    for key in range(num_keys):
        scores[key] = np.float32(0)
    whole = num_dims - num_dims % 4
    for dim in range(0, whole, 4):
        query0, query1, query2, query3 = query[dim], query[dim + 1], query[dim + 2], query[dim + 3]
        for key in range(num_keys):
            total = scores[key] + query0 * keys_by_dim[dim, key]
            total = total + query1 * keys_by_dim[dim + 1, key]
            total = total + query2 * keys_by_dim[dim + 2, key]
            scores[key] = total + query3 * keys_by_dim[dim + 3, key]
    for dim in range(whole, num_dims):
        for key in range(num_keys):
            scores[key] += query[dim] * keys_by_dim[dim, key]


@parallel
def _product_topk(
    queries: Array, keys_by_dim: Array, half_k: int, stride: int, out_scores: Array, out_ids: Array
) -> None:
    num_queries, num_heads, k = out_scores.shape
    num_dims, num_keys = keys_by_dim.shape[2], keys_by_dim.shape[3]
    num_parts = (num_queries + _TASK_ROWS - 1) // _TASK_ROWS
    for task in prange(num_heads * num_parts):
        head, part = task // num_parts, task % num_parts
        scores1, scores2 = np.empty(num_keys, dtype=np.float32), np.empty(num_keys, dtype=np.float32)
        half1, half2 = np.empty(half_k, dtype=np.int64), np.empty(half_k, dtype=np.int64)
        grid_best, all_ranks = np.empty(k, dtype=np.int64), np.empty(num_keys, dtype=np.int64)
        index1, index2 = np.empty(k, dtype=np.int64), np.empty(k, dtype=np.int64)
        scratch = np.empty((6, half_k), dtype=np.int64)
        for query in range(part * _TASK_ROWS, min((part + 1) * _TASK_ROWS, num_queries)):
            _score(queries[query, head, :num_dims], keys_by_dim[head, 0], num_keys, scores1)
            _score(queries[query, head, num_dims:], keys_by_dim[head, 1], num_keys, scores2)
            _select_product(
                scores1, scores2, half1, half2, grid_best, all_ranks, scratch, out_scores[query, head], index1, index2
            )
            for slot in range(k):
                out_ids[query, head, slot] = index1[slot] * stride + index2[slot]


def product_topk(queries: Tensor, keys: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_topk."""
    scores = torch.empty(*queries.shape[:2], k, dtype=torch.float32)
    ids = torch.empty(*queries.shape[:2], k, dtype=torch.int64)
    use_threads(queries.numel() * keys.shape[2])
    _product_topk(view(queries), view(keys.transpose(2, 3)), min(k, keys.shape[2]), stride, scores.numpy(), ids.numpy())
    return scores, ids


@serial
def _merge(scores: Array, ids: Array, num_scores: int, best_scores: Array, best_ids: Array, count: int) -> int:
    """Take candidates whose ids rise above all ids taken before into the descending buffers; NaN is no candidate."""
    k = best_scores.shape[0]
    for candidate in range(num_scores):
        score = scores[candidate]
        if score != score or (count == k and score <= best_scores[k - 1]):
            continue
        slot = count if count < k else k - 1
        while slot > 0 and best_scores[slot - 1] < score:
            best_scores[slot], best_ids[slot] = best_scores[slot - 1], best_ids[slot - 1]
            slot -= 1
        best_scores[slot], best_ids[slot] = score, ids[candidate]
        count = min(count + 1, k)
    return count


@parallel
def _flat_topk(
    queries: Array, rows: Array, page_table: Array, page_shift: int, num_slots: int, best_scores: Array, best_ids: Array
) -> None:
    # Every part scans its own range of slots in tiles and keeps the best k of each query, ids ascending among ties.
    num_parts, num_queries = best_scores.shape[:2]
    num_dims = rows.shape[1]
    for part in prange(num_parts):
        keys_by_dim = np.empty((num_dims, _TILE_SLOTS), dtype=np.float32)
        tile_ids = np.empty(_TILE_SLOTS, dtype=np.int64)
        scores = np.empty(_TILE_SLOTS, dtype=np.float32)
        counts = np.zeros(num_queries, dtype=np.int64)
        best_scores[part] = np.float32(-np.inf)
        best_ids[part] = -1
        slot, end = num_slots * part // num_parts, num_slots * (part + 1) // num_parts
        while slot < end:
            num_found = 0
            while slot < end and num_found < _TILE_SLOTS:
                row = locate(slot, page_table, page_shift)
                if row < 0:  # the whole page is elsewhere
                    slot = ((slot >> page_shift) + 1) << page_shift
                    continue
                for dim in range(num_dims):
                    keys_by_dim[dim, num_found] = load(rows[row, dim])
                tile_ids[num_found] = slot
                num_found += 1
                slot += 1
            for query in range(num_queries):
                _score(queries[query], keys_by_dim, num_found, scores)
                counts[query] = _merge(
                    scores, tile_ids, num_found, best_scores[part, query], best_ids[part, query], counts[query]
                )


@parallel
def _merge_parts(best_scores: Array, best_ids: Array, out_scores: Array, out_ids: Array) -> None:
    num_parts, num_queries, k = best_scores.shape
    for query in prange(num_queries):
        out_scores[query] = np.float32(-np.inf)
        out_ids[query] = -1
        count = 0
        for part in range(num_parts):
            num_found = 0
            while num_found < k and best_ids[part, query, num_found] >= 0:
                num_found += 1
            count = _merge(
                best_scores[part, query], best_ids[part, query], num_found, out_scores[query], out_ids[query], count
            )


def flat_topk(queries: Tensor, keys: Paged, k: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.flat_topk."""
    num_slots = min(num_slots, keys.page_table.numel() << keys.page_shift)
    num_parts = max(1, min(torch.get_num_threads(), num_slots // _TILE_SLOTS))
    best_scores = np.empty((num_parts, queries.shape[0], k), dtype=np.float32)
    best_ids = np.empty((num_parts, queries.shape[0], k), dtype=np.int64)
    scores = torch.empty(queries.shape[0], k, dtype=torch.float32)
    ids = torch.empty(queries.shape[0], k, dtype=torch.int64)
    use_threads(queries.shape[0] * num_slots * keys.rows.shape[1])
    _flat_topk(
        view(queries), storage(keys.rows), view(keys.page_table), keys.page_shift, num_slots, best_scores, best_ids
    )
    _merge_parts(best_scores, best_ids, scores.numpy(), ids.numpy())
    return scores, ids
