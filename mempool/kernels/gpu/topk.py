"""Selection on the GPU by (score descending, id ascending): top-k of rows, of product keys, of flat keys.

Scores are summed in the order of the key dimension without fused multiply-add, so they do not depend on the batch nor
on how keys are spread over shards, and have the bits of the CPU's.
"""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels import torch_ops
from mempool.kernels.arguments import Paged
from mempool.kernels.gpu.elements import STRICT, contiguous, load, locate, storage

_QUERY_TILE = 16
_KEY_TILE = 64
# Scores that one program of the selection holds, of one row or several.
_SELECT_CHUNK = 4096
# Winners are taken out one after the other; for more of them sorting is cheaper, and torch's own does it.
_LARGEST_K = 256
# Scores of flat keys held at once.
_SCRATCH_ELEMENTS = 1 << 24
_LOWEST_RANK = tl.constexpr(-(2**63))


@triton.jit
def _ranks(score, position):
    """Integers that order by (score descending, position ascending) when sorted descending; NaN below all numbers."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    ordered = tl.where(bits >= 0, bits, -2147483648 - bits)  # -0.0 becomes 0, which 0.0 is
    ordered = tl.where(score == score, ordered, -2147483648)
    return (ordered << 32) | (4294967295 - position)


@triton.jit(do_not_specialize=["num_rows", "num_scores", "half_k", "k"])
def select_kernel(
    source,
    other,
    best,
    num_rows,
    num_scores,
    half_k,
    k,
    SOURCE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The k best ranks of a chunk of ROWS rows, descending: best [M, chunks, k], the lowest rank where there are fewer.

    SOURCE says what a row is made of: "scores" source[M, num_scores]; "grid" the sums of source[M, half_k] (rows of the
    grid) and other[M, half_k] (columns); "ranks" source[M, num_scores], ranks from chunks before.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    chunk = tl.program_id(1).to(tl.int64)
    position = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    row_mask = row < num_rows
    mask = row_mask & (position < num_scores)
    if SOURCE == "ranks":
        ranks = tl.load(source + row * num_scores + position, mask=mask, other=_LOWEST_RANK)
    else:
        if SOURCE == "grid":
            score = tl.load(source + row * half_k + position // half_k, mask=mask, other=0.0)
            score += tl.load(other + row * half_k + position % half_k, mask=mask, other=0.0)
        else:
            score = tl.load(source + row * num_scores + position, mask=mask, other=0.0)
        ranks = tl.where(mask, _ranks(score, position), _LOWEST_RANK)
    out = best + (row * tl.num_programs(1) + chunk) * k
    for place in range(k):
        highest = tl.max(ranks, axis=1)[:, None]
        tl.store(out + place, highest, mask=row_mask)
        ranks = tl.where(ranks == highest, _LOWEST_RANK, ranks)


def _select(source: Tensor, other: Tensor, *, num_scores: int, k: int, kind: str) -> Tensor:
    """Ranks [M, k] of the best, chunk by chunk and then among the winners of the chunks."""
    num_rows, half_k = source.shape
    while True:
        chunk = min(_SELECT_CHUNK, max(2, int(triton.next_power_of_2(num_scores))))
        num_chunks = triton.cdiv(num_scores, chunk)
        rows_tile = max(1, min(_SELECT_CHUNK // chunk, int(triton.next_power_of_2(num_rows))))
        best = torch.empty(num_rows, num_chunks * k, dtype=torch.int64, device=source.device)
        with torch.cuda.device_of(source):
            select_kernel[(triton.cdiv(num_rows, rows_tile), num_chunks)](
                source,
                other,
                best,
                num_rows,
                num_scores,
                half_k,
                k,
                SOURCE=kind,
                ROWS=rows_tile,
                CHUNK=chunk,
                **STRICT,
            )
        if num_chunks == 1:
            return best
        source, other, num_scores, kind = best, best, num_chunks * k, "ranks"


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.select_topk."""
    if k > _LARGEST_K or not scores.shape[0]:
        return torch_ops.select_topk(scores, k)
    scores = contiguous(scores)
    index = torch_ops.positions(_select(scores, scores, num_scores=scores.shape[1], k=k, kind="scores"))
    return scores.gather(1, index), index


def product_select(scores1: Tensor, scores2: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_select."""
    if k > _LARGEST_K or not scores1.shape[0]:
        return torch_ops.product_select(scores1, scores2, k, stride)
    half_k = min(k, scores1.shape[1])
    # In the order of their indices, row-major positions in the grid of sums rise with the id: ties go by id.
    index1 = select_topk(scores1, half_k)[1].sort(dim=1).values
    index2 = select_topk(scores2, half_k)[1].sort(dim=1).values
    half1, half2 = scores1.gather(1, index1), scores2.gather(1, index2)
    position = torch_ops.positions(_select(half1, half2, num_scores=half_k * half_k, k=k, kind="grid"))
    return index1.gather(1, position // half_k), index2.gather(1, position % half_k)


@triton.jit
def product_scores_kernel(
    queries,
    keys,
    out,
    num_queries,
    num_heads,
    num_keys,
    half_dim,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    """One program a tile of queries, a tile of half-keys and a codebook: out [2, B, H, n]."""
    query = tl.program_id(0).to(tl.int64) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    key = tl.program_id(1).to(tl.int64) * KEY_TILE + tl.arange(0, KEY_TILE)
    head = tl.program_id(2).to(tl.int64) // 2
    half = tl.program_id(2).to(tl.int64) % 2
    query_mask = query < num_queries
    key_mask = key < num_keys
    query_row = queries + ((query * num_heads + head) * 2 + half) * half_dim
    key_row = keys + ((head * 2 + half) * num_keys + key) * half_dim
    acc = tl.zeros([QUERY_TILE, KEY_TILE], dtype=tl.float32)
    for dim in range(half_dim):
        left = tl.load(query_row + dim, mask=query_mask, other=0.0)
        right = tl.load(key_row + dim, mask=key_mask, other=0.0)
        acc += left[:, None] * right[None, :]
    out_row = out + ((half * num_queries + query) * num_heads + head) * num_keys
    tl.store(out_row[:, None] + key[None, :], acc, mask=query_mask[:, None] & key_mask[None, :])


def product_topk(queries: Tensor, keys: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.product_topk."""
    num_queries, num_heads, dim = queries.shape
    num_keys = keys.shape[2]
    scores = torch.empty(2, num_queries * num_heads, num_keys, dtype=torch.float32, device=queries.device)
    if num_queries:
        grid = (triton.cdiv(num_queries, _QUERY_TILE), triton.cdiv(num_keys, _KEY_TILE), num_heads * 2)
        with torch.cuda.device_of(queries):
            product_scores_kernel[grid](
                contiguous(queries),
                contiguous(keys),
                scores,
                num_queries,
                num_heads,
                num_keys,
                dim // 2,
                QUERY_TILE=_QUERY_TILE,
                KEY_TILE=_KEY_TILE,
                **STRICT,
            )
    index1, index2 = product_select(scores[0], scores[1], k, stride)
    best = scores[0].gather(1, index1) + scores[1].gather(1, index2)
    shape = (num_queries, num_heads, k)
    return best.reshape(shape), (index1 * stride + index2).reshape(shape)


@triton.jit(do_not_specialize=["num_pages", "page_shift", "first_slot", "num_slots", "out_start", "out_width"])
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
    out_start,
    out_width,
    width,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    """One program a tile of queries and a tile of slots from first_slot on; NaN for slots that are not here."""
    query = tl.program_id(1).to(tl.int64) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    offset = tl.program_id(0).to(tl.int64) * KEY_TILE + tl.arange(0, KEY_TILE)
    query_mask = query < num_queries
    slot_mask = offset < num_slots
    row, here = locate(first_slot + offset, page_table, num_pages, page_shift, slot_mask)
    acc = tl.zeros([QUERY_TILE, KEY_TILE], dtype=tl.float32)
    for dim in range(width):
        left = tl.load(queries + query * width + dim, mask=query_mask, other=0.0)
        right = load(rows + row * width + dim, here)
        acc += left[:, None] * right[None, :]
    acc = tl.where(here[None, :], acc, float("nan"))
    place = out + query[:, None] * out_width + out_start + offset[None, :]
    tl.store(place, acc, mask=query_mask[:, None] & slot_mask[None, :])


def flat_topk(queries: Tensor, keys: Paged, k: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """See mempool.kernels.flat_topk."""
    num_queries, width = queries.shape
    device = queries.device
    num_slots = min(num_slots, keys.page_table.numel() << keys.page_shift)
    best_ids = torch.full((num_queries, k), -1, dtype=torch.int64, device=device)
    best_scores = torch.full((num_queries, k), torch.nan, device=device)  # NaN marks an empty place
    tile_slots = max(_KEY_TILE, _SCRATCH_ELEMENTS // max(1, num_queries))
    for first in range(0, num_slots if num_queries else 0, tile_slots):
        # The best so far stand before the tile's scores: their ids are smaller and in order among ties, so that
        # selection by position is selection by id.
        count = min(tile_slots, num_slots - first)
        scratch = torch.empty(num_queries, k + count, device=device)
        scratch[:, :k] = best_scores
        with torch.cuda.device_of(queries):
            flat_scores_kernel[(triton.cdiv(count, _KEY_TILE), triton.cdiv(num_queries, _QUERY_TILE))](
                contiguous(queries),
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
                width,
                QUERY_TILE=_QUERY_TILE,
                KEY_TILE=_KEY_TILE,
                **STRICT,
            )
        best_scores, index = select_topk(scratch, k)
        best_ids = torch.where(index < k, best_ids.gather(1, index.clamp(max=k - 1)), index - k + first)
    missing = best_scores.isnan()
    return best_scores.masked_fill(missing, -torch.inf), best_ids.masked_fill(missing, -1)
