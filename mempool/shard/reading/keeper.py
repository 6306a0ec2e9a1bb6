"""What pinned versions may take of a shard's memory, all tables together: the oldest pin gives way first."""

from collections.abc import Callable
from itertools import count
from typing import Protocol
from weakref import WeakSet

from mempool.agreement.readers.pins import Pin

UNLIMITED_SHARD_BYTES = 2**30
"""What they may take on a shard whose pages have no limit."""
PART = 8
"""Else, where nothing is said, one part in so many of what pages may have."""


class Pinned(Protocol):
    """The pinned moments of one table."""

    @property
    def num_bytes(self) -> int:
        """That they take."""

    @property
    def oldest(self) -> Pin | None:
        """The pin that was taken first."""

    def let_go(self, token: str, why: str) -> None:
        """End a pin, and give back what it alone needs."""


class Keeper:
    """The pinned versions of one shard.

    Args:
        limit_bytes: What they may take; None: a part of what pages may have.

    Attributes:
        page_bytes: What pages may have; None: as much as there is.
        taken_bytes: Answers what pages take. Pinned versions have what is left of ``page_bytes``, at most.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self.page_bytes: int | None = None
        self.taken_bytes: Callable[[], int] = int
        self._serials = count(1)
        self._tables: WeakSet[Pinned] = WeakSet()

    def add(self, table: Pinned) -> None:
        """A table whose versions may be pinned."""
        self._tables.add(table)

    def next_serial(self) -> int:
        """Of a pin that is taken now."""
        return next(self._serials)

    @property
    def num_bytes(self) -> int:
        """That pinned versions take; any thread may ask."""
        return sum(table.num_bytes for table in list(self._tables))

    @property
    def limit_bytes(self) -> int:
        """What they may take, where pages leave it."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        return UNLIMITED_SHARD_BYTES if self.page_bytes is None else self.page_bytes // PART

    @property
    def room_bytes(self) -> int:
        """What they may take now."""
        if self.page_bytes is None:
            return self.limit_bytes
        return min(self.limit_bytes, max(0, self.page_bytes - self.taken_bytes()))

    def makes_room(self, num_bytes: int) -> bool:
        """Whether so many bytes more fit. Where they do not, the oldest pin is let go: ask again, as what is needed may
        be less now."""
        if self.num_bytes + num_bytes <= (room := self.room_bytes):
            return True
        self._let_oldest_go(room)
        return False

    def give_way(self, page_bytes: int) -> None:
        """So many bytes of pages are to come: pinned versions take no room that they need."""
        while (taken := self.num_bytes) and self.page_bytes is not None:
            if taken <= self.page_bytes - self.taken_bytes() - page_bytes or not self._let_oldest_go(self.room_bytes):
                return

    def _let_oldest_go(self, room: int) -> bool:
        pinned = [(pin.serial, table, pin) for table in self._tables if (pin := table.oldest) is not None]
        if not pinned:
            return False
        _, table, pin = min(pinned, key=lambda each: each[0])
        table.let_go(
            pin.token,
            f"pinned versions may take {room:,} bytes of this shard's memory, and needed more as training went on; the "
            "oldest goes first. Give them more (shard.version_memory, or more memory), or read in less time",
        )
        return True
