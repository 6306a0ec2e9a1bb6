"""Arenas: rows of all pages with the same owned blocks, side by side, behind a page table, as named arrays.

Knows where rows lie and which pages were written to. What they hold at first is ``filling``'s, who asks is the table's.

Values of one byte an element lie in one tensor with their scales, a row in one piece. "values" (their codes) and
"values.scales" are views of it, so that pages are moved, staged and exported by named array whatever they hold.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.pages.memory import Rows, rows_on
from mempool.shard.pages.named_arrays import LAST_STEP, SCALES, VALUES, Blocks, NamedArray, packed_layout, row_bytes
from mempool.types import TableSchema
from mempool.types.sizes import PAGE_TABLE_BYTES

PageNumbers = npt.NDArray[np.int64]

_IDLE_PART = 16
"""An arena lets a sixteenth of its pages be free before it gives memory back."""
_COPY_BYTES = 16 * 2**20
"""Rows are copied in pieces of about this size, so that no copy needs much memory beside the arenas."""
_SHRINK_BYTES = 2**20
"""An arena that shrinks copies at least so much at a time: whoever asks next waits for it."""


class Watcher(Protocol):
    """Is told of rows before they are written to."""

    def save(self, rows: Tensor) -> None:
        """Arena rows [U], which may repeat."""


class Arena:
    """Storage of row pages with the same owned blocks.

    An *arena page* is taken by ``take`` and answers nothing until ``publish`` enters it in the page table; so pages
    that are still on their way here can lie in their final place already.

    Attributes:
        page_of: [P] int32: the arena page of every row page of the table, -1 where it is not here. Others only read it.
        capture: Copies rows before they are written to, where somebody wants them as they are.
        mark: A checkpoint that counts, and ``writes`` at its moment.
        width: Columns of the blocks.
        cut: As ``capture``, for a snapshot of the shard. kept: Likewise, for who reads versions.
        forked: The arena that this one is a fork of, and ``writes`` of both then: pages that were not written to since
            are the same.

    Args:
        of: It is a fork of that one: it holds what that does, with the same pages at the same places, and shares its
            memory where there is a way. All of that one's memory is shared.

    Raises:
        InvalidRequest: There are not enough addresses for all pages that it may come to hold.
    """

    def __init__(
        self,
        *,
        schema: TableSchema,
        blocks: Blocks,
        arrays: tuple[NamedArray, ...],
        device: torch.device,
        of: "Arena | None" = None,
    ) -> None:
        self.blocks = blocks
        self.width = schema.width(blocks)
        self.arrays = tuple(array for array in arrays if array.width(blocks) > 0)
        self.page_of = np.full(schema.num_row_pages, -1, dtype=np.int32)
        self._page_slots = schema.page_slots
        self._page_shift = schema.page_shift
        self._device = device
        self._row_bytes = row_bytes(schema, blocks)
        self._block_dim = schema.block_dim
        self._packed = packed_layout(schema, blocks)
        self._capacity = self._freed = 0
        self._free: PageNumbers = np.empty(0, dtype=np.int64)  # descending: the lowest is taken first
        widths = {array.name: (array.width(blocks), array.dtype) for array in self.arrays}
        if self._packed is not None:
            widths[VALUES] = self._packed.row_bytes, torch.uint8
            del widths[SCALES]
        max_rows = schema.num_row_pages * schema.page_slots
        self._memory: dict[str, Rows] = {
            name: rows_on(device, max_rows=max_rows, width=width, dtype=dtype)
            for name, (width, dtype) in (widths if of is None else {}).items()
        }
        self._stores = {name: rows.first(0) for name, rows in self._memory.items()}
        self._paged: dict[str, kernels.Paged] = {}  # as long as rows lie where they do: each request asks for it
        on_cpu = device.type == "cpu"
        self._page_table = torch.from_numpy(self.page_of if on_cpu else self.page_of.copy()).to(device)
        self.cut: Watcher | None = None
        self._over = False
        self._writes = 0
        self.capture: Watcher | None = None
        self.kept: Watcher | None = None
        self.mark: tuple[str, int] | None = None
        self._written_at = torch.from_numpy(np.zeros(schema.num_row_pages, dtype=np.int64)).to(device)
        self.forked: tuple[weakref.ref[Arena], int] | None = None
        if of is not None:
            self._fork(of)

    def _fork(self, of: "Arena") -> None:
        try:
            for name, rows in of._memory.items():
                self._memory[name] = rows.fork()
        except BaseException:
            self.close()
            raise
        self._capacity, self._free = of._capacity, of._free.copy()
        self._stores = {name: rows.first(self._capacity * self._page_slots) for name, rows in self._memory.items()}
        self.page_of[:] = of.page_of
        self._page_table.copy_(of._page_table)
        self._writes = of._writes
        self._written_at.copy_(of._written_at)
        self.forked = weakref.ref(of), of._writes

    @property
    def num_taken(self) -> int:
        """Arena pages in use, published or not."""
        return self._capacity - len(self._free)

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages that memory was taken for, and of the page table; addresses that are reserved are none."""
        orphaned = sum(rows.orphan_bytes for rows in self._memory.values())
        return self._capacity * self.page_bytes + len(self.page_of) * PAGE_TABLE_BYTES + orphaned

    @property
    def shared_bytes(self) -> int:
        """Bytes of its pages that are the memory of one that it was forked of; any thread may ask."""
        return sum(rows.shared_bytes for rows in self._memory.values())

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all arrays."""
        return self._page_slots * self._row_bytes

    def has(self, name: str) -> bool:
        """Whether the pages of this arena have an array of that name."""
        return any(array.name == name for array in self.arrays)

    # Rows

    def paged(self, name: str = VALUES) -> kernels.Paged:
        """One array of float32 or bfloat16, or the values of whatever element, as the kernels see it."""
        paged = self._paged.get(name)
        if paged is None:
            packed = self._packed if name == VALUES else None
            paged = kernels.Paged(self._stores[name], self._page_table, self._page_shift, packed)
            self._paged[name] = paged
        return paged

    def rows(self, name: str) -> Tensor:
        """One array as [R, width]: a view, not contiguous where values are packed."""
        return self.view_of(name, self._stores)

    @property
    def stores(self) -> dict[str, Tensor]:
        """The rows as they lie, [R, width]: packed values are one array."""
        return self._stores

    def view_of(self, name: str, stores: dict[str, Tensor]) -> Tensor:
        """One array of rows that lie as ``stores`` do, as ``rows`` has it."""
        if self._packed is None or name not in (VALUES, SCALES):
            return stores[name]
        if name == VALUES:
            return stores[VALUES][:, : self._packed.width]
        start = self._packed.scales_start
        scales = stores[VALUES][:, start : start + 4 * self._packed.num_blocks]
        return scales.view(torch.float32)

    def pages(self, name: str) -> Tensor:
        """One array as [capacity, page_slots, width]: a view."""
        rows = self.rows(name)
        return rows.view(self._capacity, self._page_slots, rows.shape[1])

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._device

    @property
    def raw(self) -> dict[str, Tensor]:
        """All there is of its pages, packed as it lies: [capacity, page_slots, width] each, views."""
        return {name: rows.view(self._capacity, self._page_slots, rows.shape[1]) for name, rows in self._stores.items()}

    def state(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """State and master of the values, to be changed in place, by the names of kernels: without the array's."""
        return {name: self._stores[f"{VALUES}.{name}"] for name in names}

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[M] slot ids, all of the table: which are here, [M] bool, and the arena rows of those."""
        arena_pages = self._page_table[ids >> self._page_shift].to(torch.int64)
        here = arena_pages >= 0
        return here, (arena_pages[here] << self._page_shift) | (ids[here] & (self._page_slots - 1))

    # Writing

    @contextmanager
    def writing(self, rows: Tensor | None = None, *, pages: Tensor | None = None) -> Iterator[None]:
        """The one door to an arena's bytes: whoever changes any does it within, and says where.

        What must know of writes hangs here, before the first byte is changed.

        Args:
            rows: [U] int64 arena rows, which may repeat; the same device.
            pages: [U] int64 arena pages, in place of rows.
        """
        touched = rows >> self._page_shift if rows is not None else pages
        assert touched is not None
        if self.cut is not None or self.capture is not None or self.kept is not None:
            changing = rows if rows is not None else self._rows_of(touched)
            for watcher in (self.cut, self.capture, self.kept):
                if watcher is not None:
                    watcher.save(changing)
        for memory in self._memory.values():
            if memory.shares:
                self._keep_for_forks(rows if rows is not None else self._rows_of(touched))
                break
        self._writes += 1
        self._written_at.index_fill_(0, touched, self._writes)
        yield

    def _keep_for_forks(self, rows: Tensor) -> None:
        numbers = rows.numpy()
        for memory in self._memory.values():
            memory.before_write(numbers)

    @property
    def writes(self) -> int:
        """How often the arena was written to."""
        return self._writes

    def written_since(self, writes: int) -> PageNumbers:
        """Arena pages that were written to since ``writes`` was that, ascending."""
        written: PageNumbers = (self._written_at > writes).nonzero()[:, 0].cpu().numpy()
        return written

    def same_pages(self) -> npt.NDArray[np.bool_]:
        """[row pages] bool: of a fork, those that are here and were not written to since, nor were those that it is a
        fork of: they are the same."""
        base = None if self.forked is None else self.forked[0]()
        here: npt.NDArray[np.bool_] = self.page_of >= 0
        if base is None or self.forked is None:
            return np.zeros_like(here)
        same: npt.NDArray[np.bool_] = here & (self.page_of == base.page_of)
        for arena in (self, base):
            written = (arena._written_at > self.forked[1]).cpu().numpy()
            same[here] &= ~written[self.page_of[here]]
        return same

    def _rows_of(self, pages: Tensor) -> Tensor:
        return ((pages[:, None] << self._page_shift) + torch.arange(self._page_slots, device=pages.device)).view(-1)

    def catch_up(self, rows: Tensor, schedule: kernels.DenseSchedule, names: tuple[str, ...]) -> Tensor:
        """Do the steps of a dense optimizer that these rows, which may repeat, have missed. names: ``step_names``.

        Returns:
            Which of them had missed any.
        """
        late = self._stores[LAST_STEP][rows].amin(dim=1) < schedule.last_step
        rows = torch.unique(rows[late])
        if rows.numel():
            with self.writing(rows):
                self.bring_up(self._stores, rows, schedule, names, to=schedule.last_step)
        return late

    def bring_up(
        self,
        stores: dict[str, Tensor],
        rows: Tensor,
        schedule: kernels.DenseSchedule,
        names: tuple[str, ...],
        *,
        to: int,
    ) -> None:
        """Do a dense optimizer's steps up to ``to`` on rows, which differ, of ``stores``: the arena's own, within
        ``writing``, or copies that lie as they do."""
        paged = kernels.Paged(stores[VALUES], self._page_table, self._page_shift, self._packed)
        state = {name: stores[f"{VALUES}.{name}"] for name in names}
        for leg in schedule.legs(int(stores[LAST_STEP][rows].min()), to) if schedule.stops else [to]:
            kernels.catch_up(paged, state, rows, schedule, to=leg, block_dim=self._block_dim)

    def copy_from(
        self, source: "Arena", *, blocks: Blocks, source_pages: PageNumbers, arena_pages: PageNumbers
    ) -> None:
        """Copy the columns of ``blocks`` from pages of another arena."""
        for piece in pieces(len(arena_pages), max(self.page_bytes, source.page_bytes)):
            taken, into = (torch.from_numpy(pages[piece]).to(self._device) for pages in (source_pages, arena_pages))
            with self.writing(pages=into):
                for array in self.arrays:
                    if not source.has(array.name):
                        continue
                    read, write = source.pages(array.name), self.pages(array.name)
                    for to, out_of in array.copies(blocks, into=self.blocks, out_of=source.blocks):
                        write[into, :, to] = read[taken, :, out_of]

    # Pages coming and going

    def growth_bytes(self, count: int) -> int:
        """Bytes that ``reserve`` of so many pages would add."""
        return (self._grown(count) - self._capacity) * self.page_bytes

    def reserve(self, count: int) -> None:
        """Have room for ``count`` more pages, before they are taken one batch after another.

        Raises:
            InvalidRequest: There is not so much memory. Nothing was changed.
        """
        capacity = self._grown(count)
        if capacity > self._capacity:
            added = np.arange(capacity - 1, self._capacity - 1, -1)
            self._resize(self._capacity, room=capacity)
            self._free = np.append(added, self._free)
            self._resize(capacity, room=capacity)

    def take(self, count: int) -> PageNumbers:
        """Take arena pages, ascending, with undefined contents; grows the arena where it has not enough.

        Raises:
            InvalidRequest: There is not so much memory. Nothing was changed.
        """
        self.reserve(count)
        kept = len(self._free) - count
        taken, self._free = self._free[kept:][::-1].copy(), self._free[:kept]
        return taken

    def give_back(self, arena_pages: PageNumbers) -> None:
        """Arena pages that are not published any more."""
        self._free = np.sort(np.append(self._free, arena_pages))[::-1]
        self._freed += len(arena_pages)

    def share(self, num_bytes: int) -> int:
        """Get ready to be forked, as ``Rows.share``: about so many bytes at a time; 0: it is."""
        for rows in self._memory.values():
            if moved := rows.share(num_bytes):
                return moved
        return 0

    def close(self) -> None:
        """Nobody asks for it any more; forks of it go on. A snapshot that has pages of it still to write does first.
        Repeatable."""
        self._over = True
        if self.cut is None:
            for rows in self._memory.values():
                rows.close()

    def end_cut(self) -> None:
        """The snapshot has what it wanted."""
        self.cut = None
        if self._over:
            self.close()

    def populate(self) -> None:
        """Have memory behind all pages there are: see ``Rows``."""
        for rows in self._memory.values():
            rows.populate()

    def publish(self, row_pages: PageNumbers, arena_pages: PageNumbers) -> None:
        """From now on these row pages are found at these arena pages."""
        self._set_page_table(row_pages, arena_pages)

    def withdraw(self, row_pages: PageNumbers) -> PageNumbers:
        """These row pages are not here any more. Returns the arena pages they had, still taken."""
        arena_pages = self.page_of[row_pages].astype(np.int64)
        self._set_page_table(row_pages, np.full(len(row_pages), -1, dtype=np.int64))
        return arena_pages

    def shrink(self) -> None:
        """Give memory back that holds no pages; changes where pages lie, not what they hold.

        Where that costs no copy of the whole, a little each time: whoever moves pages away, round after round, waits
        for as much as moves, and never for all that is left. Else all, where more than half is free.
        """
        if self.capture is not None or self.kept is not None:
            return  # a checkpoint knows rows by where they lie; its controller may not be the one that brings a view
        freed, self._freed = self._freed, 0
        if all(rows.grows_in_place for rows in self._memory.values()):
            if len(self._free) * _IDLE_PART <= self._capacity:
                return
            # Two for each that went, so that it catches up with those that were let be before.
            most = max(2 * freed, _SHRINK_BYTES // max(1, self.page_bytes), 1)
        elif len(self._free) * 2 > self._capacity:
            most = self._capacity
        else:
            return
        here = np.flatnonzero(self.page_of >= 0)
        if len(here) != self.num_taken:
            return  # pages on their way here are known to others by where they lie
        # Whatever lies from ``count`` on has to move: at most so many pages, to as many holes before it.
        count = self.num_taken
        if len(here) > most:
            count = max(count, int(np.partition(self.page_of[here], -most)[-most]))
        beyond = here[self.page_of[here] >= count]
        places = self.page_of[beyond].astype(np.int64)
        holes = np.sort(self._free)[: len(beyond)]
        for piece in pieces(len(holes), self.page_bytes):
            source, into = (torch.from_numpy(pages[piece].copy()).to(self._device) for pages in (places, holes))
            with self.writing(pages=into):
                for rows in self._stores.values():
                    pages = rows.view(self._capacity, self._page_slots, rows.shape[1])
                    pages[into] = pages[source]
        self.publish(beyond, holes)
        free = np.setdiff1d(np.append(self._free, places), holes)
        self._free = free[free < count][::-1].copy()
        if self.cut is not None:
            self.cut.save(self._rows_of(torch.arange(count, self._capacity, device=self._device)))
        self._resize(count, room=count)

    def _grown(self, count: int) -> int:
        """Pages there must be room for, so that ``count`` more can be taken."""
        lacking = count - len(self._free)
        if lacking <= 0:
            return self._capacity
        if all(rows.grows_in_place for rows in self._memory.values()):
            return self._capacity + lacking
        # Rows are copied where they grow: by at least a quarter keeps many small takes linear; the first is exact.
        return min(max(len(self.page_of), self._capacity + lacking), self._capacity + max(lacking, self._capacity // 4))

    def _resize(self, capacity: int, *, room: int) -> None:
        """Have ``capacity`` pages, in memory for ``room``."""
        self._paged.clear()
        for name, rows in self._memory.items():
            rows.resize(room * self._page_slots)
            # At once: the view before this one keeps a copy alive where rows do not grow in place.
            self._stores[name] = rows.first(capacity * self._page_slots)
        self._capacity = capacity

    def _set_page_table(self, row_pages: PageNumbers, arena_pages: PageNumbers) -> None:
        self.page_of[row_pages] = arena_pages
        if self._device.type != "cpu":  # there the page table is this array
            at, values = torch.from_numpy(row_pages.copy()), torch.from_numpy(arena_pages.astype(np.int32))
            self._page_table[at.to(self._device)] = values.to(self._device)


def pieces(num_pages: int, page_bytes: int) -> Iterator[slice]:
    """Cut a list of pages into pieces of about 16 MiB."""
    step = max(1, _COPY_BYTES // max(1, page_bytes))
    for start in range(0, num_pages, step):
        yield slice(start, min(start + step, num_pages))
