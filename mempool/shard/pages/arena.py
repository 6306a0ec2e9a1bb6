"""Arenas: rows of all pages with the same owned blocks, side by side, behind a page table, as named arrays.

Knows where rows lie, which columns a block has in each array and what they hold at first. Who asks is the table's.

Values of one byte an element lie in one tensor with their scales, a row in one piece. "values" (their codes) and
"values.scales" are views of it, so that pages are moved, staged and exported by named array whatever they hold.

What belongs to a trainable array is named `<array>.<what>`: its optimizer state, master, scales and last step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.steps.optimizers import state_arrays
from mempool.types import FlatKeySpec, ProductKeySpec, TableSchema

Blocks = tuple[int, ...]

VALUES = "values"
SCALES = f"{VALUES}.scales"
MASTER = f"{VALUES}.{kernels.MASTER}"
LAST_STEP = f"{VALUES}.{kernels.LAST_STEP}"
KEYS = "keys"
HEAD_KEYS = "head_keys"

VALUE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float32,
    "int8": torch.float32,
}
"""What values are read and written as."""

_KEY_STREAM = 0x9E3779B97F4A7C15
"""Keys come from the values' generator under another seed: a key is no copy of its value's first columns."""

PageNumbers = npt.NDArray[np.int64]

_COPY_BYTES = 16 * 2**20
"""Rows are copied in pieces of about this size, so that no copy needs much memory beside the arenas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedArray:
    """One array of the rows of an arena.

    Attributes:
        per: "element": as wide as the values; "block": one column per block; "slot": ``key_dim`` columns, kept with
            block 0 only.
        initial: What a new row holds; None: drawn from the generator.
    """

    name: str
    per: Literal["element", "block", "slot"]
    dtype: torch.dtype
    initial: float | None
    schema: TableSchema

    def columns(self, blocks: Blocks, block: int) -> slice:
        """The columns of one block among those of ``blocks``, which are side by side and ascending."""
        place = blocks.index(block)
        if self.per == "block":
            return slice(place, place + 1)
        if self.per == "slot":
            return slice(0, self.width((block,)))
        start = self.schema.width(blocks[:place])
        return slice(start, start + self.schema.width((block,)))

    def width(self, blocks: Blocks) -> int:
        """Columns of these blocks together."""
        if self.per == "block":
            return len(blocks)
        if self.per == "slot":
            return key_dim(self.schema) if 0 in blocks else 0
        return self.schema.width(blocks)


def named_arrays(schema: TableSchema) -> tuple[NamedArray, ...]:
    """All arrays of the table's row pages, values first."""
    dtype = torch.uint8 if schema.packed else VALUE_DTYPES[schema.dtype]
    arrays = [NamedArray(name=VALUES, per="element", dtype=dtype, initial=None, schema=schema)]
    if schema.packed:
        arrays.append(NamedArray(name=SCALES, per="block", dtype=torch.float32, initial=None, schema=schema))
    if schema.master:
        arrays.append(NamedArray(name=MASTER, per="element", dtype=torch.float32, initial=None, schema=schema))
    arrays += [
        NamedArray(
            name=f"{VALUES}.{state.name}", per=state.per, dtype=state.dtype, initial=state.initial, schema=schema
        )
        for state in state_arrays(schema.optimizer)
    ]
    if isinstance(schema.keys, FlatKeySpec):
        arrays.append(NamedArray(name=KEYS, per="slot", dtype=torch.float32, initial=None, schema=schema))
    return tuple(arrays)


def packed_layout(schema: TableSchema, blocks: Blocks) -> kernels.PackedLayout | None:
    """How rows of these blocks lie where elements are one byte; None for others."""
    if schema.dtype == "float8_e4m3fn" or schema.dtype == "int8":
        return kernels.PackedLayout(schema.dtype, width=schema.width(blocks), block_dim=schema.block_dim)
    return None


def row_bytes(schema: TableSchema, blocks: Blocks) -> int:
    """Bytes of one slot's row of these blocks in all arrays, padding included; 0 of no blocks: of keys alone."""
    if not blocks:
        return 0
    packed = packed_layout(schema, blocks)
    return sum(
        array.width(blocks) * array.dtype.itemsize
        for array in named_arrays(schema)
        if packed is None or array.name not in (VALUES, SCALES)
    ) + (0 if packed is None else packed.row_bytes)


def key_dim(schema: TableSchema) -> int:
    """Width of a flat key, or of both half-keys of a product key together; 0 without keys."""
    return schema.keys.key_dim if schema.keys is not None else 0


def initial_rows(array: NamedArray, slots: range, block: int) -> Tensor | float:
    """What rows of these slots hold at first in the columns of ``block``: [len(slots), width], or one number."""
    if array.initial is not None:
        return array.initial
    if array.per == "slot":
        return _initial_keys(array.schema, slots, array.schema.keys.key_dim if array.schema.keys else 0)
    first, stop = array.schema.block_columns(block)
    return kernels.initial_values(
        array.schema.seed, slots.start, len(slots), first, stop - first, array.schema.init_std
    )


def initial_head_keys(schema: TableSchema, head: int) -> Tensor:
    """[2, n, key_dim / 2] float32: the product keys of one head, drawn as rows (head * 2 + half) * n + i."""
    assert isinstance(schema.keys, ProductKeySpec)
    n, half_dim = half_keys(schema), schema.keys.key_dim // 2
    rows = range(head * 2 * n, (head + 1) * 2 * n)
    return _initial_keys(schema, rows, half_dim).view(2, n, half_dim)


def half_keys(schema: TableSchema) -> int:
    """n: half-keys of each codebook of a head; n * n = num_slots."""
    return math.isqrt(schema.num_slots)


def _initial_keys(schema: TableSchema, rows: range, width: int) -> Tensor:
    seed = (schema.seed ^ _KEY_STREAM) & (2**63 - 1)
    return kernels.initial_values(seed, rows.start, len(rows), 0, width, 1.0 / math.sqrt(key_dim(schema)))


class Arena:
    """Storage of row pages with the same owned blocks.

    An *arena page* is taken by ``take`` and answers nothing until ``publish`` enters it in the page table; so pages
    that are still on their way here can lie in their final place already.
    """

    def __init__(
        self, *, schema: TableSchema, blocks: Blocks, arrays: tuple[NamedArray, ...], device: torch.device
    ) -> None:
        self.blocks = blocks
        self.columns = _columns(schema, blocks)
        self.arrays = tuple(array for array in arrays if array.width(blocks) > 0)
        self.page_of = np.full(schema.num_row_pages, -1, dtype=np.int32)
        self._page_slots = schema.page_slots
        self._page_shift = schema.page_shift
        self._device = device
        self._row_bytes = row_bytes(schema, blocks)
        self._block_dim = schema.block_dim
        self._packed = packed_layout(schema, blocks)
        self._capacity = 0
        self._free: list[int] = []
        self._stores = {
            array.name: torch.empty((0, array.width(blocks)), dtype=array.dtype, device=device) for array in self.arrays
        }
        if self._packed is not None:
            self._stores[VALUES] = torch.empty((0, self._packed.row_bytes), dtype=torch.uint8, device=device)
            del self._stores[SCALES]
        self._page_table = torch.full((schema.num_row_pages,), -1, dtype=torch.int32, device=device)

    @property
    def num_taken(self) -> int:
        """Arena pages in use, published or not."""
        return self._capacity - len(self._free)

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._stores.values()) + self._page_table.nbytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all arrays."""
        return self._page_slots * self._row_bytes

    def has(self, name: str) -> bool:
        """Whether the pages of this arena have an array of that name."""
        return any(array.name == name for array in self.arrays)

    def paged(self, name: str = VALUES) -> kernels.Paged:
        """One array of float32 or bfloat16, or the values of whatever element, as the kernels see it."""
        packed = self._packed if name == VALUES else None
        return kernels.Paged(self._stores[name], self._page_table, self._page_shift, packed)

    def rows(self, name: str) -> Tensor:
        """One array as [R, width]: a view, not contiguous where values are packed."""
        if self._packed is None or name not in (VALUES, SCALES):
            return self._stores[name]
        if name == VALUES:
            return self._stores[VALUES][:, : self._packed.width]
        start = self._packed.scales_start
        scales = self._stores[VALUES][:, start : start + 4 * self._packed.num_blocks]
        return scales.view(torch.float32)

    def state(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """State and master of the values, to be changed in place, by the names of kernels: without the array's."""
        return {name: self._stores[f"{VALUES}.{name}"] for name in names}

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[M] slot ids, all of the table: which are here, [M] bool, and the arena rows of those."""
        arena_pages = self._page_table[ids >> self._page_shift].to(torch.int64)
        here = arena_pages >= 0
        return here, (arena_pages[here] << self._page_shift) | (ids[here] & (self._page_slots - 1))

    def catch_up(self, rows: Tensor, schedule: kernels.DenseSchedule, names: tuple[str, ...]) -> None:
        """Do the steps of a dense optimizer that these rows, which may repeat, have missed. names: ``step_names``."""
        late = self._stores[LAST_STEP][rows].amin(dim=1) < schedule.last_step
        rows = torch.unique(rows[late])
        if rows.numel():
            kernels.catch_up(
                self.paged(), self.state(names), rows, schedule, to=schedule.last_step, block_dim=self._block_dim
            )

    def growth_bytes(self, count: int) -> int:
        """Bytes that ``reserve`` of so many pages would add."""
        return max(0, count - len(self._free)) * self.page_bytes

    def pages(self, name: str) -> Tensor:
        """One array as [capacity, page_slots, width]: a view."""
        rows = self.rows(name)
        return rows.view(self._capacity, self._page_slots, rows.shape[1])

    def reserve(self, count: int) -> None:
        """Grow once, to exactly what ``count`` more pages need, before they are taken one batch after another."""
        if count > len(self._free):
            self._resize(self._capacity + count - len(self._free))

    def take(self, count: int) -> PageNumbers:
        """Take arena pages, with undefined contents; grows the arena where it has not enough."""
        lacking = count - len(self._free)
        if lacking > 0:
            # Growing by at least a quarter keeps many small takes linear; the first take is exact.
            self._resize(self._capacity + max(lacking, self._capacity // 4))
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return np.array(taken[::-1], dtype=np.int64)

    def give_back(self, arena_pages: PageNumbers) -> None:
        """Arena pages that are not published any more."""
        self._free.extend(sorted((int(page) for page in arena_pages), reverse=True))

    def publish(self, row_pages: PageNumbers, arena_pages: PageNumbers) -> None:
        """From now on these row pages are found at these arena pages."""
        self.page_of[row_pages] = arena_pages
        self._page_table = torch.from_numpy(self.page_of.copy()).to(self._device)

    def withdraw(self, row_pages: PageNumbers) -> PageNumbers:
        """These row pages are not here any more. Returns the arena pages they had, still taken."""
        arena_pages = self.page_of[row_pages].astype(np.int64)
        self.page_of[row_pages] = -1
        self._page_table = torch.from_numpy(self.page_of.copy()).to(self._device)
        return arena_pages

    def copy_from(
        self, source: "Arena", *, blocks: Blocks, source_pages: PageNumbers, arena_pages: PageNumbers
    ) -> None:
        """Copy the columns of ``blocks`` from pages of another arena."""
        for array in self.arrays:
            if not source.has(array.name):
                continue
            read, write = source.pages(array.name), self.pages(array.name)
            for piece in pieces(len(arena_pages), max(self.page_bytes, source.page_bytes)):
                taken = read[torch.from_numpy(source_pages[piece])]
                for block in blocks:
                    into, out_of = array.columns(self.blocks, block), array.columns(source.blocks, block)
                    write[torch.from_numpy(arena_pages[piece]), :, into] = taken[:, :, out_of]

    def shrink(self) -> None:
        """Give memory back where more than half of the arena is free; changes where pages lie, not what they hold."""
        if len(self._free) * 2 <= self._capacity:
            return
        here = np.flatnonzero(self.page_of >= 0)
        if len(here) != self.num_taken:
            return  # pages on their way here are known to others by where they lie
        kept = torch.from_numpy(self.page_of[here].astype(np.int64))
        for name, rows in self._stores.items():
            pages = rows.view(self._capacity, self._page_slots, rows.shape[1])
            self._stores[name] = pages[kept].reshape(-1, rows.shape[1])
        self._capacity, self._free = len(here), []
        self.publish(here, np.arange(len(here), dtype=np.int64))

    def _resize(self, capacity: int) -> None:
        for name, old in self._stores.items():
            rows = torch.empty((capacity * self._page_slots, old.shape[1]), dtype=old.dtype, device=self._device)
            _prefer_huge_pages(rows)
            if self._packed is not None and name == VALUES:
                rows[old.shape[0] :].zero_()  # padding stays 0
            rows[: old.shape[0]] = old
            self._stores[name] = rows
        # The lowest page is taken first: the list is a stack.
        self._free = list(range(capacity - 1, self._capacity - 1, -1)) + self._free
        self._capacity = capacity


def _prefer_huge_pages(rows: Tensor) -> None:
    """Look-ups read rows at random: each would wait for its page's address too."""
    if rows.device.type != "cpu":
        return
    try:
        from mempool.kernels.cpu.runtime import prefer_huge_pages
    except ImportError:  # no Numba
        return
    prefer_huge_pages(rows)


def pieces(num_pages: int, page_bytes: int) -> Iterator[slice]:
    """Cut a list of pages into pieces of about 16 MiB."""
    step = max(1, _COPY_BYTES // max(1, page_bytes))
    for start in range(0, num_pages, step):
        yield slice(start, min(start + step, num_pages))


def _columns(schema: TableSchema, blocks: Blocks) -> npt.NDArray[np.int64]:
    """The table's columns that these blocks are."""
    return np.concatenate([np.arange(*schema.block_columns(block), dtype=np.int64) for block in blocks])
