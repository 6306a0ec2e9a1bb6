"""How rows of one byte per element lie in an arena: a block's elements, and beside them the scale of every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

PackedElement = Literal["float8_e4m3fn", "int8"]

#: The largest number an element stands for; a block's scale is its largest magnitude divided by this.
LARGEST: dict[PackedElement, float] = {"float8_e4m3fn": 448.0, "int8": 127.0}


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Layout of an arena row [row_bytes] uint8: one read brings elements and scales.

    Bytes ``0:width`` are the elements (int8, or float8_e4m3fn's bits); bytes from ``scales_start`` on are one float32
    scale per column block; padding, always 0, fills the row to a multiple of 16 bytes. A value is
    ``scale[column // block_dim] * element[column]``. An element is never a NaN code: a block with an inf or NaN has the
    scale NaN and elements 0, so that all of it reads as NaN.

    Attributes:
        element: What a byte holds.
        width: W, elements of a row.
        block_dim: Columns of a block; the last block may be narrower.

    Raises:
        ValueError: Unknown element, or a size below 1.
    """

    element: PackedElement
    width: int
    block_dim: int

    def __post_init__(self) -> None:
        if self.element not in get_args(PackedElement):
            raise ValueError(f"unknown packed element {self.element!r}; known: {', '.join(get_args(PackedElement))}")
        if self.width < 1 or self.block_dim < 1:
            raise ValueError(f"width and block_dim must be at least 1, got {self.width} and {self.block_dim}")

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.width, self.block_dim)

    @property
    def scales_start(self) -> int:
        """Byte of the first scale: a multiple of 4."""
        return -(-self.width // 4) * 4

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: a multiple of 16, so that every row starts aligned for the widest loads."""
        return -(-(self.scales_start + 4 * self.num_blocks) // 16) * 16


def num_blocks(width: int, block_dim: int) -> int:
    """Number of column blocks in a row of ``width`` columns."""
    return -(-width // block_dim)
