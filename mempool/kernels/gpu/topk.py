"""Scoring on the GPU: product keys, flat keys, and the gradient of product scores.

Scores are made a chunk of them at a time, small enough to stay in the GPU's second-level cache until they are selected
from, and a little later overwritten. A deterministic score is one chain of fused multiply-adds from zero, in the order
of the key dimension, as on the CPU: it does not depend on the batch nor on how keys are spread over shards.
"""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.gpu import tuning
from mempool.kernels.gpu.bags import weighted_sum
from mempool.kernels.gpu.elements import contiguous, decode, load_stored, locate, storage
from mempool.kernels.gpu.segments import segment_sum
from mempool.kernels.gpu.selection import product_select, select_topk
from mempool.kernels.gpu.sorting import sort_pairs


@triton.jit
def _dot(acc, left, right, DETERMINISTIC: tl.constexpr):
    """acc + left @ right, of float32. On a GPU "ieee" is one chain of fused multiply-adds for each score."""
    if DETERMINISTIC:
        acc = tl.dot(left, right, acc, input_precision="ieee")
    else:
        acc = tl.dot(left, right, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["num_queries", "num_heads"])
def product_scores_kernel(
    queries,
    keys,
    out,
    num_queries,
    num_heads,
    num_keys,
    HALF_DIM: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """One program a tile of queries, a tile of half-keys and a codebook: out [2, B, H, n]."""
    query = tl.program_id(0).to(tl.int64) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    key = tl.program_id(1).to(tl.int64) * KEY_TILE + tl.arange(0, KEY_TILE)
    head = tl.program_id(2).to(tl.int64) // 2
    half = tl.program_id(2).to(tl.int64) % 2
    query_mask = (query < num_queries)[:, None]
    key_mask = (key < num_keys)[:, None]
    query_row = queries + ((query * num_heads + head) * 2 + half)[:, None] * HALF_DIM
    key_row = keys + ((head * 2 + half) * num_keys + key)[:, None] * HALF_DIM
    acc = tl.zeros([QUERY_TILE, KEY_TILE], dtype=tl.float32)
    for start in range(0, HALF_DIM, DIM_TILE):
        dim = start + tl.arange(0, DIM_TILE)[None, :]
        left = tl.load(query_row + dim, mask=query_mask & (dim < HALF_DIM), other=0.0)
        right = tl.load(key_row + dim, mask=key_mask & (dim < HALF_DIM), other=0.0)
        acc = _dot(acc, left, tl.trans(right), DETERMINISTIC)
    out_row = out + ((half * num_queries + query) * num_heads + head) * num_keys
    tl.store(out_row[:, None] + key[None, :], acc, mask=query_mask & (key < num_keys)[None, :])


def product_topk(queries: Tensor, keys: Tensor, k: int, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See mempool.kernels.product_indices."""
    num_queries, num_heads, dim = queries.shape
    num_keys, device = keys.shape[2], queries.device
    queries, keys = contiguous(queries), contiguous(keys)
    shape = (num_queries, num_heads, k)
    best = torch.empty(shape, dtype=torch.float32, device=device)
    index1, index2 = torch.empty(2, *shape, dtype=torch.int64, device=device)
    tile = tuning.score_tile(deterministic)
    chunk = max(1, tuning.SCRATCH_SCORES // max(1, 2 * num_heads * num_keys))
    for first in range(0, num_queries, chunk):
        end = min(first + chunk, num_queries)
        scores = torch.empty(2, (end - first) * num_heads, num_keys, dtype=torch.float32, device=device)
        grid = (triton.cdiv(end - first, tile["QUERY_TILE"]), triton.cdiv(num_keys, tile["KEY_TILE"]), num_heads * 2)
        with torch.cuda.device_of(queries):
            product_scores_kernel[grid](
                queries[first:end],
                keys,
                scores,
                end - first,
                num_heads,
                num_keys,
                HALF_DIM=dim // 2,
                DETERMINISTIC=deterministic,
                **tile,
            )
        half1, half2 = product_select(scores[0], scores[1], k, num_keys)
        best[first:end] = (scores[0].gather(1, half1) + scores[1].gather(1, half2)).view(-1, num_heads, k)
        index1[first:end], index2[first:end] = half1.view(-1, num_heads, k), half2.view(-1, num_heads, k)
    return best, index1, index2


def product_gradient(
    queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor
) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_gradient.

    Half-keys are the rows of an arena, the winners of a query's half are a bag: the gradient of the queries is the
    weighted sum of the bags, that of the half-keys the segment sum of the queries.
    """
    num_queries, num_heads, dim = queries.shape
    num_keys, num_winners, device = keys.shape[2], grads.shape[2], queries.device
    rows = contiguous(keys).view(num_heads * 2 * num_keys, dim // 2)
    # One page, of all rows.
    arena = Paged(rows, torch.zeros(1, dtype=torch.int32, device=device), rows.shape[0].bit_length())
    codebook = torch.arange(num_heads * 2, device=device).view(1, num_heads, 2, 1) * num_keys
    ids = (torch.stack([index1, index2], dim=2) + codebook).flatten()
    weights = grads.detach()[:, :, None].expand(-1, -1, 2, -1).flatten()
    bags = torch.arange(num_queries * num_heads * 2, device=device)
    offsets = torch.arange(bags.numel() + 1, device=device) * num_winners
    query_grads = weighted_sum(arena, ids, weights, offsets, torch.float32).view(num_queries, num_heads, dim)
    pairs = sort_pairs(arena, ids)
    halves = contiguous(queries).view(bags.numel(), dim // 2)
    key_grads = torch.zeros_like(rows)
    key_grads[pairs.rows] = segment_sum(pairs, weights, bags.repeat_interleave(num_winners), halves)
    return query_grads, key_grads.view(keys.shape)


@triton.jit(
    do_not_specialize=["num_queries", "num_pages", "page_shift", "first_slot", "num_slots", "skip", "out_width"]
)
def flat_scores_kernel(
    queries,
    rows,
    page_table,
    out,
    num_queries,
    num_pages,
    page_shift,
    first_slot,
    num_slots,
    skip,
    out_width,
    WIDTH: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """One program a tile of slots from first_slot on and a tile of queries; NaN for slots that are not here.

    Scores are written behind the first ``skip`` columns of out [B, out_width].
    """
    query = tl.program_id(1).to(tl.int64) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    offset = tl.program_id(0).to(tl.int64) * KEY_TILE + tl.arange(0, KEY_TILE)
    query_mask = (query < num_queries)[:, None]
    slot_mask = offset < num_slots
    row, here = locate(first_slot + offset, page_table, num_pages, page_shift, slot_mask)
    acc = tl.zeros([QUERY_TILE, KEY_TILE], dtype=tl.float32)
    for start in range(0, WIDTH, DIM_TILE):
        dim = start + tl.arange(0, DIM_TILE)[None, :]
        left = tl.load(queries + query[:, None] * WIDTH + dim, mask=query_mask & (dim < WIDTH), other=0.0)
        right = decode(load_stored(rows + row[:, None] * WIDTH + dim, here[:, None] & (dim < WIDTH)))
        acc = _dot(acc, left, tl.trans(right), DETERMINISTIC)
    acc = tl.where(here[None, :], acc, float("nan"))
    place = out + query[:, None] * out_width + skip + offset[None, :]
    tl.store(place, acc, mask=query_mask & slot_mask[None, :])


def flat_topk(queries: Tensor, keys: Paged, k: int, num_slots: int, deterministic: bool) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.flat_topk."""
    num_queries, device = queries.shape[0], queries.device
    queries = contiguous(queries)
    num_slots = min(num_slots, keys.page_table.numel() << keys.page_shift)
    best_ids = torch.full((num_queries, k), -1, dtype=torch.int64, device=device)
    best_scores = torch.full(
        (num_queries, k), torch.nan, dtype=torch.float32, device=device
    )  # NaN marks an empty place
    tile = tuning.score_tile(deterministic)
    tile_slots = max(4 * k, tile["KEY_TILE"], tuning.SCRATCH_SCORES // max(1, num_queries))
    for first in range(0, num_slots if num_queries else 0, tile_slots):
        # The best so far stand before the tile's scores: their ids are smaller and in order among ties, so that
        # selection by position is selection by id.
        count = min(tile_slots, num_slots - first)
        scratch = torch.empty(num_queries, k + count, dtype=torch.float32, device=device)
        scratch[:, :k] = best_scores
        with torch.cuda.device_of(queries):
            flat_scores_kernel[(triton.cdiv(count, tile["KEY_TILE"]), triton.cdiv(num_queries, tile["QUERY_TILE"]))](
                queries,
                storage(keys.rows),
                keys.page_table,
                scratch,
                num_queries,
                keys.page_table.numel(),
                keys.page_shift,
                first,
                count,
                k,
                k + count,
                WIDTH=keys.width,
                DETERMINISTIC=deterministic,
                **tile,
            )
        best_scores, index = select_topk(scratch, k)
        best_ids = torch.where(index < k, best_ids.gather(1, index.clamp(max=k - 1)), index - k + first)
    missing = best_scores.isnan()
    return best_scores.masked_fill(missing, -torch.inf), best_ids.masked_fill(missing, -1)
