"""Product keys of any number of parts on the CPU: all of a query's parts are scored and merged while they are in the
cache.

Parts are merged in pairs, and then one list after the other, so that scores have the bits that kernels of pairs give.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.cpu.runtime import Array, kernel, serial, spread, use_threads, view
from mempool.kernels.cpu.scoring.scores import TILE_KEYS
from mempool.kernels.cpu.scoring.selection import select
from mempool.kernels.cpu.scoring.topk import (
    MOST_IDS,
    packed,
    pairs_of,
    queries_of_task,
    score_codebook,
    select_pairs,
    task_scratch,
)


@serial
def _merge_parts(
    query: int,
    values: Array,
    index: Array,
    num_keys: int,
    pairs: Array,
    merging: Any,
    list_scores: Array,
    list_ids: Array,
    chosen: Array,
) -> bool:
    """The best sums of one half-key of each part, by the k best of each; False where a pair is left open.

    Args:
        query: Of those whose best are given.
        values: Scores, [P, queries, k], best first.
        index: Their half-keys, [P, queries, k].
        num_keys: Half-keys of a part.
        pairs, merging: As of ``select_pairs``.
        list_scores: Scratch [3, k], whose first row gets the scores.
        list_ids: Scratch [3, k], whose first row gets the ids.
        chosen: Scratch [2, k].
    """
    num_parts, _, k = values.shape
    for part in range(0, num_parts, 2):
        # The list of this pair, or of a last part alone; then that of all before it together with it.
        into = 0 if part == 0 else 1
        stride = num_keys
        if part + 1 < num_parts:
            stride *= num_keys
            decided = select_pairs(
                values[part, query],
                index[part, query],
                values[part + 1, query],
                index[part + 1, query],
                num_keys,
                pairs,
                merging,
                list_scores[into],
                chosen[0],
                chosen[1],
            )
            if not decided:
                return False
            for place in range(k):
                list_ids[into, place] = chosen[0, place] * num_keys + chosen[1, place]
        else:
            for place in range(k):
                list_scores[into, place] = values[part, query, place]
                list_ids[into, place] = index[part, query, place]
        if part > 0:
            decided = select_pairs(
                list_scores[0],
                list_ids[0],
                list_scores[1],
                list_ids[1],
                stride,
                pairs,
                merging,
                list_scores[2],
                chosen[0],
                chosen[1],
            )
            if not decided:
                return False
            for place in range(k):
                list_scores[0, place] = list_scores[2, place]
                list_ids[0, place] = chosen[0, place] * stride + chosen[1, place]
    return True


@serial
def _score_parts(
    task: Any,
    queries: Array,
    panels: Array,
    ranges: Array,
    num_keys: int,
    task_queries: int,
    pairs: Array,
    out_scores: Array,
    out_index: Array,
) -> None:
    """Some queries of one head: the best of each part, of each pair of them, of all."""
    num_parts, num_queries, _, k = out_index.shape
    tasks = (num_queries + task_queries - 1) // task_queries
    head, first = task // tasks, task % tasks * task_queries
    held = min(task_queries, num_queries - first)
    width = panels.shape[1] * TILE_KEYS
    own, group, selecting, merging, values, index = task_scratch(
        task_queries, panels, num_parts, num_keys, k, pairs.shape[0], k
    )
    orders, maxima, found, ranks, places = selecting
    for part in range(num_parts):
        codebook = num_parts * head + part
        score_codebook(queries, first, held, codebook, panels[codebook], group, own)
        begin, count = ranges[part, 0], ranges[part, 1] - ranges[part, 0]
        for query in range(held):
            best, start = index[part, query], query * width + begin
            select(own, start, count, k, orders, maxima, found, ranks, places, best)
            for place in range(k):
                values[part, query, place] = own[start + best[place]]
                best[place] += begin
    list_scores, list_ids = np.empty((3, k), dtype=np.float32), np.empty((3, k), dtype=np.int64)
    chosen = np.empty((2, k), dtype=np.int64)
    for query in range(held):
        if not _merge_parts(query, values, index, num_keys, pairs, merging, list_scores, list_ids, chosen):
            out_index[0, first + query, head, 0] = -1
            continue
        for place in range(k):
            out_scores[first + query, head, place] = list_scores[0, place]
            slot = list_ids[0, place]
            for part in range(num_parts - 1, -1, -1):
                out_index[part, first + query, head, place] = slot % num_keys
                slot //= num_keys


@kernel
def _select_parts(
    queries: Array,
    panels: Array,
    ranges: Array,
    num_keys: int,
    task_queries: int,
    pairs: Array,
    out_scores: Array,
    out_index: Array,
) -> None:
    tasks = (out_scores.shape[0] + task_queries - 1) // task_queries
    spread(
        tasks * out_scores.shape[1],
        _score_parts,
        (queries, panels, ranges, num_keys, task_queries, pairs, out_scores, out_index),
    )


def parts_topk(
    queries: Tensor, keys: Tensor, k: int, ranges: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor] | None:
    """See mempool.kernels.parts_topk."""
    num_queries, num_heads, _ = queries.shape
    parts, num_keys = keys.shape[1:3]
    _, pairs = pairs_of(num_keys, k)
    if num_keys**parts > MOST_IDS or not len(pairs) or k > min(end - first for first, end in ranges):
        return None
    panels = packed(keys)
    scores = torch.empty(num_queries, num_heads, k, dtype=torch.float32, device="cpu")
    index = torch.empty(parts, *scores.shape, dtype=torch.int64, device="cpu")
    use_threads(queries.numel() * num_keys)
    _select_parts(
        view(queries.flatten(1)),
        panels,
        np.array(ranges, dtype=np.int64),
        num_keys,
        queries_of_task(num_queries, num_heads, num_keys),
        pairs,
        scores.numpy(),
        index.numpy(),
    )
    return scores, index
