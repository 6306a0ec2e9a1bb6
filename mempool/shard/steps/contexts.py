"""Lookup contexts: the ids and weights of lookups whose gradients may still come.

Bounded by bytes and by a lease; what is gone is asked for again by ``ContextMissing``, so losing one costs bytes only.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mempool.types.bags import Bags


@dataclass(frozen=True, slots=True)
class _Context:
    table_id: int
    epoch: int
    bags: Bags
    expires_s: float


class Contexts:
    """Contexts of all tables of a shard, by lookup id. Not thread-safe: used by the engine's thread only.

    Args:
        budget_bytes: When more is remembered, the oldest are forgotten; one larger than the budget is never remembered.
        lease_s: A context older than this is forgotten.
        clock: Seconds, monotonic; replaced in tests.
    """

    def __init__(self, *, budget_bytes: int, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_bytes = 0
        self._budget_bytes = budget_bytes
        self._lease_s = lease_s
        self._clock = clock
        self._contexts: OrderedDict[int, _Context] = OrderedDict()

    def __len__(self) -> int:
        return len(self._contexts)

    def remember(self, lookup_id: int, *, table_id: int, epoch: int, bags: Bags) -> None:
        """Keep ``bags``, whose tensors nobody else may write to. A repeated lookup replaces the earlier one."""
        self._forget(lookup_id)
        now = self._clock()
        self.expire(now)
        if bags.num_bytes > self._budget_bytes:
            return
        while self.num_bytes + bags.num_bytes > self._budget_bytes:
            self._forget(next(iter(self._contexts)))
        self._contexts[lookup_id] = _Context(table_id, epoch, bags, now + self._lease_s)
        self.num_bytes += bags.num_bytes

    def recall(self, lookup_id: int, *, table_id: int, epoch: int) -> Bags | None:
        """The bags of a lookup of that table and epoch; None if they are not remembered.

        Another epoch is another routing of pairs to shards: ids of an older one would not fit the client's gradients.
        """
        self.expire(self._clock())
        context = self._contexts.get(lookup_id)
        if context is None or context.table_id != table_id or context.epoch != epoch:
            return None
        return context.bags

    def release(self, lookup_ids: Iterable[int]) -> None:
        """Forget these; unknown ones are no error."""
        for lookup_id in lookup_ids:
            self._forget(lookup_id)

    def drop_table(self, table_id: int) -> None:
        """Forget all of one table."""
        self.release([key for key, context in self._contexts.items() if context.table_id == table_id])

    def expire(self, now_s: float) -> None:
        """Forget those whose lease is over. The order of insertion is the order of expiry, as all leases are equal."""
        while self._contexts:
            lookup_id, context = next(iter(self._contexts.items()))
            if context.expires_s > now_s:
                return
            self._forget(lookup_id)

    def _forget(self, lookup_id: int) -> None:
        context = self._contexts.pop(lookup_id, None)
        if context is not None:
            self.num_bytes -= context.bags.num_bytes
