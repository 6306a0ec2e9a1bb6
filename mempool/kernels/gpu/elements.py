"""The innermost steps that Triton kernels share: slot to arena row, tiles of columns, stored elements and back.

Tiles have three axes, [rows, blocks, columns of a block], so that what belongs to a column block (scales, row-wise
state) has one axis less; where nothing does, a tile has one block. How elements are stored is told by the pointer:
float32; int16, bfloat16's bits; int8; uint8, float8_e4m3fn's bits. What is rounded, how, and by which random bits is
defined to the bit by ``mempool.kernels.reference``. Address arithmetic is int64 throughout.
"""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: RET505, SIM108 - of constant conditions only the branch that holds is compiled

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.layout import LARGEST

#: Launch options of every kernel whose bits are promised.
STRICT: dict[str, Any] = {"enable_fp_fusion": False}

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)
_LARGEST_INT8 = tl.constexpr(LARGEST["int8"])
_LARGEST_FLOAT8 = tl.constexpr(LARGEST["float8_e4m3fn"])
# Added to and taken from a float32 below 2**22, this rounds it to a whole number, ties to even.
_TO_WHOLE = tl.constexpr(1.5 * 2**23)


@triton.jit
def locate(slot, page_table, num_pages, page_shift, mask):
    """Arena row of slots, and whether they are here. Never reads outside the page table."""
    page = slot >> page_shift
    inside = mask & (page >= 0) & (page < num_pages)
    arena_page = tl.load(page_table + page, mask=inside, other=-1).to(tl.int64)
    here = arena_page >= 0
    return (arena_page << page_shift) + (slot - (page << page_shift)), here


@triton.jit
def tile_columns(tile, WIDTH: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [1, BLOCKS, BLOCK] of a tile, which of them exist, and the tile's block numbers [1, BLOCKS].

    A mask that is known to hold for every tile is a constant, and gone from what is compiled.
    """
    block = tile * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    lane = tl.arange(0, BLOCK)[None, None, :]
    columns = block[:, :, None] * BLOCK_DIM + lane
    mask = tl.full([1, BLOCKS, BLOCK], True, tl.int1)
    if WIDTH % (BLOCKS * BLOCK_DIM) != 0:
        mask = mask & (columns < WIDTH)
    if BLOCK != BLOCK_DIM:
        mask = mask & (lane < BLOCK_DIM)
    return columns, mask, block


@triton.jit
def load_stored(pointers, mask):
    """Stored elements; where masked -0.0, which changes no sum it is added to, or the code 0."""
    if pointers.dtype.element_ty == tl.float32:
        return tl.load(pointers, mask=mask, other=-0.0)
    elif pointers.dtype.element_ty == tl.int16:
        return tl.load(pointers, mask=mask, other=-32768)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def decode(stored):
    """Stored elements as float32; packed ones are yet to be multiplied with their block's scale."""
    if stored.dtype == tl.int16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif stored.dtype == tl.int8:
        # Built into the mantissa of a float of the size of 2**23: converting integers is four times slower on a GPU.
        biased = (stored.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int32) | 0x4B000000
        return biased.to(tl.float32, bitcast=True) - 8388736.0
    elif stored.dtype == tl.uint8:
        return stored.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return stored


@triton.jit
def tree_sum(value):
    """Sum over the last of three axes, neighbours first: in this order for every layout, and zeros behind change none.

    A block's sum thus has the same bits in every tile.
    """
    for _ in tl.static_range(20):
        if value.shape[2] > 1:
            left, right = tl.split(tl.reshape(value, [value.shape[0], value.shape[1], value.shape[2] // 2, 2]))
            value = left + right
    return tl.reshape(value, [value.shape[0], value.shape[1]])


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 30)) * _MIX1
    bits = (bits ^ (bits >> 27)) * _MIX2
    return bits ^ (bits >> 31)


@triton.jit
def random_bits(key, slots, columns):
    """32 random bits, uint32, of slots [rows, 1, 1] int64 and table columns [1, blocks, columns] int64."""
    row = _mix((key + slots * tl.full([], _GAMMA, tl.uint64).to(tl.int64, bitcast=True)).to(tl.uint64, bitcast=True))
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    bits = low + columns.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32)
    bits = (bits ^ (bits >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
    bits = (bits ^ (bits >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
    return bits ^ (bits >> 16) ^ high


@triton.jit
def to_bfloat16(value, random, RANDOMLY: tl.constexpr):
    """bfloat16's bits of float32, in int16: to nearest, ties to even, or by the upper 16 random bits."""
    bits = value.to(tl.uint32, bitcast=True)
    if RANDOMLY:
        finite = (bits & 0x7F800000) != 0x7F800000
        rounded = tl.where(finite, bits + (random >> 16), bits) >> 16
    else:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _encode(ratio, random, element: tl.constexpr, RANDOMLY: tl.constexpr):
    """Codes of values divided by their block's scale."""
    if RANDOMLY:
        fraction = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    if element == tl.int8:
        if RANDOMLY:
            whole = tl.floor(ratio + fraction)
        else:
            whole = (ratio + _TO_WHOLE) - _TO_WHOLE
        return tl.minimum(tl.maximum(whole, -_LARGEST_INT8), _LARGEST_INT8).to(tl.int32).to(tl.int8)
    else:
        bits = ratio.to(tl.uint32, bitcast=True)
        magnitude = tl.abs(ratio)
        positive = bits & 0x7FFFFFFF
        if RANDOMLY:
            normal = (positive + (random >> 12)) >> 20
            even = tl.floor(magnitude * 512.0 + fraction)
        else:
            normal = (positive + 0x7FFFF + ((positive >> 20) & 1)) >> 20
            even = (magnitude * 512.0 + _TO_WHOLE) - _TO_WHOLE
        # float32's exponent bias is 127, that of e4m3 is 7; 0x7E is 448, 0x7F would be NaN.
        code = tl.where(magnitude < 0.015625, even.to(tl.int32), normal.to(tl.int32) - 960)
        return (tl.minimum(code, 0x7E) | ((bits >> 31) << 7).to(tl.int32)).to(tl.uint8)


@triton.jit
def store_values(
    rows,
    scales,
    row,
    columns,
    mask,
    block,
    block_mask,
    values,
    random,
    STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
    RANDOMLY: tl.constexpr,
):
    """Round float32 values [rows, blocks, columns] to the stored element and write them, scales with them.

    Args: the arena and the same memory as float32; arena rows [rows]; as of tile_columns, the mask with rows in it;
    which blocks exist [rows, blocks]; the values; random bits of their shape, not read unless RANDOMLY; elements from
    row to row, and those before the scales, 0 without.
    """
    places = rows + row[:, None, None] * STRIDE + columns
    element: tl.constexpr = rows.dtype.element_ty
    if element == tl.float32:
        tl.store(places, values, mask=mask)
    elif element == tl.int16:
        tl.store(places, to_bfloat16(values, random, RANDOMLY), mask=mask)
    else:
        largest_code: tl.constexpr = _LARGEST_INT8 if element == tl.int8 else _LARGEST_FLOAT8
        # The bits of magnitudes rise with them, and those of what is not finite stand above all others.
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(tl.where(mask, bits, 0), axis=2)
        magnitude = largest.to(tl.float32, bitcast=True)
        scale = tl.div_rn(magnitude, tl.full(magnitude.shape, largest_code, tl.float32))
        scale = tl.where(largest < 0x7F800000, scale, float("nan"))
        tl.store(scales + row[:, None] * (STRIDE // 4) + SCALES // 4 + block, scale, mask=block_mask)
        divisor = tl.broadcast_to(scale[:, :, None], values.shape)
        usable = divisor > 0.0
        codes = _encode(tl.div_rn(values, tl.where(usable, divisor, 1.0)), random, element, RANDOMLY)
        tl.store(places, tl.where(usable, codes, 0), mask=mask)


@triton.jit
def _clear(rows, row, exists, FIRST: tl.constexpr, END: tl.constexpr, STRIDE: tl.constexpr):
    """Zeros in bytes FIRST to END, at most 16, of packed arena rows [rows]."""
    if FIRST < END:
        byte = FIRST + tl.arange(0, 16)[None, :]
        nothing = tl.zeros([row.shape[0], 16], tl.int8).to(rows.dtype.element_ty)
        tl.store(rows + row[:, None] * STRIDE + byte, nothing, mask=exists[:, None] & (byte < END))


@triton.jit
def clear_padding(
    rows, row, exists, WIDTH: tl.constexpr, BLOCK_DIM: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr
):
    """Zeros in the bytes of packed arena rows [rows] that hold neither elements nor scales."""
    _clear(rows, row, exists, WIDTH, SCALES, STRIDE)
    _clear(rows, row, exists, SCALES + 4 * ((WIDTH + BLOCK_DIM - 1) // BLOCK_DIM), STRIDE, STRIDE)


@triton.jit
def load_values(rows, scales, row, columns, mask, block, block_mask, STRIDE: tl.constexpr, SCALES: tl.constexpr):
    """Values of arena rows in float32, masked ones -0.0 or 0; arguments as of store_values."""
    values = decode(load_stored(rows + row[:, None, None] * STRIDE + columns, mask))
    if SCALES > 0:
        scale = tl.load(scales + row[:, None] * (STRIDE // 4) + SCALES // 4 + block, mask=block_mask, other=0.0)
        values = scale[:, :, None] * values
    return values


@triton.jit
def store_output(pointers, value, mask):
    """Write float32 as float32, float16, or (through int16) bfloat16, rounded to nearest, ties to even."""
    if pointers.dtype.element_ty == tl.int16:
        tl.store(pointers, to_bfloat16(value, value, False), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


def storage(tensor: Tensor) -> Tensor:
    """A tensor as kernels take it, bfloat16 as int16. Shares memory."""
    detached = tensor.detach()
    return detached.view(torch.int16) if tensor.dtype == torch.bfloat16 else detached


def arena(paged: Paged) -> tuple[Tensor, Tensor]:
    """An arena as kernels take it, and as float32 for its scales (any tensor without those). Shares memory."""
    if paged.packed is None:
        rows = storage(paged.rows)
        return rows, rows
    rows = paged.rows.detach()
    return (rows.view(torch.int8) if paged.packed.element == "int8" else rows), rows.view(torch.float32)


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor without autograd, contiguous."""
    return tensor.detach().contiguous()


def optional_weights(weights: Tensor | None, beside: Tensor) -> Tensor:
    """Weights, or some tensor in their place where none are given (kernels are told by a flag and do not read it)."""
    return beside if weights is None else contiguous(weights)
