"""Stored elements, defined to the bit: reading them, rounding to them, and the random bits of stochastic rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.layout import LARGEST, PackedElement, PackedLayout
from mempool.kernels.reference.initial import GAMMA, mix, shift_right, signed

_MASK32 = 0xFFFFFFFF


def random_bits(key: int, slots: Tensor, columns: Tensor) -> Tensor:
    """32 random bits for each slot and table column: a function of (key, slot, column) alone.

    A row starts from 64 bits, splitmix64's finaliser of key and slot; an element mixes the lower half of them with its
    column by murmur3's finaliser and adds the upper half without carry.

    Args:
        key: ``RandomRounding.key``.
        slots: [U] int64.
        columns: [W] int64, the table's columns.

    Returns:
        [U, W] int64, 0 to 2^32 - 1.
    """
    row = mix(signed(key) + slots * signed(GAMMA))
    bits = ((row & _MASK32)[:, None] + columns * 0x9E3779B9) & _MASK32
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK32
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _MASK32
    return bits ^ (bits >> 16) ^ shift_right(row, 32)[:, None]


def to_bfloat16(values: Tensor, random: Tensor | None) -> Tensor:
    """float32 to bfloat16: to nearest, ties to even, or up with the probability of what is cut off.

    Args:
        values: float32.
        random: int64 of the same shape, 32 random bits each, of which the upper 16 are used; None for nearest.
    """
    if random is None:
        return values.to(torch.bfloat16)
    bits = values.contiguous().view(torch.int32).to(torch.int64) & _MASK32
    rounded = (bits + (random >> 16)) >> 16
    rounded = torch.where(values.isfinite(), rounded, bits >> 16)
    rounded = torch.where(values.isnan(), 0x7FC0, rounded)
    return ((rounded ^ 0x8000) - 0x8000).to(torch.int16).view(torch.bfloat16)


def encode(element: PackedElement, ratios: Tensor, random: Tensor | None) -> Tensor:
    """Values divided by their block's scale, as codes in uint8.

    int8: ``floor(ratio + u)``, within -127..127, where u is the upper 24 bits as a fraction; to nearest even for None.
    float8_e4m3fn: the magnitude's float32 bits with the upper 20 random bits added, cut to 3 mantissa bits; below 2^-6,
    where the grid is even, ``floor(magnitude * 512 + u)``; at most 448. To nearest even for None.

    Args:
        element: What a byte holds.
        ratios: float32, finite.
        random: As in to_bfloat16.
    """
    fraction = None if random is None else (random >> 8).float() * 2.0**-24
    if element == "int8":
        codes = ratios.round() if fraction is None else (ratios + fraction).floor()
        return codes.clamp(-127.0, 127.0).to(torch.int8).view(torch.uint8)
    magnitude = ratios.abs().contiguous()
    bits = magnitude.view(torch.int32).to(torch.int64)
    if random is None or fraction is None:
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        small = (magnitude * 512.0).round().to(torch.int64)
    else:
        normal = (bits + (random >> 12)) >> 20
        small = (magnitude * 512.0 + fraction).floor().to(torch.int64)
    # float32's exponent bias is 127, that of e4m3 is 7; 0x7E is 448, 0x7F would be NaN.
    codes = torch.where(magnitude < 2.0**-6, small, normal - ((127 - 7) << 3)).clamp(max=0x7E)
    negative = torch.signbit(ratios).to(torch.int64) << 7
    return (codes | negative).to(torch.uint8)


def decode(element: PackedElement, codes: Tensor) -> Tensor:
    """Codes in uint8 as float32."""
    stored = torch.int8 if element == "int8" else torch.float8_e4m3fn
    return codes.contiguous().view(stored).float()


def read_values(paged: Paged) -> Tensor:
    """[R, W] float64: all rows of the arena."""
    if paged.packed is None:
        return paged.rows.double().cpu()
    layout, rows = paged.packed, paged.rows.cpu()
    scales = rows[:, layout.scales_start : layout.scales_start + 4 * layout.num_blocks].contiguous()
    per_column = scales.view(torch.float32).repeat_interleave(layout.block_dim, dim=1)[:, : layout.width]
    return per_column.double() * decode(layout.element, rows[:, : layout.width]).double()


def write_values(paged: Paged, rows: Tensor, values: Tensor, random: Tensor | None = None) -> None:
    """Round float32 ``values`` [U, W] to the stored element and write them to arena rows [U], scales with them.

    A block's scale is the largest magnitude divided by the element's largest number, both steps in float32.
    """
    if paged.rows.dtype == torch.float32:
        paged.rows[rows] = values
    elif paged.packed is None:
        paged.rows[rows] = to_bfloat16(values, random)
    else:
        paged.rows[rows] = _packed_rows(paged.packed, values, random)


def _packed_rows(layout: PackedLayout, values: Tensor, random: Tensor | None) -> Tensor:
    rows = torch.zeros(values.shape[0], layout.row_bytes, dtype=torch.uint8, device=values.device)
    scales = torch.empty(values.shape[0], layout.num_blocks, device=values.device)
    for block in range(layout.num_blocks):
        columns = slice(block * layout.block_dim, min((block + 1) * layout.block_dim, layout.width))
        part = values[:, columns]
        scale = part.abs().amax(dim=1) / LARGEST[layout.element]
        scale[~part.isfinite().all(dim=1)] = torch.nan
        usable = (scale > 0)[:, None]
        ratios = torch.where(usable, part / scale[:, None], 0.0)
        rows[:, columns] = encode(layout.element, ratios, None if random is None else random[:, columns])
        rows[:, columns] *= usable
        scales[:, block] = scale
    scales_bytes = scales.view(torch.uint8)
    rows[:, layout.scales_start : layout.scales_start + scales_bytes.shape[1]] = scales_bytes
    return rows
