"""A step's pairs in canonical order, found once for all shards of a process that hold the same bags.

Column shards are sent the same ids and weights, and each the columns of the gradient that are its own: what does not
depend on these is the same for all of them.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mempool import kernels
from mempool.kernels import SortedPairs
from mempool.shard.pages.arena import Arena
from mempool.shard.steps.held import HeldUpdate, Pairs
from mempool.types.bags import Bags

_MADE = "canonical order"
_FINDING = threading.Lock()


class Canonical:
    """The pairs of several bags one after the other: (sequence, bag, pair). Any thread may use it.

    It is known to the first of these bags for as long as somebody has it, and counts at each shard that keeps it.
    """

    __slots__ = ("__weakref__", "_lock", "_numbers", "_of_one", "_several", "_sorted", "ids", "weights")

    def __init__(self, several: tuple[Bags, ...]) -> None:
        self._several = several
        self._lock = threading.Lock()  # what one shard makes of them, others wait for
        self._numbers: Tensor | None = None
        self._sorted: SortedPairs | None = None
        self._of_one = True  # so far: that all pairs are in the arena that was asked for first
        self.ids, self.weights = several[0].ids, several[0].weights

    @classmethod
    def of(cls, updates: Sequence[HeldUpdate]) -> "Canonical":
        """Of a rank's updates, which come by sequence; at least one."""
        several = tuple(update.bags for update in updates)
        made = several[0].made
        with _FINDING:
            known: Canonical | None = made[_MADE]() if _MADE in made else None
            if known is None or not known.is_of(several):
                known = cls(several)
                made[_MADE] = weakref.ref(known)
        return known

    def is_of(self, several: Sequence[Bags]) -> bool:
        """Whether it is that of these very bags."""
        return len(several) == len(self._several) and all(
            one is other for one, other in zip(several, self._several, strict=True)
        )

    def pairs(self, grads: Sequence[Tensor]) -> Pairs:
        """They, with the gradients [B, W] of their bags."""
        with self._lock:
            numbers = self._joined()
        return Pairs(self.ids, self.weights, numbers, grads[0] if len(grads) == 1 else torch.cat(list(grads)))

    def in_order(self, arena: Arena) -> SortedPairs:
        """Those whose slots are in an arena, by slot: as ``kernels.sort_pairs``."""
        with self._lock:
            self._joined()
            if self._sorted is None and self._of_one:
                found = kernels.sort_pairs(arena.paged(), self.ids)
                self._of_one = found.order.shape[0] == self.ids.shape[0]
                self._sorted = found if self._of_one else None
                return found
            known = self._sorted
        if known is not None:
            # Where rows lie is each arena's own, and changes: it is asked for each time.
            here, rows = arena.locate(known.slots)
            if rows.shape[0] == here.shape[0]:
                return replace(known, rows=rows)
        return kernels.sort_pairs(arena.paged(), self.ids)

    def _joined(self) -> Tensor:
        """The bag of each pair, [L] int64. Under the lock."""
        if self._numbers is None:
            several, device = self._several, self.ids.device
            numbers, first = [], 0
            for bags in several:
                counted = torch.arange(first, first + bags.num_bags, device=device)
                numbers.append(torch.repeat_interleave(counted, bags.offsets.diff()))
                first += bags.num_bags
            if len(several) > 1:
                self.ids = torch.cat([bags.ids for bags in several])
                if any(bags.weights is not None for bags in several):
                    self.weights = torch.cat([_weights(bags) for bags in several])
            self._numbers = numbers[0] if len(several) == 1 else torch.cat(numbers)
        return self._numbers


def _weights(bags: Bags) -> Tensor:
    ones = torch.ones(bags.ids.shape[0], dtype=torch.float32, device=bags.ids.device)
    return ones if bags.weights is None else bags.weights
