"""Selection on the GPU by (score descending, id ascending): the k best of rows, and of the sums of product keys."""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels import torch_ops
from mempool.kernels.gpu.elements import STRICT, contiguous

# Scores that one program of the selection holds, of one row or several.
_SELECT_CHUNK = 4096
# Winners are taken out one after the other; for more of them sorting is cheaper, and torch's own does it.
_LARGEST_K = 256
_LOWEST_RANK = tl.constexpr(-(2**63))


@triton.jit
def _ranks(score, position):
    """Integers that order by (score descending, position ascending) when sorted descending; NaN below all numbers."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    ordered = tl.where(bits >= 0, bits, -2147483648 - bits)  # -0.0 becomes 0, which 0.0 is
    ordered = tl.where(score == score, ordered, -2147483648)
    return (ordered << 32) | (4294967295 - position)


@triton.jit(do_not_specialize=["num_rows", "half_k", "k"])
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
