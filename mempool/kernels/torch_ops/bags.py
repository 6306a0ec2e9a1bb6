"""Reading and writing an arena in torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.checking import check_offsets
from mempool.kernels.torch_ops.elements import codes_and_scales, read_rows, write_rows

# Gathered rows held at once, in elements: bounds the memory of sums over many pairs.
_CHUNK_ELEMENTS = 1 << 22


def locate(paged: Paged, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Arena row of each id (0 where not here) and whether it is here."""
    shift = paged.page_shift
    num_pages = paged.page_table.numel()
    pages = ids >> shift
    inside = (pages >= 0) & (pages < num_pages)
    if num_pages == 0:
        return torch.zeros_like(ids, dtype=torch.int64), inside
    arena_pages = paged.page_table[torch.where(inside, pages, 0)].to(torch.int64)
    here = inside & (arena_pages >= 0)
    rows = (arena_pages << shift) | (ids & ((1 << shift) - 1))
    return torch.where(here, rows, 0), here


def bag_of_pairs(offsets: Tensor, num_pairs: int) -> Tensor:
    """Bag of each pair, from the bags' offsets."""
    bags = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(bags, offsets.diff(), output_size=num_pairs)


def chunks(num_pairs: int, width: int) -> list[tuple[int, int]]:
    """Cut pairs, each with a row of ``width``, into pieces whose rows may be held at once."""
    size = max(1, _CHUNK_ELEMENTS // max(1, width))
    return [(first, min(first + size, num_pairs)) for first in range(0, num_pairs, size)]


def _weighted_rows(paged: Paged, rows: Tensor, weights: Tensor | None) -> Tensor:
    if paged.packed is None:
        values = paged.rows[rows].float()
        return values if weights is None else values.mul_(weights[:, None])
    codes, scales = codes_and_scales(paged.packed, paged.rows[rows])
    return codes.mul_(scales if weights is None else weights[:, None] * scales)


def weighted_sum(
    paged: Paged,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """See mempool.kernels.weighted_sum."""
    check_offsets(offsets, ids.numel())
    sums = torch.zeros(offsets.numel() - 1, paged.width, dtype=torch.float32, device=paged.rows.device)
    rows, here = locate(paged, ids)
    bags = bag_of_pairs(offsets, ids.numel())
    # Taking out the pairs that are not here, rather than weighing them by 0, keeps NaN in foreign rows out.
    rows, bags, weights = rows[here], bags[here], None if weights is None else weights[here]
    for first, end in chunks(rows.numel(), paged.width):
        part = None if weights is None else weights[first:end]
        sums.index_add_(0, bags[first:end], _weighted_rows(paged, rows[first:end], part))
    return sums.to(dtype) if out is None else out.copy_(sums)


def gather_rows(paged: Paged, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See mempool.kernels.gather_rows."""
    rows, here = locate(paged, ids)
    out = torch.zeros(ids.numel(), paged.width, dtype=dtype or paged.value_dtype, device=paged.rows.device)
    kept = here.nonzero().squeeze(1)
    for first, end in chunks(kept.numel(), paged.width):
        part = kept[first:end]
        out[part] = paged.rows[rows[part]] if paged.rows.dtype == out.dtype else read_rows(paged, rows[part]).to(out)
    return out


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """See mempool.kernels.scatter_rows."""
    pairs = sort_pairs(paged, ids)
    last = pairs.order[pairs.starts[1:] - 1]  # indexed writes leave it open which of equal rows wins
    if paged.packed is None:
        paged.rows[pairs.rows] = values[last]
        return
    for first, end in chunks(last.numel(), paged.width):
        write_rows(paged, pairs.rows[first:end], values[last[first:end]])


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor, out: Tensor | None = None) -> Tensor:
    """See mempool.kernels.weight_gradient."""
    check_offsets(offsets, ids.numel())
    out = torch.empty(ids.numel(), dtype=torch.float32, device=ids.device) if out is None else out
    out.zero_()
    rows, here = locate(paged, ids)
    bags = bag_of_pairs(offsets, ids.numel())
    for first, end in chunks(ids.numel(), paged.width):
        part = here[first:end].nonzero().squeeze(1) + first
        out[part] = (read_rows(paged, rows[part]) * grads[bags[part]]).sum(dim=1)
    return out


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """See mempool.kernels.sort_pairs."""
    _, here = locate(paged, ids)
    kept = here.nonzero().squeeze(1)
    sorted_ids, permutation = torch.sort(ids[kept].to(torch.int64), stable=True)
    distinct, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    starts = torch.zeros(distinct.numel() + 1, dtype=torch.int64, device=ids.device)
    torch.cumsum(counts, dim=0, out=starts[1:])
    return SortedPairs(order=kept[permutation], rows=locate(paged, distinct)[0], slots=distinct, starts=starts)
