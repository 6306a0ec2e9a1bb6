"""Lookup contexts: the ids and weights of lookups whose gradients may still come.

Bounded by bytes and by a lease; what is gone is asked for again by ``ContextMissing``, so losing one costs bytes only.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from mempool.shard.steps.budget import ENTRY_BYTES, tensors_bytes
from mempool.types.bags import Bags


@dataclass(frozen=True, slots=True)
class _Context:
    table_id: int
    epoch: int
    bags: Bags
    num_bytes: int
    expires_s: float


def context_bytes(bags: Bags) -> int:
    """What it costs to remember these."""
    return ENTRY_BYTES + tensors_bytes((bags.ids, bags.weights, bags.offsets))


def joined(several: Sequence[Bags]) -> Bags | None:
    """Bags one after the other, copied. None where some have weights and some have not."""
    weights = [bags.weights for bags in several if bags.weights is not None]
    if weights and len(weights) < len(several):
        return None
    starts = accumulate((bags.num_pairs for bags in several), initial=0)
    ends = [bags.offsets[1:] + start for bags, start in zip(several, starts, strict=False)]
    return Bags(
        ids=torch.cat([bags.ids for bags in several]),
        weights=torch.cat(weights) if weights else None,
        offsets=torch.cat([several[0].offsets[:1], *ends]),
    )


class Contexts:
    """Contexts of all tables of a shard, by lookup id. Not thread-safe: of whoever has the engine.

    Args:
        room: Bytes that may be remembered, asked for whenever more is: the oldest are then forgotten, and one that is
            larger than all of it is never remembered.
        lease_s: A context older than this is forgotten.
        clock: Seconds, monotonic; replaced in tests.
    """

    def __init__(self, *, room: Callable[[], int], lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_bytes = 0
        self._room = room
        self._lease_s = lease_s
        self._clock = clock
        self._contexts: OrderedDict[int, _Context] = OrderedDict()

    def __len__(self) -> int:
        return len(self._contexts)

    def remember(self, lookup_id: int, *, table_id: int, epoch: int, bags: Bags) -> None:
        """Keep ``bags``, whose tensors nobody else may write to. A repeated lookup replaces the earlier one."""
        self._forget(lookup_id)
        self.expire()
        num_bytes, room = context_bytes(bags), self._room()
        if num_bytes > room:
            return
        self._forget_beyond(room - num_bytes)
        self._contexts[lookup_id] = _Context(table_id, epoch, bags, num_bytes, self._clock() + self._lease_s)
        self.num_bytes += num_bytes

    def recall(
        self,
        lookup_id: int,
        lookups: int = 1,
        *,
        table_id: int,
        epoch: int,
        reserve: Callable[[int], None] = lambda _: None,
    ) -> Bags | None:
        """The bags of lookups of that table and epoch, one after the other; None if one is not remembered.

        Another epoch is another routing of pairs to shards: ids of an older one would not fit the client's gradients.
        ``reserve`` is told the bytes of those that are copied into one, and may refuse.
        """
        self.expire()
        found: list[Bags] = []
        for number in range(lookup_id, lookup_id + max(1, lookups)):
            context = self._contexts.get(number)
            if context is None or context.table_id != table_id or context.epoch != epoch:
                return None
            found.append(context.bags)
        if len(found) == 1:
            return found[0]
        reserve(sum(bags.num_bytes for bags in found))
        return joined(found)

    def release(self, lookup_ids: Iterable[int]) -> None:
        """Forget these; unknown ones are no error."""
        for lookup_id in lookup_ids:
            self._forget(lookup_id)

    def drop_table(self, table_id: int) -> None:
        """Forget all of one table."""
        self.release([key for key, context in self._contexts.items() if context.table_id == table_id])

    def recount(self) -> None:
        """Whoever remembered something was cut off."""
        self.num_bytes = sum(context.num_bytes for context in self._contexts.values())

    def give_way(self) -> None:
        """Forget the oldest where others have taken the room."""
        self._forget_beyond(self._room())

    def expire(self) -> None:
        """Forget those whose lease is over. The order of insertion is the order of expiry, as all leases are equal."""
        now_s = self._clock()
        while self._contexts:
            lookup_id, context = next(iter(self._contexts.items()))
            if context.expires_s > now_s:
                return
            self._forget(lookup_id)

    def _forget_beyond(self, num_bytes: int) -> None:
        while self._contexts and self.num_bytes > num_bytes:
            self._forget(next(iter(self._contexts)))

    def _forget(self, lookup_id: int) -> None:
        context = self._contexts.pop(lookup_id, None)
        if context is not None:
            self.num_bytes -= context.num_bytes
