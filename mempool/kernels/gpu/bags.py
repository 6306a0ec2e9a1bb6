"""Reading an arena on the GPU: weighted sums of bags, rows, and the gradient of the weights. Also writing rows."""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels import torch_ops
from mempool.kernels.arguments import Paged
from mempool.kernels.gpu.elements import STRICT, contiguous, load, locate, optional_weights, storage, tile


@triton.jit
def _pair(
    rows, page_table, ids, weights, pair, end, num_pages, page_shift, width, columns, mask, WEIGHTED: tl.constexpr
):
    """Weight times value of one pair over the program's columns, and whether the pair exists and is here."""
    exists = pair < end
    slot = tl.load(ids + pair, mask=exists, other=0)
    row, here = locate(slot, page_table, num_pages, page_shift, exists)
    product = load(rows + row * width + columns, mask & here)
    if WEIGHTED:
        product = product * tl.load(weights + pair, mask=exists, other=0.0)
    return product, here


@triton.jit(do_not_specialize=["num_pages", "page_shift"])
def weighted_sum_kernel(
    rows,
    page_table,
    ids,
    weights,
    offsets,
    out,
    num_pages,
    page_shift,
    width,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a bag and tile of columns. Four pairs are read at once, then added one after the other."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = columns < width
    first = tl.load(offsets + bag)
    end = tl.load(offsets + bag + 1)
    acc = tl.zeros([TILE], dtype=tl.float32)
    for pair in range(first, end, 4):
        part0, here0 = _pair(
            rows, page_table, ids, weights, pair, end, num_pages, page_shift, width, columns, mask, WEIGHTED
        )
        part1, here1 = _pair(
            rows, page_table, ids, weights, pair + 1, end, num_pages, page_shift, width, columns, mask, WEIGHTED
        )
        part2, here2 = _pair(
            rows, page_table, ids, weights, pair + 2, end, num_pages, page_shift, width, columns, mask, WEIGHTED
        )
        part3, here3 = _pair(
            rows, page_table, ids, weights, pair + 3, end, num_pages, page_shift, width, columns, mask, WEIGHTED
        )
        acc = tl.where(here0, acc + part0, acc)
        acc = tl.where(here1, acc + part1, acc)
        acc = tl.where(here2, acc + part2, acc)
        acc = tl.where(here3, acc + part3, acc)
    tl.store(out + bag * width + columns, acc, mask=mask)


def weighted_sum(paged: Paged, ids: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """See mempool.kernels.weighted_sum."""
    num_bags, width = offsets.numel() - 1, paged.rows.shape[1]
    out = torch.empty(num_bags, width, dtype=torch.float32, device=ids.device)
    if num_bags:
        with torch.cuda.device_of(out):
            weighted_sum_kernel[(num_bags, triton.cdiv(width, tile(width)))](
                storage(paged.rows),
                paged.page_table,
                contiguous(ids),
                optional_weights(weights, out),
                contiguous(offsets),
                out,
                paged.page_table.numel(),
                paged.page_shift,
                width,
                WEIGHTED=weights is not None,
                TILE=tile(width),
                **STRICT,
            )
    return out


@triton.jit(do_not_specialize=["num_pages", "page_shift"])
def gather_rows_kernel(rows, page_table, ids, out, num_pages, page_shift, width, TILE: tl.constexpr):
    """One program a position and tile of columns; moves stored bits, whatever they are."""
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = columns < width
    row, here = locate(tl.load(ids + position), page_table, num_pages, page_shift, True)
    stored = tl.load(rows + row * width + columns, mask=mask & here, other=0)
    tl.store(out + position * width + columns, stored, mask=mask)


def gather_rows(paged: Paged, ids: Tensor) -> Tensor:
    """See mempool.kernels.gather_rows."""
    width = paged.rows.shape[1]
    out = torch.empty(ids.numel(), width, dtype=paged.rows.dtype, device=ids.device)
    if ids.numel():
        with torch.cuda.device_of(out):
            gather_rows_kernel[(ids.numel(), triton.cdiv(width, tile(width)))](
                storage(paged.rows),
                paged.page_table,
                contiguous(ids),
                storage(out),
                paged.page_table.numel(),
                paged.page_shift,
                width,
                TILE=tile(width),
            )
    return out


@triton.jit
def scatter_rows_kernel(rows, sorted_rows, order, starts, values, width, TILE: tl.constexpr):
    """One program a distinct row and tile of columns; the last of the row's positions is the one that counts."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = columns < width
    position = tl.load(order + tl.load(starts + segment + 1) - 1)
    row = tl.load(sorted_rows + segment)
    tl.store(rows + row * width + columns, tl.load(values + position * width + columns, mask=mask), mask=mask)


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """See mempool.kernels.scatter_rows."""
    pairs = torch_ops.sort_pairs(paged, ids)
    width = paged.rows.shape[1]
    if pairs.rows.numel():
        with torch.cuda.device_of(ids):
            scatter_rows_kernel[(pairs.rows.numel(), triton.cdiv(width, tile(width)))](
                storage(paged.rows),
                pairs.rows,
                pairs.order,
                pairs.starts,
                storage(values.contiguous()),
                width,
                TILE=tile(width),
            )


@triton.jit(do_not_specialize=["num_pages", "page_shift"])
def weight_gradient_kernel(
    rows, page_table, ids, offsets, grads, out, num_pages, page_shift, width, TILE: tl.constexpr
):
    """One program a bag: the products of its gradient with each of its values."""
    bag = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + bag)
    end = tl.load(offsets + bag + 1)
    for pair in range(first, end):
        row, here = locate(tl.load(ids + pair), page_table, num_pages, page_shift, True)
        total = tl.zeros([TILE], dtype=tl.float32)
        for start in range(0, width, TILE):
            columns = start + tl.arange(0, TILE).to(tl.int64)
            mask = columns < width
            grad = tl.load(grads + bag * width + columns, mask=mask, other=0.0)
            # Masked again after the product: where not here, 0 times an infinite gradient would be NaN.
            product = grad * load(rows + row * width + columns, mask & here)
            total += tl.where(here, product, 0.0)
        tl.store(out + pair, tl.sum(total, axis=0))


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.weight_gradient."""
    num_bags, width = offsets.numel() - 1, paged.rows.shape[1]
    out = torch.empty(ids.numel(), dtype=torch.float32, device=ids.device)
    if num_bags:
        with torch.cuda.device_of(out):
            weight_gradient_kernel[(num_bags,)](
                storage(paged.rows),
                paged.page_table,
                contiguous(ids),
                contiguous(offsets),
                contiguous(grads),
                out,
                paged.page_table.numel(),
                paged.page_shift,
                width,
                TILE=tile(width),
            )
    return out
