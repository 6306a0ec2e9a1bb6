"""Rows as float32 and back in torch's own operations, whatever they are stored as."""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.layout import PackedLayout
from mempool.kernels.reference.elements import decode
from mempool.kernels.reference.elements import write_values as write_rows

__all__ = ["codes_and_scales", "read_rows", "write_rows"]


def codes_and_scales(layout: PackedLayout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Elements of packed rows [U, row_bytes] and the scale of each, both [U, W] float32."""
    scales = rows[:, layout.scales_start : layout.scales_start + 4 * layout.num_blocks].contiguous()
    per_column = scales.view(torch.float32).repeat_interleave(layout.block_dim, dim=1)[:, : layout.width]
    return decode(layout.element, rows[:, : layout.width]), per_column


def read_rows(paged: Paged, rows: Tensor) -> Tensor:
    """Values of arena rows [U], [U, W] float32."""
    if paged.packed is None:
        return paged.rows[rows].float()
    codes, scales = codes_and_scales(paged.packed, paged.rows[rows])
    return scales * codes
