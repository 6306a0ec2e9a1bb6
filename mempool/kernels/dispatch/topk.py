"""Scoring: the best of given scores, of product keys and of flat keys, and the gradient of scores.

Arguments are checked, the device picks the implementation.

Legend: B bags, H heads, K top-k, D key dim, n half-keys of a codebook, M rows of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.checking import (
    check_matrix,
    check_parts,
    check_product_gradient,
    check_product_keys,
    check_product_selection,
    check_topk,
)
from mempool.kernels.implementation import implementation_for

# Sums held at once.
_CHUNK_SUMS = 1 << 22


def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row by (score descending, index ascending); NaN never wins over a number.

    torch.topk does not say which of equal scores it takes; this does. Not differentiable: gather the scores again by
    the index for a gradient.

    Args:
        scores: [M, n] float32.
        k: Winners of a row, 1 to n.

    Returns:
        Values [M, k] float32 and index [M, k] int64, best first.
    """
    check_topk("scores", scores, k, scores.shape[-1])
    return implementation_for(scores.device).select_topk(scores.detach(), k)


def product_select(scores1: Tensor, scores2: Tensor, k: int, stride: int) -> tuple[Tensor, Tensor]:
    """The two-stage selection of product keys, given the scores of both halves.

    Takes the top min(k, n) of each half by (score descending, index ascending), then of their float32 sums the top k
    by (score descending, id ascending), ``id = i1 * stride + i2``. (Memory Layers at Scale, arXiv 2412.09764.)

    Args:
        scores1: [M, n] float32, scores of the first halves.
        scores2: [M, n] float32, scores of the second halves.
        k: Winners, 1 to n * n.
        stride: Distance of ids that differ by one in i1; at least n.

    Returns:
        i1 [M, k] and i2 [M, k], int64, best first.
    """
    num_keys = scores1.shape[-1]
    check_product_selection(num_keys, k, stride)
    check_matrix("scores1", scores1, (scores1.shape[0], num_keys), torch.float32, scores1.device)
    check_matrix("scores2", scores2, (scores1.shape[0], num_keys), torch.float32, scores1.device)
    return implementation_for(scores1.device).product_select(scores1.detach(), scores2.detach(), k, stride)


def best_sums(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best sums of one of ``scores1`` and one of ``scores2``, by (sum descending, i1 ascending, i2 ascending).

    Args:
        scores1: [M, a] float32.
        scores2: [M, b] float32.
        k: Winners, 1 to a * b.

    Returns:
        i1 [M, k] and i2 [M, k], int64, best first.
    """
    num_rows, width = scores2.shape[0], scores2.shape[-1]
    check_matrix("scores1", scores1, (num_rows, scores1.shape[-1]), torch.float32, scores2.device)
    check_matrix("scores2", scores2, (num_rows, width), torch.float32, scores2.device)
    if not 1 <= k <= scores1.shape[-1] * width:
        raise ValueError(f"k must lie in 1..{scores1.shape[-1] * width}, got {k}")
    if scores1.shape[-1] == width:
        return product_select(scores1, scores2, k, width)
    places = torch.empty(num_rows, k, dtype=torch.int64, device=scores1.device)
    chunk = max(1, _CHUNK_SUMS // max(1, scores1.shape[-1] * width))
    for first in range(0, num_rows, chunk):
        part = slice(first, first + chunk)
        places[part] = select_topk((scores1[part, :, None] + scores2[part, None, :]).flatten(1), k)[1]
    return places // width, places % width


def product_topk(
    queries: Tensor, keys: Tensor, k: int, stride: int | None = None, *, deterministic: bool = True
) -> tuple[Tensor, Tensor]:
    """Score queries against product keys and select as product_select does, without keeping the half scores.

    Args:
        queries: [B, H, D] float32; the first D // 2 columns meet the first codebook.
        keys: [H, 2, n, D // 2] float32.
        k: Winners of a head, 1 to n * n.
        stride: As in product_select; n if not given.
        deterministic: Half scores are summed in a fixed order, so that a query has the same bits alone and in any
            batch. False leaves the order to whatever is fastest; results then agree to rounding.

    Returns:
        Scores [B, H, k] float32 and slot ids [B, H, k] int64, best first.
    """
    stride = keys.shape[2] if stride is None else stride
    check_product_selection(keys.shape[2], k, stride)
    scores, index1, index2 = product_indices(queries, keys, k, deterministic=deterministic)
    return scores, index1 * stride + index2


def product_indices(
    queries: Tensor, keys: Tensor, k: int, *, deterministic: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """product_topk with the chosen half-keys in place of slot ids, as the gradient needs them.

    Args:
        queries: As in product_topk.
        keys: As in product_topk.
        k: As in product_topk.
        deterministic: As in product_topk.

    Returns:
        Scores [B, H, k] float32, i1 and i2 [B, H, k] int64, best first.
    """
    check_product_keys(queries, keys, k, keys.shape[2])
    return implementation_for(queries.device).product_topk(queries.detach(), keys.detach(), k, deterministic)


def parts_topk(
    queries: Tensor, keys: Tensor, k: int, ranges: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor] | None:
    """The best products of any number of parts, each within a range of half-keys, in one pass over a query.

    Parts are merged in pairs by product_indices' rule, and then one list after the other: scores have its bits.

    Args:
        queries: [B, H, P * d] float32.
        keys: [H, P, n, d] float32.
        k: Winners of a head.
        ranges: Of each part the first half-key and the one after the last.

    Returns:
        Scores [B, H, k] float32 and half-keys [P, B, H, k] int64, best first; where ``index[0, b, h, 0]`` is -1 that
        query is left open: its scores are not finite, or too many are equal. None: not offered for these, merge pairs.
    """
    check_parts(queries, keys, k, ranges)
    return implementation_for(queries.device).parts_topk(queries.detach(), keys.detach(), k, ranges)


def product_gradient(
    queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the scores of product_indices with respect to queries and keys.

    Only chosen half-keys are read and only they get a gradient. Sums are made in float32 in a fixed order: of a query
    by the rank of its winners; of a half-key by (query, rank).

    Args:
        queries: [B, H, D] float32.
        keys: [H, 2, n, D // 2] float32.
        index1: [B, H, K] int64, the chosen half-keys of the first codebook.
        index2: [B, H, K] int64, of the second.
        grads: [B, H, K] float32, the gradient of the scores.

    Returns:
        [B, H, D] and [H, 2, n, D // 2] float32; zeros for half-keys that were not chosen.
    """
    check_product_gradient(queries, keys, index1, index2, grads)
    implementation = implementation_for(queries.device)
    return implementation.product_gradient(queries.detach(), keys.detach(), index1, index2, grads.detach())


def flat_topk(
    queries: Tensor, keys: Paged, k: int, num_slots: int, *, deterministic: bool = True
) -> tuple[Tensor, Tensor]:
    """Score queries against the flat keys of every slot that is here; the k best by (score descending, id ascending).

    Slots are scored in tiles with a running top-k, so memory does not grow with the table.

    Args:
        queries: [B, D] float32.
        keys: The keys, an arena [R, D] of float32 or bfloat16.
        k: Winners of a query, at least 1.
        num_slots: Ids from here on are no slots (the last page may be part empty).
        deterministic: A score has the same bits in any batch and for any cut of the keys over arenas and shards. False
            leaves the order of its sum to whatever is fastest.

    Returns:
        Scores [B, k] float32 and slot ids [B, k] int64, best first, padded with -inf and -1 where there are fewer
        candidates. A slot whose score is NaN is no candidate.
    """
    check_matrix("queries", queries, (queries.shape[0], keys.width), torch.float32, keys.rows.device)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if keys.packed is not None:
        raise ValueError(f"keys must be float32 or bfloat16, got {keys.element}")
    return implementation_for(queries.device).flat_topk(queries.detach(), keys, k, num_slots, deterministic)
