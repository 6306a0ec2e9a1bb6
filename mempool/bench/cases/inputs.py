"""Tables and ids that cases run on: arenas with shuffled pages, shared by all contenders, and fresh pairs of a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mempool.kernels import BLOCK_STATE, STATE_NAMES, Element, PackedLayout, Paged, num_blocks

#: Sets of inputs of a case: contenders that follow each other never get the same, see measuring.interleaved.
NUM_INPUTS = 4
_PAGE_SHIFT = 12
_ZIPF_EXPONENT = 1.05
#: Rows that are drawn; larger tables repeat them. A prime, so that no two pages hold the same rows in the same places.
_DRAWN_ROWS = 4093


@dataclass(frozen=True)
class TableSpec:
    """Which table: slots, columns, stored element, columns of a block."""

    num_slots: int
    value_dim: int
    element: Element = "float32"
    block_dim: int | None = None

    @property
    def layout(self) -> PackedLayout | None:
        if self.element == "float32" or self.element == "bfloat16":
            return None
        return PackedLayout(self.element, self.value_dim, self.block_dim or self.value_dim)

    @property
    def row_bytes(self) -> int:
        if self.layout is not None:
            return self.layout.row_bytes
        return self.value_dim * (4 if self.element == "float32" else 2)

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.row_bytes


@dataclass(frozen=True)
class Pairs:
    """One set of inputs: pairs of bags that are equally long.

    Attributes:
        ids: [L] int64 slots.
        arena_ids: [L] int64, where they lie: what peers without a page table are given.
        weights: [L] float32.
        narrow_weights: [L], the same in bfloat16, for peers that want weights in the dtype of the rows.
        offsets: [B + 1] int64.
        bags: [L] int64.
        grads: [B, W] float32.
    """

    ids: Tensor
    arena_ids: Tensor
    weights: Tensor
    narrow_weights: Tensor
    offsets: Tensor
    bags: Tensor
    grads: Tensor


class Tables:
    """Makes arenas, and keeps what the next cases use again: the float32 arena of a size, one other, and one state.

    Every contender of a case works on the same memory: mempool through the page table, peers with ids that are already
    translated. On the CPU it lies in huge pages where the system has them, as a shard's does.
    """

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.device = torch.device(device)
        self.seed = seed
        self._arenas: dict[TableSpec, Paged] = {}
        self._changed: set[TableSpec] = set()
        self._state: tuple[TableSpec, str, int, dict[str, Tensor]] | None = None

    def arena_to_change(self, spec: TableSpec) -> Paged:
        """As ``arena``, and whoever asks next gets the first values again."""
        paged = self.arena(spec)
        self._changed.add(spec)
        return paged

    def arena(self, spec: TableSpec) -> Paged:
        """Its values are standard normal; packed rows have such elements and scales about 1."""
        if spec in self._changed:
            self._changed.discard(spec)
            if spec in self._arenas:
                self._fill(spec, self._arenas[spec].rows)
        if spec not in self._arenas:
            size = (spec.num_slots, spec.value_dim)
            self._arenas = {
                kept: paged
                for kept, paged in self._arenas.items()
                if (kept.num_slots, kept.value_dim) == size and "float32" in (kept.element, spec.element)
            }
            if self._state is not None and self._state[0] not in self._arenas:
                self._state = None
            self._arenas[spec] = self._made(spec)
        return self._arenas[spec]

    def state(self, spec: TableSpec, algorithm: str, block_dim: int) -> dict[str, Tensor]:
        """State of an optimizer: second moments start at 1, where every rule is well-conditioned, first ones at 0."""
        if self._state is None or self._state[:3] != (spec, algorithm, block_dim):
            self._state = None  # the memory is free before the next is asked for
            found: dict[str, Tensor] = {}
            for name in STATE_NAMES[algorithm]:
                width = num_blocks(spec.value_dim, block_dim) if name in BLOCK_STATE else spec.value_dim
                found[name] = self.empty(spec.num_slots, width, torch.float32)
            self._state = (spec, algorithm, block_dim, found)
        for name, tensor in self._state[3].items():
            tensor.fill_(0.0 if name == "exp_avg" else 1.0)
        return self._state[3]

    def pairs(self, paged: Paged, num_slots: int, num_bags: int, bag_size: int, ids: str) -> list[Pairs]:
        """Sets of pairs, all different."""
        generator = torch.Generator().manual_seed(self.seed)
        draw = _Zipf(num_slots, generator) if ids == "zipf" else None
        offsets = torch.arange(0, num_bags * bag_size + 1, bag_size)
        bags = torch.repeat_interleave(torch.arange(num_bags), bag_size)
        sets = []
        for _ in range(NUM_INPUTS):
            size = (num_bags * bag_size,)
            chosen = torch.randint(0, num_slots, size, generator=generator) if draw is None else draw(*size)
            weights = torch.rand(size, generator=generator) + 0.5
            tensors = (
                chosen,
                arena_ids(paged, chosen),
                weights,
                weights.to(torch.bfloat16),
                offsets,
                bags,
                torch.randn(num_bags, paged.width, generator=generator),
            )
            sets.append(Pairs(*(tensor.to(self.device) for tensor in tensors)))
        return sets

    def _made(self, spec: TableSpec) -> Paged:
        generator = torch.Generator().manual_seed(self.seed)
        shift = max(0, min(_PAGE_SHIFT, spec.num_slots.bit_length() - 3))  # several pages, however small
        num_pages = -(-spec.num_slots // (1 << shift))
        page_table = torch.randperm(num_pages, generator=generator).to(torch.int32).to(self.device)
        dtype = torch.uint8 if spec.layout is not None else getattr(torch, spec.element)
        columns = spec.row_bytes // dtype.itemsize
        rows = self.empty(num_pages << shift, columns, dtype)
        self._fill(spec, rows)
        return Paged(rows, page_table, shift, spec.layout)

    def empty(self, num_rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory of a matrix, in huge pages where the system has them."""
        made = torch.empty(num_rows, columns, dtype=dtype, device=self.device)
        if self.device.type == "cpu":
            try:
                from mempool.kernels.cpu.runtime import prefer_huge_pages
            except ImportError:  # no Numba
                return made
            prefer_huge_pages(made)
        return made

    def _fill(self, spec: TableSpec, rows: Tensor) -> None:
        drawn = _drawn(spec, torch.Generator().manual_seed(self.seed)).to(self.device)
        for first in range(0, rows.shape[0], _DRAWN_ROWS):
            part = rows[first : first + _DRAWN_ROWS]
            part.copy_(drawn[: part.shape[0]])


def _drawn(spec: TableSpec, generator: torch.Generator) -> Tensor:
    values = torch.randn(_DRAWN_ROWS, spec.value_dim, generator=generator)
    if spec.layout is None:
        return values if spec.element == "float32" else values.to(torch.bfloat16)
    layout = spec.layout
    rows = torch.zeros(_DRAWN_ROWS, layout.row_bytes, dtype=torch.uint8)
    if layout.element == "int8":
        codes = (values * 32).round().clamp(-127, 127).to(torch.int8)
        scales = torch.rand(_DRAWN_ROWS, layout.num_blocks, generator=generator) / 32 + 1 / 64
    else:
        codes = values.to(torch.float8_e4m3fn)
        scales = torch.rand(_DRAWN_ROWS, layout.num_blocks, generator=generator) + 0.5
    rows[:, : layout.width] = codes.view(torch.uint8)
    rows[:, layout.scales_start : layout.scales_start + 4 * layout.num_blocks] = scales.view(torch.uint8)
    return rows


class _Zipf:
    """Draws slots whose ranks follow Zipf's law, cut at the table's end; ranks lie anywhere in the table."""

    def __init__(self, num_slots: int, generator: torch.Generator) -> None:
        shares = torch.arange(1, num_slots + 1, dtype=torch.float64).pow(-_ZIPF_EXPONENT)
        self._cumulated = shares.cumsum(0) / shares.sum()
        self._slots = torch.randperm(num_slots, generator=generator)
        self._generator = generator

    def __call__(self, count: int) -> Tensor:
        drawn = torch.rand(count, dtype=torch.float64, generator=self._generator)
        ranks = torch.searchsorted(self._cumulated, drawn).clamp(max=self._slots.numel() - 1)
        return self._slots[ranks]


def arena_ids(paged: Paged, ids: Tensor) -> Tensor:
    """Arena rows of slots that are all here."""
    pages = paged.page_table.cpu().long()[ids >> paged.page_shift]
    return (pages << paged.page_shift) | (ids & ((1 << paged.page_shift) - 1))


@dataclass(frozen=True)
class Sample:
    """Some slots of a table and their rows as a small table of its own, in memory of its own: what float64 looks at.

    Attributes:
        slots: [U] int64, ascending, on the CPU.
        rows: [U] int64, their rows in the large arena.
        paged: The small table on the CPU; slot ``u`` of it is ``slots[u]`` of the large one.
    """

    slots: Tensor
    rows: Tensor
    paged: Paged

    @classmethod
    def of(cls, paged: Paged, ids: Tensor) -> Sample:
        """Copy the rows of the slots that occur in ``ids``."""
        slots = distinct(ids)
        rows = arena_ids(paged, slots)
        copied = paged.rows[rows.to(paged.rows.device)].cpu()
        small = Paged(copied, torch.arange(slots.numel(), dtype=torch.int32), 0, paged.packed)
        return cls(slots, rows, small)

    def local(self, ids: Tensor) -> Tensor:
        """Slots of the small table for slots of the large one."""
        return torch.searchsorted(self.slots, ids.cpu())


def sampled(count: int, of: int, seed: int) -> list[int]:
    """The bags, pairs or queries that are checked: the first, the last and random ones of the numbers below ``of``."""
    generator = torch.Generator().manual_seed(seed)
    return sorted({0, of - 1, *torch.randperm(of, generator=generator)[: max(0, count - 2)].tolist()})


def bags_for(value_dim: int, bag_size: int, moved_bytes: int) -> int:
    """How many bags read about ``moved_bytes`` of float32 rows, a power of two and at least 8.

    Every size then reads several times what the last cache holds.
    """
    wanted = moved_bytes / (4 * value_dim * bag_size)
    return max(8, 1 << max(0, round(math.log2(wanted))))


def distinct(ids: Tensor) -> Tensor:
    """The different ids, ascending, on the CPU."""
    found: Tensor = torch.unique(ids.cpu())
    return found


def tensors_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
