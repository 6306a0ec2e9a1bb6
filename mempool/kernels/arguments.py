"""What kernels take and return besides tensors: an arena behind its page table, and sorted pairs.

Shape legend of the package: B bags, L pairs in all bags, R arena rows, W arena row width, P pages, U distinct rows,
H heads, K top-k, D key dim, n half-keys of a codebook, M rows of scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mempool.kernels.layout import PackedLayout

Element = Literal["float32", "bfloat16", "float8_e4m3fn", "int8"]

ELEMENTS: tuple[Element, ...] = ("float32", "bfloat16", "float8_e4m3fn", "int8")

_PLAIN: dict[torch.dtype, Element] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

#: A run of pairs of one row is summed in pieces of this many: see ``mempool.kernels.segment_sum``.
RUN_PIECE = 1024
#: On a GPU, runs of more pairs than this are summed by programs of their own, into a float32 of each column for every
#: so many pairs. Divides RUN_PIECE.
LONG_RUN = 64


@dataclass(frozen=True, slots=True)
class Paged:
    """One arena seen through its page table.

    The row of slot ``id`` is ``page_table[id >> page_shift] << page_shift | id & (2**page_shift - 1)``, in int64.
    A slot whose page is -1, or whose id lies outside the page table, is *not here*: kernels read it as zeros and
    never write it. Refusing ids outside the table is the work of whoever received them.

    Attributes:
        rows: [R, W] float32 or bfloat16, contiguous: the arena. With a packed layout [R, row_bytes] uint8.
        page_table: [P] int32, contiguous, logical page -> arena page, -1 if not here. No arena page appears twice.
        page_shift: log2 of the slots of a page.
        packed: How rows of one byte per element are laid out; None for float32 and bfloat16.
        width: W, columns of a value here.
        views: What implementations have made of it for calls to come, by their own names.

    Raises:
        ValueError: A tensor has another shape, dtype, layout or device.
    """

    rows: Tensor
    page_table: Tensor
    page_shift: int
    packed: PackedLayout | None = None
    width: int = field(init=False, compare=False)
    views: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        rows, table = self.rows, self.page_table
        if self.packed is None:
            what, known = "[R, W] float32 or bfloat16", rows.dtype in _PLAIN
        else:
            what = f"[R, {self.packed.row_bytes}] uint8"
            known = rows.dtype == torch.uint8 and rows.shape[-1] == self.packed.row_bytes
        if rows.dim() != 2 or not known or not rows.is_contiguous():
            raise ValueError(
                f"rows must be a contiguous {what} tensor, got {rows.dtype} {list(rows.shape)}"
                f" with strides {rows.stride()}"
            )
        if rows.shape[1] == 0:
            raise ValueError(f"rows must have at least one column, got {list(rows.shape)}")
        if table.dim() != 1 or table.dtype != torch.int32 or not table.is_contiguous():
            raise ValueError(f"page_table must be a contiguous [P] int32 tensor, got {table.dtype} {list(table.shape)}")
        if table.device != rows.device:
            raise ValueError(f"rows are on {rows.device} but page_table is on {table.device}; put both on one device")
        if not 0 <= self.page_shift <= 40:
            raise ValueError(f"page_shift must lie in 0..40, got {self.page_shift}")
        object.__setattr__(self, "width", int(rows.shape[1]) if self.packed is None else self.packed.width)

    @property
    def element(self) -> Element:
        """What values are stored as."""
        return _PLAIN[self.rows.dtype] if self.packed is None else self.packed.element

    @property
    def value_dtype(self) -> torch.dtype:
        """What values are read and written as unless asked otherwise: the stored dtype, float32 for packed rows."""
        return self.rows.dtype if self.packed is None else torch.float32


@dataclass(frozen=True, slots=True)
class Dealt:
    """Pairs by the group of their pages: those of group g are ``starts[g]:starts[g + 1]``, in the order of their bags.

    A group with pairs in few of the bags (``few_bags``) has those bags alone, others all of them.

    Attributes:
        ids: [L'], as given, without those of no group; weights: [L'], or None.
        positions: [L'] int64, where they were.
        bags: [N] int64, ``bag_starts[g]:bag_starts[g + 1]`` the numbers of the bags of group g, ascending; none where
            it has all.
        offsets: [N'] int64, ``offset_starts[g]:offset_starts[g + 1]`` those of the bags of group g among its own pairs.
        starts, bag_starts, offset_starts: G + 1 of each.
    """

    ids: Tensor
    weights: Tensor | None
    positions: Tensor
    bags: Tensor
    offsets: Tensor
    starts: list[int]
    bag_starts: list[int]
    offset_starts: list[int]


def few_bags(num_named: Any, num_bags: int) -> Any:
    """Whether so many bags with pairs, a number or an array, are so few of all that the others are worth leaving out:
    what is saved is bytes, of offsets, sums and their gradients, for which the gradients of these are copied."""
    return 4 * num_named < 3 * num_bags


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """Pairs in the canonical order of a commit: by slot id, and within a slot in the order they were given.

    Attributes:
        order: [L'] int64, positions in the ids that were sorted; pairs that are not here are left out.
        rows: [U] int64, the distinct arena rows, by slot id ascending.
        slots: [U] int64, their slot ids.
        starts: [U + 1] int64, the pairs of ``rows[u]`` are ``order[starts[u]:starts[u + 1]]``.
    """

    order: Tensor
    rows: Tensor
    slots: Tensor
    starts: Tensor
