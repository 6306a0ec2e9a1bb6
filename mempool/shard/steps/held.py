"""Updates held until their step is decided, the steps that are prepared, and the ledger of what was applied.

Values only: arithmetic on tables is in ``commits``.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakSet

import torch
from torch import Tensor

from mempool.errors import RequestTooLarge
from mempool.kernels import SortedPairs
from mempool.shard.pages.storage import Lane
from mempool.types import Ledger, StepId
from mempool.types.bags import Bags

Rank = tuple[str, int]

_MAX_LEDGER_ENTRIES = 16_384
"""Every client that ever committed leaves an entry, and the ledger goes with every move of pages. An entry is needed
only while its client may repeat its newest commit; so many other clients do not come in between."""


@dataclass(frozen=True, slots=True)
class HeldUpdate:
    """One lookup's ids and weights with the gradient of its pooled values, [B, W] float32; written by nobody else."""

    bags: Bags
    grads: Tensor

    @property
    def num_bytes(self) -> int:
        return self.bags.num_bytes + self.grads.nbytes


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a step's updates in canonical order: ids [L], weights [L] or None, their bags [L], grads [B, W]."""

    ids: Tensor
    weights: Tensor | None
    bags: Tensor
    grads: Tensor


@dataclass(frozen=True, slots=True)
class Reduction:
    """One arena's gradient, summed per distinct row: [U, W of the arena] float32."""

    lane: Lane
    pairs: SortedPairs
    sums: Tensor

    @classmethod
    def of(cls, lane: Lane, pairs: SortedPairs, sums: Tensor) -> "Reduction":
        """Without the order of the pairs, which is as long as the batch: the optimizer needs the rows alone."""
        return cls(lane, replace(pairs, order=pairs.order[:0].clone()), sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """A step whose updates are all here. reductions: where the norm was asked for, and small enough to keep."""

    step: int
    sequences: tuple[int, ...]
    want_norm: bool
    squared_norm: float
    finite: bool
    reductions: tuple[Reduction, ...] | None

    @property
    def num_bytes(self) -> int:
        """Bytes kept for the commit."""
        return sum(reduction.sums.nbytes + reduction.pairs.rows.nbytes * 3 for reduction in self.reductions or ())

    def is_of(self, step_id: StepId, sequences: tuple[int, ...]) -> bool:
        """Whether it is that step, of these updates (ascending)."""
        return self.step == step_id.step and self.sequences == sequences


@dataclass(slots=True)
class RankUpdates:
    """What one rank of a group has on this shard of one table."""

    updates: dict[tuple[int, int], HeldUpdate] = field(default_factory=dict)
    prepared: PreparedStep | None = None
    touched_s: float = 0.0


class Budget:
    """Bytes held on a shard, over all tables, and those that preparing and committing steps may take besides.

    Attributes:
        holders: Those who hold them; gone with their tables.
    """

    def __init__(self, limit_bytes: int, *, commit_bytes: int = 256 * 2**20) -> None:
        self.limit_bytes = limit_bytes
        self.commit_bytes = commit_bytes
        self.num_bytes = 0
        self.holders: WeakSet[HeldUpdates] = WeakSet()

    @property
    def commit_room(self) -> int:
        """What a Prepare or Commit may take now: all but what prepared steps keep. At least half of it."""
        return self.commit_bytes - self._kept_bytes

    @property
    def kept_room(self) -> int:
        """What a prepared step may keep for its commit."""
        return self.commit_bytes // 2 - self._kept_bytes

    @property
    def _kept_bytes(self) -> int:
        return sum(step.num_bytes for holder in self.holders for _, step in holder.prepared())

    def make_room(self, num_bytes: int) -> bool:
        """Whether so much more fits, once dead ranks of whatever table have left where it does not."""
        if self.num_bytes + num_bytes > self.limit_bytes:
            for holder in self.holders:
                holder.expire()
        return self.num_bytes + num_bytes <= self.limit_bytes


class HeldUpdates:
    """Held updates of one table, by (group, rank), then (step, sequence).

    Args:
        budget: Shared by the tables of a shard.
        lease_s: A rank that said nothing for longer is taken for dead where it stands in others' way: when the budget
            is used up, or when its prepared step holds off a freeze. Dropping updates is safe: Prepare reports them
            missing and a client that lives sends them again.
        clock: Seconds, monotonic; replaced in tests.
    """

    def __init__(self, *, budget: Budget, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        budget.holders.add(self)
        self._lease_s = lease_s
        self._clock = clock
        self._sessions: dict[Rank, RankUpdates] = {}

    def __len__(self) -> int:
        return sum(len(session.updates) for session in self._sessions.values())

    def touch(self, step_id: StepId) -> None:
        """The rank is alive."""
        session = self._sessions.get((step_id.group, step_id.rank))
        if session is not None:
            session.touched_s = self._clock()

    def get(self, step_id: StepId, sequence: int) -> HeldUpdate | None:
        """The update of that step and sequence, if it is held."""
        session = self._sessions.get((step_id.group, step_id.rank))
        return session.updates.get((step_id.step, sequence)) if session else None

    def hold(self, step_id: StepId, sequence: int, update: HeldUpdate) -> None:
        """Hold an update that is not held yet.

        Raises:
            RequestTooLarge: The shard holds too much already.
        """
        if not self.budget.make_room(update.num_bytes):
            raise RequestTooLarge(
                f"an update of {update.num_bytes:,} bytes does not fit: this shard holds {self.budget.num_bytes:,} "
                f"bytes of updates that were not committed, and may hold {self.budget.limit_bytes:,}; commit more "
                "often (fewer lookups per step), discard what is not wanted (zero_grad), or use more shards"
            )
        self._session(step_id).updates[step_id.step, sequence] = update
        self.budget.num_bytes += update.num_bytes

    def prepared(self) -> Iterator[tuple[Rank, PreparedStep]]:
        """All steps that are prepared and not decided."""
        for rank, session in self._sessions.items():
            if session.prepared is not None:
                yield rank, session.prepared

    def prepared_step(self, step_id: StepId) -> PreparedStep | None:
        """The step of that rank that is prepared, whichever it is."""
        session = self._sessions.get((step_id.group, step_id.rank))
        return session.prepared if session is not None else None

    def set_prepared(self, step_id: StepId, prepared: PreparedStep) -> None:
        """The step is prepared, in place of what its rank had prepared before."""
        self._session(step_id).prepared = prepared

    def give_up_older(self, step_id: StepId) -> None:
        """End the Prepare of an earlier step: a rank decides its steps in order, so this one's Discard was lost."""
        prepared = self.prepared_step(step_id)
        if prepared is not None and prepared.step < step_id.step:
            self._session(step_id).prepared = None

    def discard(self, step_id: StepId) -> int:
        """Drop what is held of one step. Returns how many updates that were."""
        session = self._sessions.get((step_id.group, step_id.rank))
        if session is None:
            return 0
        if session.prepared is not None and session.prepared.step == step_id.step:
            session.prepared = None
        return self._drop(session, lambda step: step == step_id.step)

    def decided(self, step_id: StepId) -> None:
        """A step was applied: drop it, and older ones that its rank left behind."""
        session = self._session(step_id)
        session.prepared = None
        self._drop(session, lambda step: step <= step_id.step)
        if not session.updates:
            del self._sessions[step_id.group, step_id.rank]

    def clear(self) -> None:
        """Drop everything."""
        for session in self._sessions.values():
            self._drop(session, lambda _: True)
        self._sessions.clear()

    def expire(self) -> None:
        """Drop what ranks hold that said nothing for longer than the lease."""
        now = self._clock()
        for rank, session in list(self._sessions.items()):
            if now - session.touched_s > self._lease_s:
                self._drop(session, lambda _: True)
                del self._sessions[rank]

    def _session(self, step_id: StepId) -> RankUpdates:
        session = self._sessions.setdefault((step_id.group, step_id.rank), RankUpdates())
        session.touched_s = self._clock()
        return session

    def _drop(self, session: RankUpdates, unwanted: Callable[[int], bool]) -> int:
        keys = [key for key in session.updates if unwanted(key[0])]
        for key in keys:
            self.budget.num_bytes -= session.updates.pop(key).num_bytes
        return len(keys)


def in_canonical_order(updates: Sequence[HeldUpdate], *, width: int, device: torch.device) -> Pairs:
    """All pairs of a rank's updates, which come by sequence: (sequence, bag, pair)."""
    if not updates:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Pairs(none, None, none, torch.empty((0, width), dtype=torch.float32, device=device))
    bags, first = [], 0
    for update in updates:
        num_bags = update.bags.num_bags
        numbers = torch.arange(first, first + num_bags, device=device)
        bags.append(torch.repeat_interleave(numbers, update.bags.offsets.diff()))
        first += num_bags
    if len(updates) == 1:
        return Pairs(updates[0].bags.ids, updates[0].bags.weights, bags[0], updates[0].grads)
    weights = None
    if any(update.bags.weights is not None for update in updates):
        weights = torch.cat([_weights(update.bags) for update in updates])
    return Pairs(
        torch.cat([update.bags.ids for update in updates]),
        weights,
        torch.cat(bags),
        torch.cat([update.grads for update in updates]),
    )


def _weights(bags: Bags) -> Tensor:
    ones = torch.ones(bags.ids.shape[0], dtype=torch.float32, device=bags.ids.device)
    return ones if bags.weights is None else bags.weights


class AppliedLedger:
    """What was applied to a table's pages here. Of very many ranks, those that committed last are remembered."""

    def __init__(self, ledger: Ledger | None) -> None:
        ledger = ledger or Ledger()
        self.version = ledger.version
        self.updates_applied = ledger.updates_applied
        self._entries = dict(ledger.entries)

    def has(self, step_id: StepId) -> bool:
        """Whether that step, or a later one of its rank, was applied."""
        applied = self._entries.get((step_id.group, step_id.rank))
        return applied is not None and step_id.step <= applied

    def add(self, step_id: StepId, sequences: tuple[int, ...]) -> None:
        """A step was applied."""
        self.version += 1
        self.updates_applied += len(sequences)
        rank = step_id.group, step_id.rank
        self._entries.pop(rank, None)  # so that the order is that of the newest commits
        self._entries[rank] = step_id.step
        if len(self._entries) > _MAX_LEDGER_ENTRIES:
            del self._entries[next(iter(self._entries))]

    def adopt(self, ledger: Ledger | None) -> bool:
        """Take over the ledger that came with pages, where it is ahead: a shard that owned nothing got no commits.

        Returns:
            Whether it was ahead.
        """
        ahead = ledger is not None and ledger.version > self.version
        if ahead:
            self.__init__(ledger)  # type: ignore[misc]
        return ahead

    def snapshot(self) -> Ledger:
        return Ledger(version=self.version, updates_applied=self.updates_applied, entries=dict(self._entries))
