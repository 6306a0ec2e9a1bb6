"""Rows of one arena as they were at several moments: copied before the first write to them after each.

A copy that is made after a moment serves it and all moments before that have none of their own. So a write costs one
copy, however many moments are kept, and a row that is read at a moment is the first copy from there on, or the row
itself. When a moment is forgotten the one before it takes over what it needs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mempool.shard.pages.arena import Arena
from mempool.shard.pages.memory import rows_on
from mempool.shard.pages.named_arrays import KEYS, VALUES
from mempool.shard.reading.keeper import Keeper

_COPY_BYTES = 2**20
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
        numbers = torch.arange(len(rows), dtype=torch.int32, device=self._device)
        copy_of[rows] = numbers
        rows = rows[copy_of[rows] == numbers]  # each once
        places = self._take(len(rows))
        at_once = max(1, _COPY_BYTES // self._row_bytes)
        for first in range(0, len(rows), at_once):  # each piece through memory that the caches hold
            some, to = rows[first : first + at_once], places[first : first + at_once]
            for name, held in self._of_arena().items():
                self._copies[name][to] = held[some]
        copy_of[rows] = places.to(torch.int32)

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

    def _take(self, count: int) -> Tensor:
        lacking = count - len(self._free)
        if lacking > 0:
            in_place = all(memory.grows_in_place for memory in self._memory.values())
            more = lacking if in_place else max(lacking, self._capacity // 4)  # copied where they grow
            self._resize(max(self._capacity + lacking, min(self._most(), self._capacity + more)))
        kept = len(self._free) - count
        taken, self._free = self._free[kept:], self._free[:kept]
        return taken

    def _give_back(self, places: Tensor) -> None:
        self._free = torch.cat((self._free, places.to(torch.int64)))

    def _resize(self, capacity: int) -> None:
        for name, memory in self._memory.items():
            memory.resize(capacity)
            self._copies[name] = memory.first(capacity)
        if capacity > self._capacity:
            added = torch.arange(self._capacity, capacity, device=self._device)
            self._free = torch.cat((added, self._free))
        else:
            self._free = self._free[:0]
        self._capacity = capacity
