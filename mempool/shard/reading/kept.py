"""Rows of one arena as they were at several moments: copied before the first write to them after each.

A copy that is made after a moment serves it and all moments before that have none of their own. So a write costs one
copy, however many moments are kept, and a row that is read at a moment is the first copy from there on, or the row
itself. When a moment is forgotten the one before it takes over what it needs.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool.shard.pages.arena import Arena
from mempool.shard.pages.memory import rows_on
from mempool.shard.pages.named_arrays import KEYS, VALUES
from mempool.shard.reading.keeper import Keeper

_GROW_BYTES, _GROW_PART = 8 * 2**20, 16
"""Memory is taken by so much at once, but for no more than a sixteenth of what there may be: of four large pages."""
_PLACE_BYTES = 4
"""Of each row of an arena and each moment in which any was copied: where the copy lies."""


class KeptRows:
    """The rows of one arena at the moments that are kept. It watches the arena while there are any.

    Args:
        arena: Its pages stay where they are.
        whole: Keep all arrays, as rows that a dense optimizer has left behind need them; else what readers read.
        keeper: Says how much may be kept.
        on_failure: Told why nothing can be kept any more: the moments are to be forgotten.
    """

    def __init__(self, arena: Arena, *, whole: bool, keeper: Keeper, on_failure: Callable[[Exception], None]) -> None:
        self._arena = arena
        self._keeper = keeper
        self._on_failure = on_failure
        self._num_rows = arena.stores[VALUES].shape[0]
        self._names = tuple(name for name in arena.stores if whole or name in (VALUES, KEYS))
        self._row_bytes = sum(held.shape[1] * held.element_size() for held in self._of_arena().values())
        self._copy_of: dict[int, Tensor | None] = {}  # by moment, ascending: [rows] int32, -1: none
        self._device = arena.device
        self._memory = {
            name: rows_on(self._device, max_rows=self._most(), width=held.shape[1], dtype=held.dtype)
            for name, held in self._of_arena().items()
        }
        self._copies = {name: memory.first(0) for name, memory in self._memory.items()}
        self._free = torch.empty(0, dtype=torch.int64, device=self._device)
        self._capacity = 0

    def _of_arena(self) -> dict[str, Tensor]:
        return {name: self._arena.stores[name] for name in self._names}

    def _most(self) -> int:
        """Copies there can be."""
        return max(1, self._keeper.limit_bytes // max(1, self._row_bytes))

    @property
    def num_bytes(self) -> int:
        """Bytes of copies, and of where they lie."""
        places = sum(_PLACE_BYTES * self._num_rows for copy_of in list(self._copy_of.values()) if copy_of is not None)
        return self._capacity * self._row_bytes + places

    @property
    def row_bytes(self) -> int:
        """Bytes of what is kept of a row."""
        return self._row_bytes

    def open(self, moment: int) -> None:
        """From now on rows are as they are at that moment, later than all before. No memory is taken yet."""
        self._copy_of[moment] = None
        self._arena.kept = self

    def forget(self, moment: int) -> None:
        """Nobody reads at that moment any more; unknown ones are no error."""
        numbers = list(self._copy_of)
        if moment not in self._copy_of:
            return
        at = numbers.index(moment)
        copy_of = self._copy_of.pop(moment)
        if copy_of is not None:
            before = numbers[at - 1] if at else None
            if before is None:
                self._give_back(copy_of[copy_of >= 0])
            elif (earlier := self._copy_of[before]) is None:
                self._copy_of[before] = copy_of
            else:
                over = copy_of[(copy_of >= 0) & (earlier >= 0)]
                self._copy_of[before] = torch.where(earlier < 0, copy_of, earlier)
                self._give_back(over)
        if not self._copy_of and self._arena.kept is self:
            self._arena.kept = None
        if len(self._free) == self._capacity:
            self._resize(0)

    def save(self, rows: Tensor) -> None:
        """Arena rows [U], which may repeat, are about to be written to. Where there is no room for copies of them pins
        are let go; whoever writes goes on."""
        if rows.numel() and int(rows.max()) >= self._num_rows:  # of pages on their way here
            rows = rows[rows < self._num_rows]
        while (found := self._lacking(rows)) is not None:
            newest, lacking = found
            num_bytes = max(0, lacking.numel() - len(self._free)) * self._row_bytes
            num_bytes += 0 if self._copy_of[newest] is not None else _PLACE_BYTES * self._num_rows
            if self._keeper.makes_room(num_bytes):
                try:
                    self._keep(newest, lacking)
                except Exception as error:  # no memory: the step that writes goes on
                    self._on_failure(error)
                return

    def _lacking(self, rows: Tensor) -> tuple[int, Tensor] | None:
        """The newest moment, and those of these rows that have no copy since; None: none have to be kept."""
        if not self._copy_of:
            return None
        newest = next(reversed(self._copy_of))
        copy_of = self._copy_of[newest]
        if copy_of is not None:
            rows = rows[copy_of[rows] < 0]
        return (newest, rows) if rows.numel() else None

    def _keep(self, moment: int, rows: Tensor) -> None:
        copy_of = self._copy_of[moment]
        if copy_of is None:
            copy_of = torch.full((self._num_rows,), -1, dtype=torch.int32, device=self._device)
            self._copy_of[moment] = copy_of
        rows = self._distinct(copy_of, rows)
        places = self._take(len(rows))
        for name, held in self._of_arena().items():
            copies = self._copies[name]
            if isinstance(places, slice):
                torch.index_select(held, 0, rows, out=copies[places])
            else:
                copies.index_copy_(0, places, held.index_select(0, rows))
        if isinstance(places, slice):
            places = torch.arange(places.start, places.stop, dtype=torch.int32, device=self._device)
        copy_of.index_copy_(0, rows, places.to(torch.int32))

    def _distinct(self, copy_of: Tensor, rows: Tensor) -> Tensor:
        """Rows that have no copy, each once: of those that are the same the one whose number stays."""
        if bool((rows[1:] > rows[:-1]).all()):  # as a step's are
            return rows
        numbers = torch.arange(len(rows), dtype=torch.int32, device=self._device)
        copy_of[rows] = numbers
        return rows[copy_of[rows] == numbers]

    def any_copied(self, moment: int) -> bool:
        """Whether any row may be another one now than it was at that moment."""
        return any(copy_of is not None for number, copy_of in self._copy_of.items() if number >= moment)

    def find(self, moment: int, rows: Tensor) -> Tensor:
        """[M] int64: where the copies of these arena rows [M] at that moment are; -1: they are as they were."""
        places = torch.full(rows.shape, -1, dtype=torch.int32, device=rows.device)
        for number, copy_of in self._copy_of.items():
            if number >= moment and copy_of is not None:
                places = torch.where(places < 0, copy_of[rows], places)
        return places.to(torch.int64)

    def read(self, rows: Tensor, places: Tensor) -> dict[str, Tensor]:
        """What is kept of these rows [M], by store: new memory, [M, width] each. places: As of ``find``."""
        copied = (places >= 0).nonzero()[:, 0]
        read = {}
        for name, held in self._of_arena().items():
            found = held[rows]
            found[copied] = self._copies[name][places[copied]]
            read[name] = found
        return read

    def values_at(self, moment: int, rows: npt.NDArray[np.int64]) -> Tensor | None:
        """The values of these arena rows [M] at that moment, on the CPU: new memory [M, width], as they are stored;
        None where all are as they were. As ``find`` and ``read``: of a few rows, tensors take longer than copies."""
        places: npt.NDArray[np.int32] | None = None
        for number, copy_of in self._copy_of.items():
            if number >= moment and copy_of is not None:
                found = copy_of.numpy()[rows]
                places = found if places is None else np.where(places < 0, found, places)
        if places is None or places.max() < 0:
            return None
        copies, copied = self._copies[VALUES], np.flatnonzero(places >= 0)
        if len(copied) == len(rows):
            return copies.index_select(0, torch.from_numpy(places))
        values = self._arena.stores[VALUES].index_select(0, torch.from_numpy(rows))
        then = copies.index_select(0, torch.from_numpy(places[copied]))
        return values.index_copy_(0, torch.from_numpy(copied), then)

    def _take(self, count: int) -> "Tensor | slice":
        """Places for so many copies: side by side where none were given back."""
        lacking = count - len(self._free)
        if lacking > 0:
            self._resize(self._grown(lacking))
        taken, self._free = self._free[:count], self._free[count:]
        first = int(taken[0]) if count else 0
        together = bool((taken[1:] - taken[:-1] == 1).all())
        return slice(first, first + count) if together else taken

    def _grown(self, lacking: int) -> int:
        """Copies there is to be memory for: by many at once, where there is room, so that the system gives large pages
        of it, and memory that is copied where it grows is so now and then."""
        grown, room = self._capacity + lacking, self._keeper.room_bytes
        spare = room - self._keeper.num_bytes - lacking * self._row_bytes
        more = min(_GROW_BYTES, room // _GROW_PART, spare) // self._row_bytes
        step = 1 << (max(1, more).bit_length() - 1)
        return max(grown, min(self._most(), -(-grown // step) * step))

    def _give_back(self, places: Tensor) -> None:
        self._free = torch.cat((self._free, places.to(torch.int64)))

    def _resize(self, capacity: int) -> None:
        for name, memory in self._memory.items():
            memory.resize(capacity)
            self._copies[name] = memory.first(capacity)
        if capacity > self._capacity:
            added = torch.arange(self._capacity, capacity, device=self._device)
            self._free = torch.cat((self._free, added))
        else:
            self._free = self._free[:0]
        self._capacity = capacity
