"""Reading an arena on the GPU: weighted sums of bags, rows, and the gradient of the weights. Also writing rows."""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, index"
# ruff: noqa: RUF005 - what Triton does not read as Python does

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.gpu import tuning
from mempool.kernels.gpu.elements import (
    STRICT,
    arena,
    clear_padding,
    contiguous,
    decode,
    load_stored,
    load_values,
    locate,
    optional_weights,
    storage,
    store_output,
    store_values,
    tile_columns,
)
from mempool.kernels.gpu.sorting import sort_pairs


@triton.jit
def _within(offset, num_pairs):
    """An offset that is a place among the pairs, whatever was given: on a GPU nobody has looked before."""
    return tl.minimum(tl.maximum(offset, 0), num_pairs)


@triton.jit
def _fetch(ids, weights, page_table, num_pages, page_shift, pair, end, WEIGHTED: tl.constexpr, UNROLL: tl.constexpr):
    """Arena rows of the next pairs of each bag, -1 where there is none or it is not here, and the pairs' weights."""
    rows = ()
    pair_weights = ()
    for step in tl.static_range(UNROLL):
        exists = pair + step < end
        slot = tl.load(ids + pair + step, mask=exists, other=0)
        row, here = locate(slot, page_table, num_pages, page_shift, exists)
        rows = rows + (tl.where(here, row, -1),)
        if WEIGHTED:
            # A weight that is inf or NaN must not meet the zero of a row that is not here.
            weight = tl.load(weights + pair + step, mask=exists, other=1.0)
            pair_weights = pair_weights + (tl.where(here, weight, 1.0),)
    return rows, pair_weights


@triton.jit(do_not_specialize=["num_bags", "num_pairs", "num_pages", "page_shift"])
def weighted_sum_kernel(
    rows,
    scales,
    page_table,
    ids,
    weights,
    offsets,
    out,
    num_bags,
    num_pairs,
    num_pages,
    page_shift,
    WEIGHTED: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program some bags and a tile of columns. UNROLL rows of each bag are read at once, then added one by one.

    While they are on their way, the ids and pages of the next ones are read. What is not here is read as -0.0, which
    changes no sum. Products are added with one rounding, as on the CPU.
    """
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns, mask, block = tile_columns(tl.program_id(1), WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
    first = _within(tl.load(offsets + bag, mask=bag < num_bags, other=0), num_pairs)
    end = _within(tl.load(offsets + bag + 1, mask=bag < num_bags, other=0), num_pairs)
    acc = tl.zeros([ROWS, BLOCKS, BLOCK], dtype=tl.float32)
    ahead, ahead_weights = _fetch(ids, weights, page_table, num_pages, page_shift, first, end, WEIGHTED, UNROLL)
    for place in range(0, tl.max(end - first, axis=0), UNROLL):
        parts = ()
        factors = ()
        for step in tl.static_range(UNROLL):
            row = ahead[step]
            here = row >= 0
            parts = parts + (load_stored(rows + row[:, None, None] * STRIDE + columns, mask & here[:, None, None]),)
            if SCALES > 0:
                scale_mask = here[:, None] & (block * BLOCK_DIM < WIDTH)
                scale = tl.load(
                    scales + row[:, None] * (STRIDE // 4) + SCALES // 4 + block, mask=scale_mask, other=-0.0
                )
                if WEIGHTED:
                    scale = ahead_weights[step][:, None] * scale
                factors = factors + (scale[:, :, None],)
            elif WEIGHTED:
                factors = factors + (ahead_weights[step][:, None, None],)
        following = first + place + UNROLL
        ahead, ahead_weights = _fetch(ids, weights, page_table, num_pages, page_shift, following, end, WEIGHTED, UNROLL)
        for step in tl.static_range(UNROLL):
            if WEIGHTED or SCALES > 0:
                acc = tl.fma(factors[step], decode(parts[step]), acc)
            else:
                acc = acc + decode(parts[step])
    place_out = out + bag[:, None, None] * WIDTH + columns
    store_output(place_out, acc, mask & (bag < num_bags)[:, None, None])


def weighted_sum(
    paged: Paged,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """See mempool.kernels.weighted_sum."""
    num_bags = offsets.numel() - 1
    out = torch.empty(num_bags, paged.width, dtype=dtype, device=ids.device) if out is None else out
    if num_bags:
        tile, unroll = tuning.sum_tile(paged)
        with torch.cuda.device_of(out):
            weighted_sum_kernel[tile.grid(num_bags)](
                *arena(paged),
                paged.page_table,
                contiguous(ids),
                optional_weights(weights, out),
                contiguous(offsets),
                storage(out),
                num_bags,
                ids.numel(),
                paged.page_table.numel(),
                paged.page_shift,
                WEIGHTED=weights is not None,
                UNROLL=unroll,
                **tile.options,
                **STRICT,
            )
    return out


@triton.jit(do_not_specialize=["num_rows", "num_pages", "page_shift"])
def gather_rows_kernel(
    rows,
    scales,
    page_table,
    ids,
    out,
    num_rows,
    num_pages,
    page_shift,
    AS_STORED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program some positions and a tile of columns. AS_STORED moves stored bits, whatever they are."""
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns, mask, block = tile_columns(tl.program_id(1), WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
    exists = position < num_rows
    slot = tl.load(ids + position, mask=exists, other=0)
    row, here = locate(slot, page_table, num_pages, page_shift, exists)
    place = out + position[:, None, None] * WIDTH + columns
    row_mask = mask & here[:, None, None]
    out_mask = mask & exists[:, None, None]
    if AS_STORED:
        tl.store(place, tl.load(rows + row[:, None, None] * STRIDE + columns, mask=row_mask, other=0), mask=out_mask)
    else:
        block_mask = here[:, None] & (block * BLOCK_DIM < WIDTH)
        values = load_values(rows, scales, row, columns, row_mask, block, block_mask, STRIDE, SCALES)
        store_output(place, tl.where(here[:, None, None], values, 0.0), out_mask)


def gather_rows(paged: Paged, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """See mempool.kernels.gather_rows."""
    out = torch.empty(ids.numel(), paged.width, dtype=dtype, device=ids.device)
    if ids.numel():
        tile = tuning.gather_tile(paged)
        with torch.cuda.device_of(out):
            gather_rows_kernel[tile.grid(ids.numel())](
                *arena(paged),
                paged.page_table,
                contiguous(ids),
                storage(out),
                ids.numel(),
                paged.page_table.numel(),
                paged.page_shift,
                AS_STORED=paged.packed is None and dtype == paged.rows.dtype,
                maxnreg=64,  # else the assembler spills registers to have 32 of them
                **tile.options,
                **STRICT,
            )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def scatter_rows_kernel(
    rows,
    scales,
    targets,
    order,
    starts,
    values,
    num_rows,
    AS_STORED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program some distinct rows and a tile of columns; the last of a row's positions is the one that counts."""
    run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns, mask, block = tile_columns(tl.program_id(1), WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
    exists = run < num_rows
    position = tl.load(order + tl.load(starts + run + 1, mask=exists, other=1) - 1, mask=exists, other=0)
    row = tl.load(targets + run, mask=exists, other=0)
    mask = mask & exists[:, None, None]
    block_mask = exists[:, None] & (block * BLOCK_DIM < WIDTH)
    given = tl.load(values + position[:, None, None] * WIDTH + columns, mask=mask, other=0)
    if AS_STORED:
        tl.store(rows + row[:, None, None] * STRIDE + columns, given, mask=mask)
    else:
        store_values(rows, scales, row, columns, mask, block, block_mask, given, given, STRIDE, SCALES, False)
        if tl.program_id(1) == 0:
            clear_padding(rows, row, exists, WIDTH, BLOCK_DIM, STRIDE, SCALES)


def scatter_rows(paged: Paged, ids: Tensor, values: Tensor) -> None:
    """See mempool.kernels.scatter_rows."""
    pairs = sort_pairs(paged, ids)
    num_rows = pairs.rows.numel()
    if num_rows:
        tile = tuning.step_tile(paged, None if paged.packed is None else paged.packed.block_dim)
        with torch.cuda.device_of(ids):
            scatter_rows_kernel[tile.grid(num_rows)](
                *arena(paged),
                pairs.rows,
                pairs.order,
                pairs.starts,
                storage(contiguous(values)),
                num_rows,
                AS_STORED=paged.packed is None,
                **tile.options,
                **STRICT,
            )


@triton.jit(do_not_specialize=["num_pairs", "num_pages", "page_shift"])
def weight_gradient_kernel(
    rows,
    scales,
    page_table,
    ids,
    offsets,
    grads,
    out,
    num_pairs,
    num_pages,
    page_shift,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One warp a bag, or a share of it: the products of its gradient with ROWS values at once."""
    bag = tl.program_id(0).to(tl.int64)
    first = _within(tl.load(offsets + bag), num_pairs) + tl.program_id(1) * ROWS
    end = _within(tl.load(offsets + bag + 1), num_pairs)
    NUM_TILES: tl.constexpr = (WIDTH + BLOCKS * BLOCK_DIM - 1) // (BLOCKS * BLOCK_DIM)
    if NUM_TILES == 1:
        columns, mask, block = tile_columns(0, WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
        grad = tl.load(grads + bag * WIDTH + columns, mask=mask, other=0.0)
    for start in range(first, end, tl.num_programs(1) * ROWS):
        pair = start + tl.arange(0, ROWS)
        exists = pair < end
        slot = tl.load(ids + pair, mask=exists, other=0)
        row, here = locate(slot, page_table, num_pages, page_shift, exists)
        total = tl.zeros([ROWS, BLOCKS, BLOCK], dtype=tl.float32)
        for tile in range(NUM_TILES):
            if NUM_TILES > 1:
                columns, mask, block = tile_columns(tile, WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
                grad = tl.load(grads + bag * WIDTH + columns, mask=mask, other=0.0)
            block_mask = here[:, None] & (block * BLOCK_DIM < WIDTH)
            row_mask = mask & here[:, None, None]
            total += grad * load_values(rows, scales, row, columns, row_mask, block, block_mask, STRIDE, SCALES)
        product = tl.sum(tl.sum(total, axis=2), axis=1)
        # Chosen after the product: where not here, 0 times an infinite gradient is NaN.
        tl.store(out + pair, tl.where(here, product, 0.0), mask=exists)


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor, out: Tensor | None = None) -> Tensor:
    """See mempool.kernels.weight_gradient."""
    num_bags, num_pairs = offsets.numel() - 1, ids.numel()
    out = torch.empty(num_pairs, dtype=torch.float32, device=ids.device) if out is None else out
    if num_bags and num_pairs:
        tile = tuning.gradient_tile(paged)
        with torch.cuda.device_of(out):
            weight_gradient_kernel[(num_bags, tuning.gradient_split(num_pairs, num_bags))](
                *arena(paged),
                paged.page_table,
                contiguous(ids),
                contiguous(offsets),
                contiguous(grads),
                out,
                num_pairs,
                paged.page_table.numel(),
                paged.page_shift,
                **tile.options,
            )
    return out
