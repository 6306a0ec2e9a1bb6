"""The canonical order of a commit's pairs on the GPU: torch's stable sort, and kernels around it."""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels.arguments import Paged, SortedPairs
from mempool.kernels.gpu.elements import contiguous, locate
from mempool.kernels.gpu.tuning import SORT_TILE


@triton.jit(do_not_specialize=["num_pairs", "num_pages", "page_shift", "last"])
def sort_keys_kernel(ids, page_table, keys, num_pairs, num_pages, page_shift, last, TILE: tl.constexpr):
    """Each pair's slot id, or ``last``, above all ids, where it is not here."""
    pair = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = pair < num_pairs
    slot = tl.load(ids + pair, mask=exists, other=0)
    _, here = locate(slot, page_table, num_pages, page_shift, exists)
    tl.store(keys + pair, tl.where(here, slot, last).to(keys.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_pairs", "last"])
def run_heads_kernel(keys, heads, num_pairs, last, TILE: tl.constexpr):
    """1 where a run of equal keys begins, 0 elsewhere."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = place < num_pairs
    key = tl.load(keys + place, mask=exists, other=0)
    before = tl.load(keys + place - 1, mask=exists & (place > 0), other=-1)
    tl.store(heads + place, ((key != before) & (key != last)).to(tl.int32), mask=exists)


@triton.jit(do_not_specialize=["num_pairs", "num_pages", "page_shift", "last"])
def runs_kernel(
    keys,
    numbers,
    page_table,
    rows,
    slots,
    starts,
    totals,
    num_pairs,
    num_pages,
    page_shift,
    last,
    TILE: tl.constexpr,
):
    """Where each run begins, and its row; of the last run, where it ends, and totals: how many runs and pairs.

    ``numbers`` says how many runs begin up to a place.
    """
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = place < num_pairs
    key = tl.load(keys + place, mask=exists, other=0).to(tl.int64)
    before = tl.load(keys + place - 1, mask=exists & (place > 0), other=-1)
    after = tl.load(keys + place + 1, mask=place + 1 < num_pairs, other=last)
    number = tl.load(numbers + place, mask=exists, other=0)
    here = exists & (key != last)
    head = here & (key != before)
    row, _ = locate(key, page_table, num_pages, page_shift, head)
    tl.store(rows + number - 1, row, mask=head)
    tl.store(slots + number - 1, key, mask=head)
    tl.store(starts + number - 1, place, mask=head)
    end = here & (after == last)
    tl.store(starts + number, place + 1, mask=end)
    one = tl.zeros([TILE], dtype=tl.int64)
    tl.store(totals + one, number.to(tl.int64), mask=end)
    tl.store(totals + 1 + one, place + 1, mask=end)


def sort_pairs(paged: Paged, ids: Tensor) -> SortedPairs:
    """See mempool.kernels.sort_pairs. Waits for the GPU once, at the end, for the number of rows."""
    num_pairs, num_pages, device = ids.numel(), paged.page_table.numel(), ids.device
    # Ids that fit are sorted as 32 bits, in half the passes.
    key_type = torch.int32 if num_pages << paged.page_shift < 2**31 - 1 else torch.int64
    last = torch.iinfo(key_type).max
    rows, slots = torch.empty(2, num_pairs, dtype=torch.int64, device=device)
    starts = torch.zeros(num_pairs + 1, dtype=torch.int64, device=device)
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    order = torch.empty(0, dtype=torch.int64, device=device)
    if num_pairs:
        grid = (triton.cdiv(num_pairs, SORT_TILE),)
        pages = (num_pages, paged.page_shift, last)
        keys = torch.empty(num_pairs, dtype=key_type, device=device)
        heads = torch.empty(num_pairs, dtype=torch.int32, device=device)
        with torch.cuda.device_of(ids):
            sort_keys_kernel[grid](contiguous(ids), paged.page_table, keys, num_pairs, *pages, TILE=SORT_TILE)
            keys, order = torch.sort(keys, stable=True)
            run_heads_kernel[grid](keys, heads, num_pairs, last, TILE=SORT_TILE)
            numbers = torch.cumsum(heads, dim=0, dtype=torch.int64)
            runs_kernel[grid](
                keys, numbers, paged.page_table, rows, slots, starts, totals, num_pairs, *pages, TILE=SORT_TILE
            )
    num_rows, num_here = totals.tolist()
    return SortedPairs(
        order=order[:num_here], rows=rows[:num_rows], slots=slots[:num_rows], starts=starts[: num_rows + 1]
    )
