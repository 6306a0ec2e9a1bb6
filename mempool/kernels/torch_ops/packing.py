"""Rows of float32 as rows of a byte each with a scale per block, and back: sums and gradients on their way.

By ``PackedLayout``, to nearest even, in torch's own operations on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.layout import LARGEST, PackedLayout

_LEAST_SCALE = 2.0**-126
"""Of smaller ones float32 has fewer digits, and of the smallest none."""


def pack_rows(layout: PackedLayout, values: Tensor) -> Tensor:
    """Rows [B, row_bytes] uint8 of values [B, W] float32, with ``layout.element`` float8_e4m3fn.

    A number is off by at most 1/16 of itself, or 2^-10 of its block's scale if that is more: 1/458,752 of the largest
    magnitude of its block. A block with an inf or NaN is NaN as a whole.
    """
    num_bags, blocks, width = values.shape[0], layout.num_blocks, layout.block_dim
    rows = torch.zeros(num_bags, layout.row_bytes, dtype=torch.uint8, device=values.device)
    if blocks * width == layout.width:
        whole = values.reshape(num_bags, blocks, width)
    else:  # the last block is narrower; zeros change no largest magnitude
        whole = torch.nn.functional.pad(values, (0, blocks * width - layout.width)).view(num_bags, blocks, width)
    largest = whole.abs().amax(dim=2)
    scales = largest.div_(LARGEST[layout.element]).clamp_(min=_LEAST_SCALE)
    scales[~scales.isfinite()] = torch.nan
    # Divided and rounded, the largest may be just beyond the largest element, and torch would make it NaN.
    ratios = torch.div(whole, scales[:, :, None]).clamp_(-LARGEST[layout.element], LARGEST[layout.element])
    codes = ratios.nan_to_num_(nan=0.0).to(torch.float8_e4m3fn).view(torch.uint8)
    rows[:, : layout.width] = codes.view(num_bags, blocks * width)[:, : layout.width]
    scale_bytes = scales.view(torch.uint8)
    rows[:, layout.scales_start : layout.scales_start + 4 * blocks] = scale_bytes
    return rows


def unpack_rows(layout: PackedLayout, rows: Tensor) -> Tensor:
    """Values [B, W] float32 of rows [B, row_bytes] uint8. Whatever bytes they are, that is what they stand for."""
    values = rows[:, : layout.width].contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    scales = rows[:, layout.scales_start : layout.scales_start + 4 * layout.num_blocks].contiguous()
    for block, scale in enumerate(scales.view(torch.float32).unbind(dim=1)):
        values[:, block * layout.block_dim : (block + 1) * layout.block_dim].mul_(scale[:, None])
    return values


def pick_blocks(layout: PackedLayout, rows: Tensor, picked: PackedLayout, blocks: tuple[int, ...]) -> Tensor:
    """Of packed rows [B, row_bytes] those blocks alone, as ``picked`` has them; to the bit what packing these gives."""
    if picked.width == layout.width:
        return rows
    out = torch.zeros(rows.shape[0], picked.row_bytes, dtype=torch.uint8, device=rows.device)
    end = 0
    for number, block in enumerate(blocks):
        start = block * layout.block_dim
        begin, end = end, end + min(layout.block_dim, layout.width - start)
        out[:, begin:end] = rows[:, start : start + end - begin]
        into, out_of = picked.scales_start + 4 * number, layout.scales_start + 4 * block
        out[:, into : into + 4] = rows[:, out_of : out_of + 4]
    return out
