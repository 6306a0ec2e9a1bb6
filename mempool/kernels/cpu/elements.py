"""The innermost steps that kernels share: slot id to arena row, stored element to float32 and back."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from mempool.kernels.cpu.runtime import Array, serial


@serial
def locate(slot: int, page_table: Array, page_shift: int) -> int:
    """Arena row of a slot, -1 if its page is not here. Never reads outside the page table."""
    page = slot >> page_shift
    if page < 0 or page >= page_table.shape[0]:
        return -1
    arena_page: Any = np.int64(page_table[page])
    if arena_page < 0:
        return -1
    return (arena_page << page_shift) | (slot & ((1 << page_shift) - 1))  # type: ignore[no-any-return]


def load(element: Any) -> np.float32:
    """A stored element as float32; bfloat16 comes as its bits in uint16."""
    raise NotImplementedError(f"compiled code only, called with {type(element)}")


@overload(load, strict=False)
def _load(element: Any) -> Any:
    if element == numba.float32:
        return lambda element: element
    return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)


def stored(value: Any, like: Any) -> Any:
    """A float32 as an element of the arena ``like``; bfloat16 is rounded to nearest, ties to even, NaN stays NaN."""
    raise NotImplementedError(f"compiled code only, called with {type(value)} and {type(like)}")


@overload(stored, strict=False)
def _stored(value: Any, like: Any) -> Any:  # noqa: ARG001 - Numba matches arguments by name
    if like.dtype == numba.float32:
        return lambda value, like: value  # noqa: ARG005

    def as_bfloat16(value, like):  # type: ignore[no-untyped-def]  # noqa: ARG001
        bits = np.float32(value).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(rounded) if value == value else np.uint16(0x7FC0)

    return as_bfloat16
