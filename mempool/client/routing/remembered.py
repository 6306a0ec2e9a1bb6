"""Which lookups shards remember for this client, and which of them they may forget: what gathers tell them.

Finalizers say which, on any thread and at any moment, so they take no lock; all else may be called by any thread.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable

from mempool.client.routing.attempt import LookupRecord

_MAX_RELEASED = 65_536
_MAX_RELEASED_PER_GATHER = 1_024


class Remembered:
    """The remembered lookups of one client on all tables of a pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[int, int], int] = {}  # by table and shard
        # Appending to a deque needs no lock. As long as the graphs that were alive at once.
        self._released: deque[tuple[int, tuple[int, ...], int]] = deque()
        self._to_release: dict[tuple[int, int], deque[int]] = {}

    def add(self, record: LookupRecord) -> None:
        """Shards were asked to remember a lookup."""
        with self._lock:
            for shard, _ in record.remembered_by:
                at = record.table_id, shard
                self._counts[at] = self._counts.get(at, 0) + record.lookups

    def release(self, record: LookupRecord) -> Callable[[], None]:
        """A function that lets shards forget a lookup, with the next gather; for any thread, at any moment."""
        shards = tuple(shard for shard, _ in record.remembered_by)
        numbers = range(record.lookup_id, record.lookup_id + record.lookups)
        entries = [(record.table_id, shards, number) for number in numbers]
        released = self._released  # the function keeps neither the router nor the record alive
        return lambda: released.extend(entries)

    def take(self, table_id: int, shard: int) -> tuple[int, ...]:
        """Lookups that a shard may forget, each once."""
        if not (self._released or self._to_release):
            return ()
        with self._lock:
            self._sort_released()
            mine = self._to_release.get((table_id, shard))
            if not mine:
                return ()
            return tuple(mine.popleft() for _ in range(min(len(mine), _MAX_RELEASED_PER_GATHER)))

    def give_back(self, table_id: int, shard: int, lookup_ids: tuple[int, ...]) -> None:
        """The shard was not told of these."""
        if lookup_ids:
            with self._lock:
                self._to_release.setdefault((table_id, shard), deque(maxlen=_MAX_RELEASED)).extend(lookup_ids)

    def shards(self) -> dict[int, set[int]]:
        """Shards that remember anything, by table."""
        found: dict[int, set[int]] = {}
        with self._lock:
            self._sort_released()
            for table_id, shard in self._counts:
                found.setdefault(table_id, set()).add(shard)
        return found

    def left(self, table_id: int, shards: Iterable[int]) -> None:
        """Shards that own nothing of the table any more: they forgot all with its pages."""
        with self._lock:
            for shard in shards:
                self._counts.pop((table_id, shard), None)
                self._to_release.pop((table_id, shard), None)

    def forget(self, table_id: int) -> None:
        """The table was dropped."""
        with self._lock:
            known = [shard for table, shard in (*self._counts, *self._to_release) if table == table_id]
        self.left(table_id, known)

    def waiting(self) -> Collection[tuple[int, int]]:
        """(table, shard) that are still to be told of anything."""
        return self._to_release.keys()

    def _sort_released(self) -> None:
        while self._released:
            table_id, shards, lookup_id = self._released.popleft()
            for shard in shards:
                at = table_id, shard
                count = self._counts.pop(at, 0)
                if not count:
                    continue  # it has left the table, and forgot the lookup with its pages
                if count > 1:
                    self._counts[at] = count - 1
                self._to_release.setdefault(at, deque(maxlen=_MAX_RELEASED)).append(lookup_id)
