"""The best flat keys of a table on the CPU: panels of keys scored while they are in the cache, a running top-k.

A tile's scores are compared with what each query still takes before anything else is done with them, so that all but
the first few are dropped by one comparison. What passes is put at the end of the query's buffer, ids ascending; a full
buffer is cut to its k best, which raises what the query takes from then on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.cpu.elements import locate
from mempool.kernels.cpu.runtime import Array, kernel, serial, spread, storage, use_threads, view
from mempool.kernels.cpu.scoring.scores import (
    TILE_KEYS,
    TILE_QUERIES,
    fill_up,
    keys_reaching,
    pack,
    tile_reaches,
    tile_scores,
)
from mempool.kernels.cpu.scoring.selection import WORD, keep_best, lowest_bit, padded
from mempool.kernels.cpu.scoring.topk import select_topk

# Queries that go over the keys together: enough that packing the keys is little beside scoring them.
_TASK_QUERIES = 512
# Slots that are worth a task of their own.
_LEAST_SLOTS = 1024


@serial
def _next_panel(rows: Array, page_table: Array, page_shift: int, slot: int, end: int, panel: Array, ids: Array) -> Any:
    """Pack the next slots before ``end`` that are here; returns how many they are, and the slot to go on with."""
    num_dims = rows.shape[1]
    count = 0
    while slot < end and count < TILE_KEYS:
        row = locate(slot, page_table, page_shift)
        next_page = ((slot >> page_shift) + 1) << page_shift
        if row < 0:  # the whole page is elsewhere
            slot = next_page
            continue
        found = min(min(next_page, end) - slot, TILE_KEYS - count)
        pack(rows, row, found, 0, num_dims, TILE_KEYS, panel, count)
        for place in range(found):
            ids[count + place] = slot + place
        count += found
        slot += found
    fill_up(count, num_dims, TILE_KEYS, panel, 0)
    return count, slot


@serial
def _take(
    tile: Array,
    query: int,
    num_keys: int,
    panel_ids: Array,
    limits: Array,
    counts: Array,
    scores: Array,
    ids: Array,
    k: int,
    orders: Array,
    found: Array,
) -> None:
    """Put what a query takes of a tile into its buffer, ``scores[query]`` and ``ids[query]``."""
    row = query % TILE_QUERIES * TILE_KEYS
    word = keys_reaching(tile, row, limits[query])
    while word != np.uint64(0):
        key = lowest_bit(word)
        if key >= num_keys:
            break
        word &= word - np.uint64(1)
        if not tile[row + key] >= limits[query]:
            continue  # the limit has risen
        scores[query, counts[query]], ids[query, counts[query]] = tile[row + key], panel_ids[key]
        counts[query] += 1
        if counts[query] == scores.shape[1]:
            limits[query] = keep_best(scores[query], ids[query], k, orders, found)
            counts[query] = k


@serial
def _scan_part(
    task: Any,
    queries: Array,
    rows: Array,
    page_table: Array,
    page_shift: int,
    num_slots: int,
    chunk: int,
    best_scores: Array,
    best_ids: Array,
) -> None:
    """Some queries over a range of slots: the k best of each, ids ascending; empty places are NaN and -1."""
    num_queries, num_parts, k = best_scores.shape
    num_dims = rows.shape[1]
    num_chunks = (num_queries + chunk - 1) // chunk
    part, first = task // num_chunks, task % num_chunks * chunk
    held = min(chunk, num_queries - first)
    whole = (held + TILE_QUERIES - 1) // TILE_QUERIES * TILE_QUERIES
    groups, limits = np.empty(whole * num_dims, dtype=np.float32), np.empty(whole, dtype=np.float32)
    for start in range(0, held, TILE_QUERIES):
        count = min(TILE_QUERIES, held - start)
        pack(queries, first + start, count, 0, num_dims, TILE_QUERIES, groups, start * num_dims)
        fill_up(count, num_dims, TILE_QUERIES, groups, start * num_dims)
    counts = np.empty(held, dtype=np.int64)
    for query in range(whole):
        limits[query] = np.float32(-np.inf) if query < held else np.float32(np.nan)
    for query in range(held):
        counts[query] = 0
    room = padded(2 * k + WORD)
    scores, ids = np.empty((held, room), dtype=np.float32), np.empty((held, room), dtype=np.int64)
    panel, panel_ids = np.empty(TILE_KEYS * num_dims, dtype=np.float32), np.empty(TILE_KEYS, dtype=np.int64)
    tile = np.empty(TILE_QUERIES * TILE_KEYS, dtype=np.float32)
    orders, found = np.empty(room, dtype=np.int32), np.empty(k, dtype=np.int64)
    slot, end = num_slots * part // num_parts, num_slots * (part + 1) // num_parts
    while slot < end:
        num_keys, slot = _next_panel(rows, page_table, page_shift, slot, end, panel, panel_ids)
        for start in range(0, held, TILE_QUERIES):
            tile_scores(groups, start * num_dims, panel, 0, num_dims, tile, 0, TILE_KEYS)
            if tile_reaches(tile, limits, start):
                for query in range(start, min(start + TILE_QUERIES, held)):
                    _take(tile, query, num_keys, panel_ids, limits, counts, scores, ids, k, orders, found)
    for query in range(held):
        if counts[query] > k:
            for place in range(counts[query], room):
                scores[query, place] = np.float32(-np.inf)
            keep_best(scores[query], ids[query], k, orders, found)
        for place in range(k):
            is_found = place < counts[query]
            best_scores[first + query, part, place] = scores[query, place] if is_found else np.float32(np.nan)
            best_ids[first + query, part, place] = ids[query, place] if is_found else -1


@kernel
def _scan(
    queries: Array,
    rows: Array,
    page_table: Array,
    page_shift: int,
    num_slots: int,
    chunk: int,
    best_scores: Array,
    best_ids: Array,
) -> None:
    num_tasks = best_scores.shape[1] * ((queries.shape[0] + chunk - 1) // chunk)
    spread(num_tasks, _scan_part, (queries, rows, page_table, page_shift, num_slots, chunk, best_scores, best_ids))


def flat_topk(
    queries: Tensor,
    keys: Paged,
    k: int,
    num_slots: int,
    deterministic: bool,  # noqa: ARG001 - the fixed order is also the fastest
) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.flat_topk."""
    num_queries = queries.shape[0]
    num_slots = min(num_slots, keys.page_table.numel() << keys.page_shift)
    num_chunks = max(1, math.ceil(num_queries / _TASK_QUERIES))
    # Enough parts of the keys that every thread has a task, and as many for the last ones as for the first.
    wanted = math.ceil(2 * torch.get_num_threads() / num_chunks)
    num_parts = max(1, min(wanted, num_slots // _LEAST_SLOTS))
    # Ids rise from part to part, so that of equal scores the first is the one with the lowest id.
    part_scores = torch.empty(num_queries, num_parts, k, dtype=torch.float32, device="cpu")
    part_ids = torch.empty(num_queries, num_parts, k, dtype=torch.int64, device="cpu")
    use_threads(num_queries * num_slots * keys.width)
    _scan(
        view(queries),
        storage(keys.rows),
        view(keys.page_table),
        keys.page_shift,
        num_slots,
        _TASK_QUERIES,
        part_scores.numpy(),
        part_ids.numpy(),
    )
    scores, place = select_topk(part_scores.flatten(1), k)
    return scores.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf), part_ids.flatten(1).gather(1, place)
