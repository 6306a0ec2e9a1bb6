"""What clients may make a shard hold: bytes by kind and by owner, and each owner's fair share. Decides, holds nothing.

Counts are of what a thing costs, Python's objects and names included; a test compares them with resident memory.
"""

import sys
from collections.abc import Iterable
from heapq import nlargest
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from mempool.errors import MempoolError, Overloaded, RequestTooLarge
from mempool.shard.reading.keeper import Keeper

if TYPE_CHECKING:
    from mempool.shard.steps.held import HeldUpdates

MIB = 2**20

TENSOR_BYTES = 640
"""A tensor besides its numbers: Python's object, torch's two, an allocation's padding."""
ENTRY_BYTES = 512
"""An entry of a dict, with its key and the object that holds the tensors."""

_SHARE = 7
"""One owner may hold so many times what would still be free: 7/8 of the room alone, 7/15 beside another like it. So
there is always room left for one more owner."""
_RETRY_AFTER_S = 0.25


def tensors_bytes(tensors: Iterable[Tensor | None]) -> int:
    """What these cost, objects included."""
    return sum(tensor.nbytes + TENSOR_BYTES for tensor in tensors if tensor is not None)


def numbers_bytes(count: int) -> int:
    """What a tuple of so many whole numbers costs."""
    return 56 + 56 * count


def text_bytes(text: str) -> int:
    """What a string costs."""
    return sys.getsizeof(text)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, of the device or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


class Budget:
    """Bytes held on a shard, over all tables, and those that preparing and committing steps may take besides.

    Held updates, calls that wait or are answered, and remembered lookups share ``limit_bytes``. Lookups give way to
    the others: what is forgotten of them is sent again.

    Args:
        limit_bytes: Of all these together.
        context_bytes: Of remembered lookups, at most; None: half of the limit.
        commit_bytes: What preparing and committing steps may take besides, with the sums they keep in between.
        version_bytes: What versions that are read may take, beside all these; None: a part of what pages may have.
        configured: The limits come from a config file, whose keys messages name; an embedded pool has none.

    Attributes:
        held_bytes: Of held updates and of what is known of their ranks.
        queued_bytes: Of calls that wait or are answered.
        kept_bytes: Of sums that prepared steps keep for their commit, part of ``commit_bytes``.
        holders: Those who hold updates; gone with their tables.
        keeper: Of versions that are read.
        recovers: What an earlier life has admitted is held again: nothing is refused.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        context_bytes: int | None = None,
        commit_bytes: int = 256 * MIB,
        configured: bool = True,
        version_bytes: int | None = None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.configured = configured
        self.commit_bytes = commit_bytes
        self.held_bytes = 0
        self.queued_bytes = 0
        self.kept_bytes = 0
        self.recovers = False
        self.keeper = Keeper(version_bytes)
        self._context_bytes = limit_bytes // 2 if context_bytes is None else context_bytes
        self.holders: WeakSet[HeldUpdates] = WeakSet()
        self._owners: dict[str, int] = {}

    @property
    def limit_name(self) -> str:
        """What the limit is called where it was set, to follow the number."""
        return " (shard.client_memory)" if self.configured else ""

    # Remembered lookups

    @property
    def context_room(self) -> int:
        """Bytes that remembered lookups may have now."""
        return max(0, min(self._context_bytes, self.limit_bytes - self.held_bytes - self.queued_bytes))

    # Calls

    @property
    def queue_limit(self) -> int:
        """Bytes that calls may have at most, where little is held."""
        return self.limit_bytes - self.limit_bytes // 4

    @property
    def queue_room(self) -> int:
        """Bytes that further calls may have now."""
        return max(0, min(self.queue_limit, self.limit_bytes - self.held_bytes) - self.queued_bytes)

    # Held updates

    @property
    def held_limit(self) -> int:
        """Bytes that held updates may have at most: the rest is for the calls that commit them."""
        return self.limit_bytes - self.limit_bytes // 8

    def share(self, num_owners: int = 1) -> int:
        """Bytes that each of so many owners that take what they can gets."""
        return self.held_limit * _SHARE // (1 + _SHARE * num_owners)

    def refusal(self, owner: str, num_bytes: int, what: str) -> MempoolError | None:
        """Why ``owner`` may not hold so much more now; None where it may.

        An owner that holds nothing may always hold what still fits.
        """
        own = self._owners.get(owner, 0)
        free = min(self.held_limit, self.limit_bytes - self.queued_bytes) - self.held_bytes - num_bytes
        if self.recovers or (free >= 0 and (own == 0 or own + num_bytes <= _SHARE * free)):
            return None
        if own + num_bytes > (self.share() if own else self.held_limit):
            return RequestTooLarge(
                f"{what} of {num_bytes:,} bytes does not fit: {owner} holds {own:,} bytes on this shard that were not "
                f"committed, and one trainer may hold {self.share():,} of the {self.limit_bytes:,} for clients; commit "
                "more often (fewer lookups per step), discard what is not wanted (zero_grad), or use more shards"
                f"{', or give them more (shard.client_memory)' if self.configured else ''}. Nothing was changed."
            )
        return Overloaded(
            f"{what} of {num_bytes:,} bytes does not fit now: clients hold {self.held_bytes:,} bytes on this shard "
            f"that were not committed, and {self.queued_bytes:,} of calls, of {self.limit_bytes:,}"
            f"{self.limit_name}. Most is held by {self._largest()}. It is free when they commit, discard, or fall "
            "silent. Nothing was changed.",
            retry_after_s=_RETRY_AFTER_S,
        )

    def hold(self, owner: str, num_bytes: int) -> None:
        """So much more is held by ``owner``; less, where it is negative."""
        self.held_bytes += num_bytes
        own = self._owners.get(owner, 0) + num_bytes
        if own:
            self._owners[owner] = own
        else:
            self._owners.pop(owner, None)

    def _largest(self) -> str:
        largest = nlargest(3, self._owners.items(), key=lambda item: item[1])
        return ", ".join(f"{owner} ({num_bytes:,} bytes)" for owner, num_bytes in largest) or "nobody"

    # Prepared steps

    @property
    def commit_room(self) -> int:
        """What a Prepare or Commit may take now: all but what prepared steps keep. At least half of it."""
        return self.commit_bytes - self.kept_bytes

    @property
    def kept_room(self) -> int:
        """What a prepared step may keep for its commit."""
        return self.commit_bytes // 2 - self.kept_bytes
