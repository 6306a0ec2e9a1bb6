"""Scoring of product keys on the CPU: half scores in the cache, the two-stage selection, and its gradient.

No thread count, batch or place in a batch changes the bits of a result.

What is rare is left to torch's operations, for the compiler's time too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.cpu.runtime import Array, kernel, serial, spread, use_threads, view
from mempool.kernels.cpu.scoring.scores import TILE_KEYS, TILE_QUERIES, add_scaled, fill_up, pack, tile_scores
from mempool.kernels.cpu.scoring.selection import (
    NAN_ORDER,
    count_distinct,
    count_places,
    order_of,
    padded,
    rank_of,
    scratch,
    select,
    threshold,
)

_TASK_ROWS = 16
# Half scores that a task holds at once: they should stay in the second-level cache.
_TASK_SCORES = 1 << 17
_MOST_GROUPS = 4
# Sums of all pairs held at once, of queries that the kernel leaves open.
_OPEN_SUMS = 1 << 22
# Ids up to here fit into the low half of a rank.
MOST_IDS = 1 << 32
# With more winners than this, the sums of all pairs are not much more than those that can win.
_HYPERBOLA_K = 256
_HALF_BITS = 32
_HALF_MASK = (1 << _HALF_BITS) - 1
_COLUMNS = 64


@serial
def _select_rows(task: Any, scores: Array, values: Array, index: Array) -> None:
    num_rows, k = values.shape
    num_scores = scores.shape[1]
    flat = scores.reshape(-1)
    orders, maxima, found, ranks, places = scratch(num_scores, k)
    for row in range(task * _TASK_ROWS, min((task + 1) * _TASK_ROWS, num_rows)):
        select(flat, row * num_scores, num_scores, k, orders, maxima, found, ranks, places, index[row])
        for place in range(k):
            values[row, place] = scores[row, index[row, place]]


@kernel
def _select_topk(scores: Array, values: Array, index: Array) -> None:
    spread((values.shape[0] + _TASK_ROWS - 1) // _TASK_ROWS, _select_rows, (scores, values, index))


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.select_topk."""
    values = torch.empty(scores.shape[0], k, dtype=torch.float32, device="cpu")
    index = torch.empty(scores.shape[0], k, dtype=torch.int64, device="cpu")
    use_threads(scores.numel())
    _select_topk(view(scores), values.numpy(), index.numpy())
    return values, index


def _hyperbola(k: int, half_k: int) -> Array:
    """Pairs of ranks (rank1, rank2) that fewer than k pairs are at least as good as: only they can be the k-th best."""
    pairs = [(r1, r2) for r1 in range(min(k, half_k)) for r2 in range(min(half_k, k // (r1 + 1)))]
    return np.array(pairs, dtype=np.int64)


@serial
def select_pairs(
    values1: Array,
    index1: Array,
    values2: Array,
    index2: Array,
    num_keys: int,
    pairs: Array,
    merging: Any,
    out_scores: Array,
    out1: Array,
    out2: Array,
) -> bool:
    """The k best sums of the winners of both halves, by (score descending, id ascending).

    Returns False, with nothing written, where that takes more than this: sums that are not finite, or more ties for the
    last place than there is room for. Its scratch is ``merging``, as of ``task_scratch``.
    """
    orders, ranks, places, slots = merging
    k, half_k, num_pairs = out1.shape[0], values1.shape[0], pairs.shape[0]
    # Sums fall along rows and columns where they are finite. Others could be inf - inf.
    high, low = values1[0] + values2[0], values1[half_k - 1] + values2[half_k - 1]
    if num_pairs == 0 or not (high < np.float32(np.inf) and low > np.float32(-np.inf)):
        return False
    for pair in range(num_pairs):
        orders[pair] = order_of(values1[pairs[pair, 0]] + values2[pairs[pair, 1]])
    end = padded(num_pairs)
    for pair in range(num_pairs, end):
        orders[pair] = NAN_ORDER
    least = threshold(orders, end, k, 2, order_of(low), order_of(high))
    count = 0
    for rank1 in range(half_k):
        for rank2 in range(half_k):
            order = order_of(values1[rank1] + values2[rank2])
            if order < least:
                break
            if count == slots.shape[0]:
                return False
            orders[count] = order
            slots[count] = rank1 << _HALF_BITS | rank2
            count += 1
    if not count_distinct(orders, count, places):
        for candidate in range(count):
            rank1, rank2 = slots[candidate] >> _HALF_BITS, slots[candidate] & _HALF_MASK
            ranks[candidate] = rank_of(orders[candidate], index1[rank1] * num_keys + index2[rank2])
        count_places(ranks, count, places)
    for candidate in range(count):
        place = places[candidate]
        if place < k:
            rank1, rank2 = slots[candidate] >> _HALF_BITS, slots[candidate] & _HALF_MASK
            out_scores[place] = values1[rank1] + values2[rank2]
            out1[place], out2[place] = index1[rank1], index2[rank2]
    return True


@serial
def task_scratch(
    task_queries: int, panels: Array, num_parts: int, num_keys: int, num_best: int, num_pairs: int, k: int
) -> Any:
    """What a task of queries needs that keeps the best of each of a head's parts, and merges pairs of them.

    Returns:
        Scores of a part, and the queries' columns of it; what ``select`` needs, what ``select_pairs`` needs; scores and
        half-keys of the best, [parts, queries, best].
    """
    num_panels, num_dims = panels.shape[1], panels.shape[2] // TILE_KEYS
    room = 2 * k + 64
    merging = (
        np.empty(max(padded(num_pairs), padded(room)), dtype=np.int32),
        np.empty(padded(room), dtype=np.int64),
        np.empty(room, dtype=np.int64),
        np.empty(room, dtype=np.int64),
    )
    return (
        np.empty(task_queries * num_panels * TILE_KEYS, dtype=np.float32),
        np.empty(task_queries * num_dims, dtype=np.float32),
        scratch(num_keys, num_best),
        merging,
        np.empty((num_parts, task_queries, num_best), dtype=np.float32),
        np.empty((num_parts, task_queries, num_best), dtype=np.int64),
    )


def pairs_of(num_keys: int, k: int) -> tuple[int, Array]:
    """Winners of a half, and the pairs of ranks to look at; none where all pairs are looked at."""
    half_k = min(k, num_keys)
    if k > _HYPERBOLA_K or num_keys * num_keys > MOST_IDS:
        return half_k, np.empty((0, 2), dtype=np.int64)
    return half_k, _hyperbola(k, half_k)


@serial
def _pack_panel(task: Any, keys: Array, panels: Array) -> None:
    num_panels = panels.shape[1]
    num_keys, num_dims = keys.shape[1:]
    codebook, panel = task // num_panels, task % num_panels
    first = panel * TILE_KEYS
    count = min(TILE_KEYS, num_keys - first)
    pack(keys[codebook], first, count, 0, num_dims, TILE_KEYS, panels[codebook, panel], 0)
    fill_up(count, num_dims, TILE_KEYS, panels[codebook, panel], 0)


@kernel
def _pack_keys(keys: Array, panels: Array) -> None:
    """[C, n, d] keys into [C, n / TILE_KEYS, d * TILE_KEYS] panels, the last one filled up with zeros."""
    spread(panels.shape[0] * panels.shape[1], _pack_panel, (keys, panels))


def packed(keys: Tensor) -> Array:
    """[H, P, n, d] keys as panels, those of a codebook after those of the one before."""
    num_heads, parts, num_keys, num_dims = keys.shape
    panels = np.empty((num_heads * parts, math.ceil(num_keys / TILE_KEYS), num_dims * TILE_KEYS), dtype=np.float32)
    use_threads(keys.numel())
    _pack_keys(view(keys.flatten(0, 1)), panels)
    return panels


def queries_of_task(num_queries: int, num_heads: int, num_keys: int) -> int:
    """Groups that share a panel while it is in the cache; fewer where every thread would not get some."""
    groups, num_panels = math.ceil(num_queries / TILE_QUERIES), math.ceil(num_keys / TILE_KEYS)
    fitting = max(1, min(_MOST_GROUPS, _TASK_SCORES // (TILE_QUERIES * num_panels * TILE_KEYS)))
    return TILE_QUERIES * max(1, min(fitting, groups * num_heads // (4 * torch.get_num_threads())))


@serial
def score_codebook(
    queries: Array, first: int, held: int, codebook: int, panels: Array, group: Array, own: Array
) -> None:
    """Scores of ``held`` queries from ``first`` against one codebook, into ``own``, a row of whole panels each.

    Args:
        queries: [B, codebooks * D].
        first: Of the queries.
        held: How many.
        codebook: Its number.
        panels: Its keys.
        group: Scratch, D floats a query, in whole tiles of queries.
        own: As above.
    """
    num_panels, num_dims = panels.shape[0], panels.shape[1] // TILE_KEYS
    width = num_panels * TILE_KEYS
    for start in range(0, held, TILE_QUERIES):
        count = min(TILE_QUERIES, held - start)
        into = start * num_dims
        pack(queries, first + start, count, codebook * num_dims, num_dims, TILE_QUERIES, group, into)
        fill_up(count, num_dims, TILE_QUERIES, group, into)
    for panel in range(num_panels):
        keys = panels[panel]
        for start in range(0, held, TILE_QUERIES):
            tile_scores(group, start * num_dims, keys, 0, num_dims, own, start * width + panel * TILE_KEYS, width)


@serial
def _score_part(
    task: Any,
    queries: Array,
    panels: Array,
    given: Array,
    num_keys: int,
    half_k: int,
    task_queries: int,
    pairs: Array,
    out_scores: Array,
    out1: Array,
    out2: Array,
    open_values: Array,
    open_index: Array,
) -> None:
    """Some queries of one head: their scores of one half after the other, the best of each, the best pairs."""
    num_queries, k = out_scores.shape[0], out_scores.shape[2]
    num_panels = panels.shape[1]
    num_parts = (num_queries + task_queries - 1) // task_queries
    head, first = task // num_parts, task % num_parts * task_queries
    held = min(task_queries, num_queries - first)
    width = num_panels * TILE_KEYS
    own, group, selecting, merging, values, index = task_scratch(
        task_queries, panels, 2, num_keys, half_k, pairs.shape[0], k
    )
    orders, maxima, found, ranks, places = selecting
    for half in range(2):
        codebook = 2 * head + half
        if num_panels > 0:
            score_codebook(queries, first, held, codebook, panels[codebook], group, own)
        for query in range(held):
            best = index[half, query]
            scores, start = own, query * width
            if num_panels == 0:
                scores, start = given[half], (first + query) * num_keys
            select(scores, start, num_keys, half_k, orders, maxima, found, ranks, places, best)
            for place in range(half_k):
                values[half, query, place] = scores[start + best[place]]
    for query in range(held):
        decided = select_pairs(
            values[0, query],
            index[0, query],
            values[1, query],
            index[1, query],
            num_keys,
            pairs,
            merging,
            out_scores[first + query, head],
            out1[first + query, head],
            out2[first + query, head],
        )
        if not decided:
            out1[first + query, head, 0] = -1
            for half in range(2):
                for place in range(half_k):
                    open_values[half, first + query, head, place] = values[half, query, place]
                    open_index[half, first + query, head, place] = index[half, query, place]


@kernel
def _select_products(
    queries: Array,
    panels: Array,
    given: Array,
    num_keys: int,
    half_k: int,
    task_queries: int,
    pairs: Array,
    out_scores: Array,
    out1: Array,
    out2: Array,
    open_values: Array,
    open_index: Array,
) -> None:
    """The best products of every query and head. Half scores are made of [B, H * D] queries and panels of keys.

    Where there are no panels they are ``given``, [2, B * n], for one head. A query whose pairs are left open has -1 in
    ``out1``, and the winners of its halves in ``open_values`` and ``open_index``, [2, B, H, half_k].
    """
    num_parts = (out_scores.shape[0] + task_queries - 1) // task_queries
    spread(
        num_parts * out_scores.shape[1],
        _score_part,
        (
            queries,
            panels,
            given,
            num_keys,
            half_k,
            task_queries,
            pairs,
            out_scores,
            out1,
            out2,
            open_values,
            open_index,
        ),
    )


def _products(
    queries: Array, panels: Array, given: Array, shape: tuple[int, int, int], num_keys: int, task_queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and half-keys of the best products, each of ``shape`` [B, H, k]."""
    half_k, pairs = pairs_of(num_keys, shape[2])
    scores = torch.empty(shape, dtype=torch.float32, device="cpu")
    index1, index2 = torch.empty((2, *shape), dtype=torch.int64, device="cpu")
    # Memory that is never touched costs nothing, and few queries are left open.
    open_values = torch.empty(2, *shape[:2], half_k, dtype=torch.float32, device="cpu")
    open_index = torch.empty(2, *shape[:2], half_k, dtype=torch.int64, device="cpu")
    _select_products(
        queries,
        panels,
        given,
        num_keys,
        half_k,
        task_queries,
        pairs,
        scores.numpy(),
        index1.numpy(),
        index2.numpy(),
        open_values.numpy(),
        open_index.numpy(),
    )
    left_open = (index1[..., 0] < 0).flatten().nonzero().squeeze(1)
    for rows in torch.split(left_open, max(1, _OPEN_SUMS // half_k**2)):
        # By index, so that of equal sums the first has the lowest id.
        own_index, order = open_index.flatten(1, 2)[:, rows].sort(dim=-1)
        values1, values2 = open_values.flatten(1, 2)[:, rows].gather(-1, order)
        best, place = select_topk((values1[:, :, None] + values2[:, None, :]).flatten(1), shape[2])
        scores.flatten(0, 1)[rows] = best
        index1.flatten(0, 1)[rows] = own_index[0].gather(-1, place // half_k)
        index2.flatten(0, 1)[rows] = own_index[1].gather(-1, place % half_k)
    return scores, index1, index2


def product_select(
    scores1: Tensor,
    scores2: Tensor,
    k: int,
    stride: int,  # noqa: ARG001 - ids rise with (i1, i2) for every stride of at least n
) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_select."""
    num_rows, num_keys = scores1.shape
    no_queries, no_panels = np.empty((0, 0), dtype=np.float32), np.empty((2, 0, 0), dtype=np.float32)
    given = view(torch.stack((scores1.flatten(), scores2.flatten())))
    use_threads(given.size)
    _, index1, index2 = _products(no_queries, no_panels, given, (num_rows, 1, k), num_keys, _TASK_ROWS)
    return index1[:, 0], index2[:, 0]


def product_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    deterministic: bool,  # noqa: ARG001 - the fixed order is also the fastest
) -> tuple[Tensor, Tensor, Tensor]:
    """See mempool.kernels.product_indices."""
    num_queries, num_heads, _ = queries.shape
    num_keys = keys.shape[2]
    panels = packed(keys)
    use_threads(queries.numel() * num_keys)
    given = np.empty((2, 0), dtype=np.float32)
    shape = (num_queries, num_heads, k)
    task_queries = queries_of_task(num_queries, num_heads, num_keys)
    return _products(view(queries.flatten(1)), panels, given, shape, num_keys, task_queries)


@serial
def _add_to_queries(task: Any, keys: Array, index1: Array, index2: Array, grads: Array, out: Array) -> None:
    num_queries, num_heads, k = grads.shape
    num_keys, num_dims = keys.shape[2:]
    flat_keys, flat_out = keys.reshape(-1), out.reshape(-1)
    for query in range(task * _TASK_ROWS, min((task + 1) * _TASK_ROWS, num_queries)):
        for head in range(num_heads):
            first = (query * num_heads + head) * 2 * num_dims
            for place in range(first, first + 2 * num_dims):
                flat_out[place] = np.float32(0)
            for rank in range(k):
                grad = grads[query, head, rank]
                key1 = 2 * head * num_keys + index1[query, head, rank]
                key2 = (2 * head + 1) * num_keys + index2[query, head, rank]
                add_scaled(flat_keys, key1 * num_dims, grad, flat_out, first, num_dims)
                add_scaled(flat_keys, key2 * num_dims, grad, flat_out, first + num_dims, num_dims)


@serial
def _add_to_keys(task: Any, queries: Array, index1: Array, index2: Array, grads: Array, out: Array) -> None:
    # A task owns some columns of a codebook and takes every pair in order: no other thread adds there.
    num_queries, num_heads, k = grads.shape
    num_keys, num_dims = out.shape[2:]
    num_parts = (num_dims + _COLUMNS - 1) // _COLUMNS
    codebook, first = task // num_parts, task % num_parts * _COLUMNS
    count = min(_COLUMNS, num_dims - first)
    head = codebook // 2
    index = index1 if codebook % 2 == 0 else index2
    flat_queries, flat_out = queries.reshape(-1), out.reshape(-1)
    for key in range(num_keys):
        for place in range(count):
            flat_out[(codebook * num_keys + key) * num_dims + first + place] = np.float32(0)
    for query in range(num_queries):
        source = (query * 2 * num_heads + codebook) * num_dims + first
        for rank in range(k):
            into = (codebook * num_keys + index[query, head, rank]) * num_dims + first
            add_scaled(flat_queries, source, grads[query, head, rank], flat_out, into, count)


@serial
def _gradient_task(
    task: int,
    num_long: int,
    queries: Array,
    keys: Array,
    index1: Array,
    index2: Array,
    grads: Array,
    query_grads: Array,
    key_grads: Array,
) -> None:
    if task < num_long:
        _add_to_keys(task, queries, index1, index2, grads, key_grads)
    else:
        _add_to_queries(task - num_long, keys, index1, index2, grads, query_grads)


@kernel
def _gradient(
    queries: Array, keys: Array, index1: Array, index2: Array, grads: Array, query_grads: Array, key_grads: Array
) -> None:
    num_parts = (grads.shape[0] + _TASK_ROWS - 1) // _TASK_ROWS
    num_columns = (keys.shape[3] + _COLUMNS - 1) // _COLUMNS
    # The longer tasks come first.
    num_long = 2 * keys.shape[0] * num_columns
    args = num_long, queries, keys, index1, index2, grads, query_grads, key_grads
    spread(num_long + num_parts, _gradient_task, args)


def product_gradient(
    queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor
) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_gradient."""
    query_grads = torch.empty(queries.shape, dtype=torch.float32, device="cpu")
    key_grads = torch.empty(keys.shape, dtype=torch.float32, device="cpu")
    use_threads(grads.numel() * keys.shape[3])
    _gradient(
        view(queries),
        view(keys),
        view(index1),
        view(index2),
        view(grads),
        query_grads.numpy(),
        key_grads.numpy(),
    )
    return query_grads, key_grads
