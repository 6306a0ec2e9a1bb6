"""One arena: rows of all pages that have the same owned blocks, side by side, behind a page table.

Knows where rows lie and moves them within the shard; what they mean is the table's.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.arrays import VALUES, Blocks, NamedArray
from mempool.types import TableSchema

PageNumbers = npt.NDArray[np.int64]

_COPY_BYTES = 16 * 2**20
"""Rows are copied in pieces of about this size, so that no copy needs much memory beside the arenas."""


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
        self._capacity = 0
        self._free: list[int] = []
        self._rows = {
            array.name: torch.empty((0, array.width(blocks)), dtype=array.dtype, device=device) for array in self.arrays
        }
        self._page_table = torch.full((schema.num_row_pages,), -1, dtype=torch.int32, device=device)

    @property
    def num_taken(self) -> int:
        """Arena pages in use, published or not."""
        return self._capacity - len(self._free)

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values()) + self._page_table.nbytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all arrays."""
        return self._page_slots * sum(array.width(self.blocks) * array.dtype.itemsize for array in self.arrays)

    def has(self, name: str) -> bool:
        """Whether the pages of this arena have an array of that name."""
        return name in self._rows

    def paged(self, name: str = VALUES) -> kernels.Paged:
        """One array as the kernels see it."""
        return kernels.Paged(rows=self._rows[name], page_table=self._page_table, page_shift=self._page_shift)

    def state(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Optimizer state, to be changed in place."""
        return {name: self._rows[name] for name in names}

    def pages(self, name: str) -> Tensor:
        """One array as [capacity, page_slots, width]: a view."""
        rows = self._rows[name]
        return rows.view(self._capacity, self._page_slots, rows.shape[1])

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
        for name in list(self._rows):
            pages = self.pages(name)
            self._rows[name] = pages[kept].reshape(-1, pages.shape[2])
        self._capacity, self._free = len(here), []
        self.publish(here, np.arange(len(here), dtype=np.int64))

    def _resize(self, capacity: int) -> None:
        for name, old in self._rows.items():
            rows = torch.empty((capacity * self._page_slots, old.shape[1]), dtype=old.dtype, device=self._device)
            rows[: old.shape[0]] = old
            self._rows[name] = rows
        # The lowest page is taken first: the list is a stack.
        self._free = list(range(capacity - 1, self._capacity - 1, -1)) + self._free
        self._capacity = capacity


def pieces(num_pages: int, page_bytes: int) -> Iterator[slice]:
    """Cut a list of pages into pieces of about 16 MiB."""
    step = max(1, _COPY_BYTES // max(1, page_bytes))
    for start in range(0, num_pages, step):
        yield slice(start, min(start + step, num_pages))


def _columns(schema: TableSchema, blocks: Blocks) -> npt.NDArray[np.int64]:
    """The table's columns that these blocks are."""
    return np.concatenate([np.arange(*schema.block_columns(block), dtype=np.int64) for block in blocks])
