"""A table's pages as they were at one version, while training goes on: rows are copied before a first write to them.

A page is read out once, whole, as it was then; from then on its rows are copied no more. What is read where, and what
becomes of it, is for others. Of rows that a dense optimizer left behind the copies are brought up to that version; the
rows themselves stop there, too, on their way (``DenseSchedule.stop``), whether they were copied or not.
"""

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mempool.checkpoint.format.pages import PageArray, Pages
from mempool.errors import StorageFailed
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.masks import RowPages, cells
from mempool.shard.pages.memory import rows_on
from mempool.shard.pages.named_arrays import HEAD_KEYS, LAST_STEP, Blocks
from mempool.shard.pages.storage import Storage

_COPY_BYTES = 2**20
_PLACE_BYTES = 4
"""Of each row of an arena: where its copy lies."""


class RowCopies:
    """Rows of an arena as they are now: copied before a first write to them, until their page was read out.

    Args:
        arena: Theirs.
        left: [arena pages] int32, on its device: how often each page is to be read out; 0: it is not wanted.
        page_slots: Of the table.

    Attributes:
        failed: There was no memory for a copy: whoever wrote went on, and this is of no use.
    """

    def __init__(self, arena: Arena, left: Tensor, *, page_slots: int) -> None:
        self._arena = arena
        self._left = left
        self._page_slots = page_slots
        self._shift = page_slots.bit_length() - 1
        rows = len(left) * page_slots
        self._copy_of = torch.full((rows,), -1, dtype=torch.int32, device=left.device)
        self._free = torch.empty(0, dtype=torch.int64, device=left.device)
        self._capacity = 0
        self.failed: Exception | None = None
        self._memory = {
            name: rows_on(left.device, max_rows=max(1, rows), width=held.shape[1], dtype=held.dtype)
            for name, held in arena.stores.items()
        }
        self._copies = {name: memory.first(0) for name, memory in self._memory.items()}
        self._row_bytes = sum(held.shape[1] * held.element_size() for held in arena.stores.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies that are kept, and of where they lie."""
        return self._capacity * self._row_bytes + len(self._copy_of) * _PLACE_BYTES

    @property
    def used_bytes(self) -> int:
        """Bytes of the copies that are needed still."""
        return (self._capacity - len(self._free)) * self._row_bytes

    def save(self, rows: Tensor) -> None:
        """Arena rows [U], which may repeat, are about to be written to."""
        rows = rows[(self._left[rows >> self._shift] > 0) & (self._copy_of[rows] < 0)]
        if not rows.numel():
            return
        try:
            self._keep(self._distinct(rows))
        except Exception as error:  # no memory: the step that writes goes on
            self.failed = error
            self.end_copying()

    def end_copying(self) -> None:
        """Nothing is copied any more."""
        arena = self._arena
        if arena.capture is self:
            arena.capture = None
        if arena.cut is self:
            arena.end_cut()

    def _keep(self, rows: Tensor) -> Tensor:
        """Copy rows, which differ and were not copied yet; answers the places of the copies."""
        places = self._take(len(rows))
        at_once = max(1, _COPY_BYTES // self._row_bytes)
        for first in range(0, len(rows), at_once):  # each piece through memory that the caches hold
            some, to = rows[first : first + at_once], places[first : first + at_once]
            for name, held in self._arena.stores.items():
                self._copies[name][to] = held[some]
        self._copy_of[rows] = places.to(torch.int32)
        return places

    def _distinct(self, rows: Tensor) -> Tensor:
        """Rows that have no copy, each once: of those that are the same the one whose number stays."""
        numbers = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        self._copy_of[rows] = numbers
        return rows[self._copy_of[rows] == numbers]

    def _found(self, lies: Tensor) -> tuple[Tensor, Tensor]:
        """Where the copied rows of arena pages [M] are: their places [M, page_slots], -1 for none, and the mask."""
        places = self._copy_of.view(-1, self._page_slots)[lies].to(torch.int64)
        return places, places >= 0

    def _kept(self, store: str, found: tuple[Tensor, Tensor]) -> Tensor:
        """The copies that were found, of one of the arena's stores: [copied rows, width]."""
        places, copied = found
        return self._copies[store][places[copied]]

    def end(self, lies: Tensor, found: tuple[Tensor, Tensor], times: int) -> None:
        """These pages were read out so many times: what is not to be read any more needs no copies."""
        self._left[lies] -= times
        over = self._left[lies] <= 0
        places, copied = found
        gone = places[over][copied[over]]
        self._copy_of.view(-1, self._page_slots)[lies[over]] = -1
        if len(gone):
            self._free = torch.cat((self._free, gone))

    def _take(self, count: int) -> Tensor:
        if len(self._free) < count:
            grown = min(len(self._copy_of), self._capacity + max(count - len(self._free), self._capacity // 4))
            for name, memory in self._memory.items():
                memory.resize(grown)
                self._copies[name] = memory.first(grown)
            added = torch.arange(self._capacity, grown, device=self._free.device)
            self._free, self._capacity = torch.cat((added, self._free)), grown
        kept = len(self._free) - count
        taken, self._free = self._free[kept:], self._free[:kept]
        return taken


class ArenaCut(RowCopies):
    """The pages of one arena that a snapshot has still to write: all bytes of them, as they lie.

    Args:
        arena: Theirs.
        keys: Of those pages, by arena page.

    Attributes:
        arena: Theirs.
        writes: Its count of them, then.
    """

    def __init__(self, arena: Arena, keys: dict[int, bytes], *, page_slots: int) -> None:
        left = torch.zeros(len(arena.page_of), dtype=torch.int32)
        left[torch.tensor(list(keys), dtype=torch.int64)] = 1
        super().__init__(arena, left.to(arena.device), page_slots=page_slots)
        self.arena, self.writes = arena, arena.writes
        self._keys = keys
        arena.cut = self

    def take(self, num_bytes: int) -> list[tuple[bytes, list[tuple[str, Tensor]]]]:
        """Pages of about so many bytes: their keys, and of each array its bytes, on the CPU; none: there are no more.

        Raises:
            Exception: There was no memory for a copy.
        """
        if self.failed is not None:
            raise self.failed
        places = list(islice(self._keys, max(1, num_bytes // self._arena.page_bytes)))
        if not places:
            self.end_copying()
            return []
        lies = torch.tensor(places, dtype=torch.int64, device=self._left.device)
        found = self._found(lies)
        arrays = {name: self._read(name, stored, lies, found) for name, stored in self._arena.raw.items()}
        self.end(lies, found, 1)
        return [
            (self._keys.pop(place), [(name, pages[number]) for name, pages in arrays.items()])
            for number, place in enumerate(places)
        ]

    def _read(self, name: str, stored: Tensor, lies: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
        """[M, bytes of a page] uint8."""
        here = lies < len(stored)  # of those that the arena has given back all rows were copied
        pages = torch.empty((len(lies), *stored.shape[1:]), dtype=stored.dtype)
        pages[here.cpu()] = stored[lies[here]].cpu()
        if bool(found[1].any()):
            pages[found[1].cpu()] = self._kept(name, found).cpu()
        return pages.view(len(lies), -1).view(torch.uint8) if pages.numel() else torch.empty(len(lies), 0)


class ArenaCapture(RowCopies):
    """One arena's part of a capture.

    Args:
        arena: Its pages stay where they are until this is closed.
        pages_left: [row pages of the table] int: of how many blocks each page is to be read out; 0: it is not wanted.
        storage: Whose arena it is.
    """

    def __init__(self, arena: Arena, pages_left: RowPages, storage: Storage) -> None:
        self._storage = storage
        self._last_step = None if storage.schedule is None else storage.schedule.last_step
        capacity = arena.pages(next(iter(arena.stores))).shape[0] if arena.num_taken else 0
        here = np.flatnonzero((arena.page_of >= 0) & (pages_left > 0))
        left = torch.zeros(capacity, dtype=torch.int32)
        left[torch.from_numpy(arena.page_of[here].astype(np.int64))] = torch.from_numpy(
            pages_left[here].astype(np.int32)
        )
        super().__init__(arena, left.to(storage.device), page_slots=storage.schema.page_slots)

    def _keep(self, rows: Tensor) -> Tensor:
        """As they are at that version."""
        places = super()._keep(rows)
        schedule = self._storage.schedule
        if schedule is not None and self._last_step is not None:
            late = places[self._late(rows, self._last_step)]
            if late.numel():
                names = self._storage.step_names
                self._arena.bring_up(self._copies, late, schedule, names, to=self._last_step)
        return places

    def _late(self, rows: Tensor, step: int) -> Tensor:
        """Which of these arena rows a dense optimizer has left behind that step."""
        return self._arena.stores[LAST_STEP][rows].amin(dim=1) < step

    def begin(self, lies: Tensor) -> tuple[Tensor, Tensor]:
        """Where the copied rows of arena pages [M] are: their places [M, page_slots], -1 for none, and the mask."""
        if self._last_step is not None:
            rows = ((lies[:, None] << self._shift) | torch.arange(self._page_slots, device=lies.device)).view(-1)
            rows = rows[self._copy_of[rows] < 0]
            try:
                self._keep(rows[self._late(rows, self._last_step)])
            except Exception as error:
                self.failed = error
        return self._found(lies)

    def read(self, name: str, lies: Tensor, columns: slice, found: tuple[Tensor, Tensor], into: Tensor) -> None:
        """Write these columns of an array, as they were, into a view [M, page_slots, width], on the CPU."""
        pages, first, count = self._arena.pages(name), int(lies[0]), len(lies)
        side_by_side = bool((lies == torch.arange(first, first + count, device=lies.device)).all())
        into.copy_((pages[first : first + count] if side_by_side else pages[lies])[:, :, columns])
        places, copied = found
        if bool(copied.any()):
            kept = self._arena.view_of(name, self._copies)[places[copied]][:, columns]
            into[copied.cpu()] = kept.cpu()


class Capture:
    """The pages of one table on one shard as they are now.

    Args:
        storage: The table's; it has one capture at most.
        pages: Those that are to be read out, each once.

    Attributes:
        num_bytes, used_bytes: Of copies.
    """

    def __init__(self, storage: Storage, pages: Pages) -> None:
        self._storage = storage
        self._arenas: dict[Blocks, ArenaCapture] = {
            blocks: ArenaCapture(arena, pages.row_pages[:, list(blocks)].sum(axis=1), storage)
            for blocks, arena in storage.arenas.items()
        }
        for blocks, captured in self._arenas.items():  # once there was memory for all
            storage.arenas[blocks].capture = captured
        self._heads, self._head_keys = storage.heads, storage.head_keys
        storage.shared_head_keys = True

    @property
    def num_bytes(self) -> int:
        return sum(arena.num_bytes for arena in list(self._arenas.values()))

    @property
    def used_bytes(self) -> int:
        return sum(arena.used_bytes for arena in self._arenas.values())

    def export(self, rows: tuple[int, ...], blocks: Blocks, heads: tuple[int, ...]) -> dict[str, Tensor]:
        """All of these pages as a ``PageBatch`` has them, on the CPU; each page once.

        Raises:
            StorageFailed: There was no memory for copies.
        """
        self._check_memory()
        storage = self._storage
        arrays: dict[str, Tensor] = {}
        wanted = np.array(rows, dtype=np.int64)
        read = []
        for own, arena in storage.arenas.items():
            here = np.flatnonzero(arena.page_of[wanted] >= 0)
            shared = tuple(sorted(set(own).intersection(blocks)))
            if len(here) and shared:
                lies = torch.from_numpy(arena.page_of[wanted[here]].astype(np.int64)).to(storage.device)
                captured = self._arenas[own]
                at = slice(None) if len(here) == len(wanted) else torch.from_numpy(here)
                read.append((arena, captured, at, lies, shared, captured.begin(lies)))
        self._check_memory()
        for array in storage.arrays.values():
            width = array.width(blocks)
            if not width or not rows:
                continue
            out = torch.empty((len(rows), storage.schema.page_slots, width), dtype=array.dtype)
            for arena, captured, at, lies, shared, found in read:
                if arena.has(array.name):
                    for to, out_of in array.copies(shared, into=blocks, out_of=arena.blocks):
                        if isinstance(at, slice):
                            captured.read(array.name, lies, out_of, found, out[at, :, to])
                            continue
                        some = torch.empty((len(at), storage.schema.page_slots, to.stop - to.start), dtype=array.dtype)
                        captured.read(array.name, lies, out_of, found, some)
                        out[at, :, to] = some
            arrays[array.name] = out.view(len(rows) * storage.schema.page_slots, width)
        for _, captured, _, lies, shared, found in read:
            captured.end(lies, found, len(shared))
        if heads:
            arrays[HEAD_KEYS] = self._head_keys[[self._heads.index(head) for head in heads]].cpu()
        return arrays

    def _check_memory(self) -> None:
        for arena in self._arenas.values():
            if arena.failed is not None:
                raise StorageFailed(
                    f"shard {self._storage.shard} has no memory left to keep pages of table "
                    f"{self._storage.schema.name!r} as they were at the checkpoint's moment ({arena.failed}); "
                    "take it again while less is trained, or give shards more memory"
                )

    def close(self) -> None:
        """Copy no more, and give back what was copied. Repeatable."""
        for blocks, captured in self._arenas.items():
            arena = self._storage.arenas.get(blocks)
            if arena is not None and arena.capture is captured:
                arena.capture = None
        self._arenas.clear()
        self._head_keys = self._head_keys[:0]


def page_arrays(storage: Storage) -> tuple[PageArray, ...]:
    """The arrays of a table's pages, as files have them."""
    rows = [
        PageArray(
            name=array.name,
            per=array.per,
            dtype=str(array.dtype).removeprefix("torch."),
            width=array.width((0,)) if array.per == "slot" else 0,
        )
        for array in storage.arrays.values()
    ]
    if storage.schema.num_key_pages:
        rows.append(PageArray(name=HEAD_KEYS, per="head", dtype="float32"))
    return tuple(rows)


def pages_here(storage: Storage) -> Pages:
    """All that are here."""
    return Pages(storage.owned & ~storage.lost, storage.key_owned & ~storage.key_lost)


def mark(storage: Storage, checkpoint: str, marks: "Marks") -> None:
    """From now on it is known what changes after these marks, as ``checkpoint``."""
    for blocks, arena in storage.arenas.items():
        if blocks in marks.writes:
            arena.mark = (checkpoint, marks.writes[blocks])
    storage.keys_mark = (checkpoint, marks.head_keys)


class Marks:
    """Where the arenas' counts of writes are now."""

    def __init__(self, storage: Storage) -> None:
        self.writes = {blocks: arena.writes for blocks, arena in storage.arenas.items()}
        self.head_keys = storage.head_key_writes


def changed_since(storage: Storage, checkpoint: str) -> Pages | None:
    """Pages that may have changed since that checkpoint; None: it is not known, or all have.

    A dense optimizer changes every page with each step, whether it was written to yet or not.
    """
    marked = [arena for arena in storage.arenas.values() if arena.mark is not None and arena.mark[0] == checkpoint]
    if not checkpoint or not marked or storage.schedule is not None:
        return None
    pages = pages_here(storage)
    rows = pages.row_pages.copy()
    for blocks, arena in storage.arenas.items():
        if arena.mark is None or arena.mark[0] != checkpoint:
            continue
        here = np.flatnonzero(arena.page_of >= 0)
        written = np.isin(arena.page_of[here], arena.written_since(arena.mark[1]))
        unchanged = here[~written]
        rows[cells(unchanged, blocks)] = False
    known = storage.keys_mark == (checkpoint, storage.head_key_writes)
    keys = np.zeros_like(pages.key_pages) if known else pages.key_pages
    return Pages(rows, keys)
