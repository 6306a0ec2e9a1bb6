"""The innermost steps that Triton kernels share, and what their launches share. Kernels see bfloat16 as its bits.

Address arithmetic is int64 throughout. Kernels are launched without fused multiply-add, so that sums made in the order
of the pairs have the bits of the CPU's.
"""
# Triton reads kernels as its own language: they carry no Python types, host functions do.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch options of every kernel whose bits are promised.
STRICT: dict[str, Any] = {"enable_fp_fusion": False}
_LARGEST_TILE = 512


@triton.jit
def locate(slot, page_table, num_pages, page_shift, mask):
    """Arena row of slots, and whether they are here. Never reads outside the page table."""
    page = slot >> page_shift
    inside = mask & (page >= 0) & (page < num_pages)
    arena_page = tl.load(page_table + page, mask=inside, other=-1).to(tl.int64)
    here = arena_page >= 0
    return (arena_page << page_shift) + (slot - (page << page_shift)), here


@triton.jit
def load(pointers, mask):
    """Stored elements as float32, 0 where masked; bfloat16 lies behind the pointers as int16."""
    element = tl.load(pointers, mask=mask, other=0)
    if pointers.dtype.element_ty == tl.int16:
        element = (element.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return element


@triton.jit
def store(pointers, value, mask):
    """Write float32; bfloat16 is rounded to nearest, ties to even, NaN kept as a quiet NaN."""
    if pointers.dtype.element_ty == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(pointers, tl.where(value == value, rounded, 0x7FC0).to(tl.int16), mask=mask)
    else:
        tl.store(pointers, value, mask=mask)


def storage(tensor: Tensor) -> Tensor:
    """A float32 tensor as it is, a bfloat16 tensor as int16. Shares memory."""
    detached = tensor.detach()
    return detached.view(torch.int16) if tensor.dtype == torch.bfloat16 else detached


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor without autograd, contiguous."""
    return tensor.detach().contiguous()


def optional_weights(weights: Tensor | None, beside: Tensor) -> Tensor:
    """Weights, or some tensor in their place where none are given (kernels are told by a flag and do not read it)."""
    return beside.new_empty(0, dtype=torch.float32) if weights is None else contiguous(weights)


def tile(width: int) -> int:
    """Columns that one program handles: a power of two."""
    return min(_LARGEST_TILE, int(triton.next_power_of_2(max(1, width))))
