"""The best slots by product keys of two or more parts: of all products, or of some ranges of slots alone.

A kernel scores and merges the parts of a query in one pass where there is one. Elsewhere parts are scored in pairs (one
alone by the kernel of flat keys), and lists of winners are merged, to the same bits. Sums are monotone, so that of each
list its k best are enough: the answer is the true top-k.

Shape legend: B bags, H heads, K top-k, P parts ("ways"), N half-keys of a codebook, d width of a part, M = B * H.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mempool.client.keys.boxes import Box, Range, boxes, pairs_of

if TYPE_CHECKING:
    from mempool.kernels import Paged


class Found(NamedTuple):
    """Winners of some parts, or of all.

    Attributes:
        scores: [B, H, K] float32.
        parts: Of each part the half-keys, [B, H, K] int64.
    """

    scores: Tensor
    parts: tuple[Tensor, ...]


def best_slots(
    queries_BHD: Tensor, keys_HPNd: Tensor, topk: int, edges: Sequence[int], *, deterministic: bool
) -> Found:
    """The top-k of the slots in some ranges, by (score descending, id ascending). No gradients.

    Args:
        queries_BHD: [B, H, P * d] float32.
        keys_HPNd: [H, P, N, d] float32.
        topk: At most as many slots as the ranges have.
        edges: First slots of ranges and the ones after their last, in turn, ascending; at most N ** P. Slot
            ``((i1 * N) + i2) * N + ...`` is of the half-keys i1, i2, ...
        deterministic: As in ``mempool.kernels.product_topk``.
    """
    ways, size = keys_HPNd.shape[1:3]
    queries, keys = queries_BHD.detach(), alias(keys_HPNd)
    with torch.autocast(queries.device.type, enabled=False):
        if ways == 2 and list(edges) == [0, size**2]:
            return _pair(queries, keys, topk, deterministic)
        found = [
            _best_in(box, queries, keys, topk, deterministic)
            for first, end in zip(edges[::2], edges[1::2], strict=True)
            for box in boxes(first, end, size, ways)
        ]
        return best_of(found, topk, size)


def gradients(
    queries_BHD: Tensor, keys_HPNd: Tensor, index: tuple[Tensor, ...], grads_BHK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores of chosen half-keys, of the shapes of queries and keys, float32; in a fixed order."""
    from mempool.kernels import product_gradient

    ways, _, width = keys_HPNd.shape[1:]
    queries, keys = queries_BHD.detach(), alias(keys_HPNd)
    # A backward pass inside an autocast region would make products in bfloat16.
    with torch.autocast(grads_BHK.device.type, enabled=False):
        if ways == 2:
            return product_gradient(queries, keys, index[0], index[1], grads_BHK)
        of_queries, of_keys = torch.empty_like(queries), torch.empty_like(keys)
        for first in range(0, ways, 2):
            # The last one of an odd number makes a pair with the one before, whose gradient comes out once more.
            pair = slice(first, first + 2) if first + 2 <= ways else slice(first - 1, first + 1)
            columns = slice(pair.start * width, pair.stop * width)
            index1, index2 = index[pair]
            of_queries[..., columns], of_keys[:, pair] = product_gradient(
                queries[..., columns].contiguous(), keys[:, pair].contiguous(), index1, index2, grads_BHK
            )
        return of_queries, of_keys


def alias(parameter: Tensor) -> Tensor:
    """The same memory as another tensor: torch never resizes a storage again that was seen by numpy, as FSDP must."""
    detached = parameter.detach()
    return torch.utils.dlpack.from_dlpack(detached) if detached.device.type == "cpu" else detached


def best_of(found: list[Found], topk: int, size: int) -> Found:
    """The best of boxes that come by rising ids."""
    from mempool.kernels import select_topk

    if len(found) == 1:
        return found[0]
    ordered = [_by_id(each, size) for each in found]
    scores = torch.cat([each.scores for each in ordered], dim=-1)
    every = tuple(torch.cat(parts, dim=-1) for parts in zip(*(each.parts for each in ordered), strict=True))
    best, places = select_topk(scores.flatten(0, -2), topk)
    places = places.view(*scores.shape[:-1], topk)
    return Found(best.view(places.shape), tuple(each.gather(-1, places) for each in every))


def slot_ids(index: tuple[Tensor, ...], stride: int) -> Tensor:
    """Slots of half-keys: each part counts for ``stride`` of the next."""
    ids = index[0]
    for each in index[1:]:
        ids = ids * stride + each
    return ids


def best_keys(queries_BD: Tensor, keys_ND: Tensor, topk: int, *, deterministic: bool) -> tuple[Tensor, Tensor]:
    """The best of some keys: scores [B, topk] float32 and their numbers int64, best first, by the kernel of flat keys.

    It has NaN for no candidate. Such places, and those beyond the last key, get the number -1 and NaN here.
    """
    from mempool.kernels import flat_topk

    queries, num_keys = queries_BD.contiguous(), keys_ND.shape[0]
    scores, ids = flat_topk(queries, one_page(keys_ND), topk, num_keys, deterministic=deterministic)
    return scores.masked_fill(ids < 0, torch.nan), ids


def one_page(keys_ND: Tensor) -> "Paged":
    """Keys as kernels take those of a shard."""
    from mempool.kernels import Paged

    page = torch.zeros(1, dtype=torch.int32, device=keys_ND.device)
    return Paged(keys_ND.contiguous(), page, max(1, keys_ND.shape[0] - 1).bit_length())


def some_of(ids: Tensor) -> Tensor:
    """Ids with those that are missing (-1), where scores are NaN, filled up by the first ones: any slot that exists."""
    return torch.where(ids < 0, torch.arange(ids.shape[-1], dtype=torch.int64, device=ids.device), ids)


def _pair(queries: Tensor, keys: Tensor, topk: int, deterministic: bool) -> Found:
    """[B, H, 2 * d] against whole codebooks [H, 2, N, d]."""
    # Imported here so that importing mempool.nn does not load the kernels.
    from mempool.kernels import SCORING, make_ready, product_indices

    if queries.device.type == "cpu":
        make_ready(SCORING)  # once: with its gradient, on all cores where it has to be compiled
    scores, index1, index2 = product_indices(queries, keys, topk, deterministic=deterministic)
    return Found(scores, (index1, index2))


def _best_in(box: Box, queries: Tensor, keys: Tensor, topk: int, deterministic: bool) -> Found:
    """The k best of a box, or as many as it has."""
    from mempool.kernels import SCORING_PARTS, make_ready, parts_topk

    size = keys.shape[2]
    # Where more than the first part is cut, pairs are made of others, whose sums have other bits.
    if len(box) > 2 and all(each == (0, size) for each in box[1:]) and topk <= box[0][1] - box[0][0]:
        if queries.device.type == "cpu":
            make_ready(SCORING_PARTS)
        fused = parts_topk(queries, keys, topk, box)
        if fused is not None:
            found = Found(fused[0], tuple(fused[1]))
            left_open = (found.parts[0][..., 0] < 0).any(dim=-1).nonzero().squeeze(-1)
            if left_open.numel():
                rest = _merged(box, queries[left_open], keys, topk, deterministic)
                for whole, part in zip((found.scores, *found.parts), (rest.scores, *rest.parts), strict=True):
                    whole[left_open] = part
            return found
    return _merged(box, queries, keys, topk, deterministic)


def _merged(box: Box, queries: Tensor, keys: Tensor, topk: int, deterministic: bool) -> Found:
    """As ``_best_in``, of pairs."""
    size, width = keys.shape[2:]
    lists = []
    for parts in pairs_of(box, size, topk):
        # Where the first codebook of a pair is cut, NaN take the places of what is cut off, behind what is left: they
        # never win over a number, nor over NaN before them. It needs as many numbers as are taken of a codebook.
        start, end = box[parts.start]
        own, codebooks = queries[..., parts.start * width : parts.stop * width], keys[:, parts]
        if parts.stop - parts.start == 1:
            lists.append(_part(own, codebooks[:, 0], box[parts.start], topk, deterministic))
            continue
        if end - start < size:
            codebooks = codebooks.clone()
            codebooks[:, 0, : end - start] = keys[:, parts.start, start:end]
            codebooks[:, 0, end - start :] = torch.nan
        k = min(topk, (end - start) * size)
        scores, (rows, columns) = _pair(own.contiguous(), codebooks.contiguous(), k, deterministic)
        lists.append(Found(scores, (rows + start, columns)))
    found = lists[0]
    for other in lists[1:]:
        found = _best_sums(_by_id(found, size), _by_id(other, size), topk)
    return found


def _part(queries: Tensor, keys_HNd: Tensor, range_: Range, topk: int, deterministic: bool) -> Found:
    """The best of one part alone."""
    first, end = range_
    k = min(topk, end - first)
    found = [
        best_keys(queries[:, head], keys_HNd[head, first:end], k, deterministic=deterministic)
        for head in range(keys_HNd.shape[0])
    ]
    scores, index = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
    return Found(scores, (some_of(index) + first,))


def _by_id(found: Found, size: int) -> Found:
    order = slot_ids(found.parts, size).argsort(dim=-1)
    return _taken(found, order)


def _taken(found: Found, places: Tensor) -> Found:
    return Found(found.scores.gather(-1, places), tuple(each.gather(-1, places) for each in found.parts))


def _best_sums(left: Found, right: Found, topk: int) -> Found:
    """The best sums of winners of some parts and of those after them, both by id, so that ties go by id."""
    from mempool.kernels import best_sums

    shape = left.scores.shape[:-1]
    lefts, rights = left.scores.flatten(0, -2), right.scores.flatten(0, -2)
    k = min(topk, lefts.shape[-1] * rights.shape[-1])
    place1, place2 = (each.view(*shape, k) for each in best_sums(lefts, rights, k))
    lefts_best, rights_best = _taken(left, place1), _taken(right, place2)
    return Found(lefts_best.scores + rights_best.scores, (*lefts_best.parts, *rights_best.parts))
