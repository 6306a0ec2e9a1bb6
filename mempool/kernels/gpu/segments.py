"""Gradients summed per row on the GPU, in the order of mempool.kernels.segment_sum. No atomics.

A program sums the pairs of a few rows. Of a long run all pieces of RUN_PIECE pairs are summed before, each by a program
of its own, into scratch memory; the row's program adds those up and goes on with what is left, at most LONG_RUN
pairs. Since such pieces are longer than LONG_RUN, a piece that starts at a place has the row ``place // LONG_RUN`` of
the scratch for itself, and nothing needs to be counted or listed before.
"""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, index"
# ruff: noqa: RUF005, SIM108 - what Triton does not read as Python does

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels.arguments import LONG_RUN, RUN_PIECE, SortedPairs
from mempool.kernels.gpu import tuning
from mempool.kernels.gpu.elements import STRICT, contiguous, optional_weights, tile_columns

_PIECE = tl.constexpr(RUN_PIECE)
_LONG = tl.constexpr(LONG_RUN)
_SEARCH_WAYS = tl.constexpr(128)


@triton.jit
def _sum_pairs(
    order, weights, bags, grads, first, end, columns, mask, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr,
    UNROLL: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Sum from zero of the pairs ``order[first:end]`` of each row [rows]; UNROLL are read at once, added one by one."""
    acc = tl.zeros(SHAPE, dtype=tl.float32)
    for place in range(0, tl.max(end - first, axis=0), UNROLL):
        pairs = ()
        for step in tl.static_range(UNROLL):
            position = first + place + step
            pairs = pairs + (tl.load(order + position, mask=position < end, other=0),)
        parts = ()
        factors = ()
        for step in tl.static_range(UNROLL):
            exists = first + place + step < end
            bag = tl.load(bags + pairs[step], mask=exists, other=0)
            if WEIGHTED:
                factors = factors + (tl.load(weights + pairs[step], mask=exists, other=1.0)[:, None, None],)
            part_mask = mask & exists[:, None, None]
            parts = parts + (tl.load(grads + bag[:, None, None] * WIDTH + columns, mask=part_mask, other=-0.0),)
        for step in tl.static_range(UNROLL):
            if WEIGHTED:
                acc = acc + factors[step] * parts[step]
            else:
                acc = acc + parts[step]
    return acc


@triton.jit
def _run_of(starts, num_rows, place):
    """The run that a place lies in: the last one that starts there or before."""
    low = place * 0
    span = low + num_rows
    while span > 1:
        step = (span + _SEARCH_WAYS - 1) // _SEARCH_WAYS
        ahead = tl.arange(0, _SEARCH_WAYS) * step
        start = tl.load(starts + low + ahead, mask=ahead < span, other=0)
        before = tl.sum(((ahead < span) & (start <= place)).to(tl.int64), axis=0) - 1
        low += before * step
        span = tl.minimum(step, span - before * step)
    return low


@triton.jit(do_not_specialize=["num_rows"])
def sum_pieces_kernel(
    order,
    starts,
    weights,
    bags,
    grads,
    scratch,
    num_rows,
    WEIGHTED: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program LONG_RUN places and a tile of columns: the sum of the long run's piece that starts there, if any."""
    window = tl.program_id(0).to(tl.int64)
    last = tl.minimum((window + 1) * _LONG, tl.load(starts + num_rows)) - 1
    run = _run_of(starts, num_rows, last)
    start = tl.load(starts + run)
    run_end = tl.load(starts + run + 1)
    first = last - (last - start) % _PIECE
    end = tl.minimum(first + _PIECE, run_end)
    if (first >= window * _LONG) & (end - first > _LONG):
        columns, mask, _ = tile_columns(tl.program_id(1), WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
        one = tl.zeros([1], dtype=tl.int64)
        shape: tl.constexpr = (1, BLOCKS, BLOCK)
        total = _sum_pairs(
            order, weights, bags, grads, first + one, end + one, columns, mask, WEIGHTED, WIDTH, UNROLL, shape
        )
        tl.store(scratch + window * WIDTH + columns, total, mask=mask)


@triton.jit
def row_sums(
    order, starts, weights, bags, grads, scratch, run, exists, total, columns, mask, WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr, UNROLL: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """``total`` and then the pieces of each run, one after another; -0.0 as the total changes none."""
    start = tl.load(starts + run, mask=exists, other=0)
    end = tl.load(starts + run + 1, mask=exists, other=0)
    length = end - start
    num_pieces = length // _PIECE + (length % _PIECE > _LONG).to(tl.int64)
    first = tl.minimum(start + num_pieces * _PIECE, end)
    rest = _sum_pairs(order, weights, bags, grads, first, end, columns, mask, WEIGHTED, WIDTH, UNROLL, SHAPE)
    for piece in range(0, tl.max(num_pieces, axis=0)):
        window = (start + piece * _PIECE) // _LONG
        piece_mask = mask & (piece < num_pieces)[:, None, None]
        total = total + tl.load(scratch + window[:, None, None] * WIDTH + columns, mask=piece_mask, other=-0.0)
    return total + tl.where((first < end)[:, None, None], rest, -0.0)


@triton.jit(do_not_specialize=["num_rows"])
def segment_sum_kernel(
    order,
    starts,
    weights,
    bags,
    grads,
    scratch,
    places,
    out,
    num_rows,
    ADDING: tl.constexpr,
    WEIGHTED: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program some distinct rows and a tile of columns. ADDING to what is in out at the rows' places."""
    run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = run < num_rows
    columns, mask, _ = tile_columns(tl.program_id(1), WIDTH, BLOCK_DIM, BLOCKS, BLOCK)
    shape: tl.constexpr = (ROWS, BLOCKS, BLOCK)
    total = tl.full(shape, -0.0, tl.float32)
    row_mask = mask & exists[:, None, None]
    if ADDING:
        place = tl.load(places + run, mask=exists, other=0)
        total = tl.load(out + place[:, None, None] * WIDTH + columns, mask=row_mask, other=-0.0)
    else:
        place = run
    total = row_sums(
        order, starts, weights, bags, grads, scratch, run, exists, total, columns, mask, WEIGHTED, WIDTH, UNROLL, shape
    )
    tl.store(out + place[:, None, None] * WIDTH + columns, total, mask=row_mask)


def sum_pieces(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """The sums of long runs' pieces, for ``row_sums``.

    Args:
        pairs: As in mempool.kernels.segment_sum, and so the others; all contiguous.

    Returns:
        [L' / LONG_RUN, W] float32, of which only rows of pieces are written.
    """
    num_pairs, width = pairs.order.numel(), grads.shape[1]
    num_windows = triton.cdiv(num_pairs, LONG_RUN) if num_pairs > LONG_RUN else 0
    scratch = torch.empty(num_windows, width, dtype=torch.float32, device=grads.device)
    if num_windows:
        tile = tuning.piece_tile(width)
        with torch.cuda.device_of(grads):
            sum_pieces_kernel[(num_windows, tile.num_tiles)](
                pairs.order,
                pairs.starts,
                optional_weights(weights, grads),
                bags,
                grads,
                scratch,
                pairs.rows.numel(),
                WEIGHTED=weights is not None,
                UNROLL=tuning.PIECE_UNROLL,
                num_warps=tile.warps,
                num_stages=1,
                **tile.columns,
                **STRICT,
            )
    return scratch


def add_runs(
    out: Tensor, places: Tensor | None, pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> None:
    """Write the sums of runs to the rows of ``out``, or add them to the rows at ``places``."""
    num_rows, width = pairs.rows.numel(), grads.shape[1]
    if not num_rows:
        return
    bags, grads = contiguous(bags), contiguous(grads)
    scratch = sum_pieces(pairs, weights, bags, grads)
    tile = tuning.segment_tile(width)
    with torch.cuda.device_of(out):
        segment_sum_kernel[tile.grid(num_rows)](
            pairs.order,
            pairs.starts,
            optional_weights(weights, grads),
            bags,
            grads,
            scratch,
            pairs.starts if places is None else contiguous(places),
            out,
            num_rows,
            ADDING=places is not None,
            WEIGHTED=weights is not None,
            UNROLL=tuning.STEP_UNROLL,
            ROWS=tile.rows,
            num_warps=tile.warps,
            num_stages=1,
            **tile.columns,
            **STRICT,
        )


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.segment_sum."""
    out = torch.empty(pairs.rows.numel(), grads.shape[1], dtype=torch.float32, device=grads.device)
    add_runs(out, None, pairs, weights, bags, grads)
    return out


def add_segments(
    sums: Tensor, places: Tensor, pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> None:
    """See mempool.kernels.add_segments."""
    add_runs(sums, places, pairs, weights, bags, grads)
