"""Updates held until their step is decided, and the steps that are prepared, each with the rank that they belong to.

Values only: arithmetic on tables is in ``commits``, who may hold how much in ``budget``.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mempool.errors import MempoolError
from mempool.kernels import SortedPairs
from mempool.shard.pages.storage import Lane
from mempool.shard.steps.budget import ENTRY_BYTES, TENSOR_BYTES, Budget, numbers_bytes, tensors_bytes, text_bytes
from mempool.types import PrepareRequest, StepId
from mempool.types.bags import Bags

Rank = tuple[str, int]

KEPT_BYTES = 5 * TENSOR_BYTES
"""What a reduction costs besides its rows and their sums."""


@dataclass(frozen=True, slots=True)
class HeldUpdate:
    """One lookup's ids and weights with the gradient of its pooled values, [B, W] float32; written by nobody else."""

    bags: Bags
    grads: Tensor

    @property
    def num_bytes(self) -> int:
        """What it costs to hold it."""
        bags = self.bags
        return ENTRY_BYTES + tensors_bytes((bags.ids, bags.weights, bags.offsets, self.grads))


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a step's updates in canonical order: ids [L], weights [L] or None, their bags [L], grads [B, W]."""

    ids: Tensor
    weights: Tensor | None
    bags: Tensor
    grads: Tensor


@dataclass(frozen=True, slots=True)
class Reduction:
    """One arena's gradient, summed per distinct row: [U, W of the arena] float32.

    Attributes:
        reached: Of a step in parts: the lane's number, and the slot that the parts up to this one reach to.
    """

    lane: Lane
    pairs: SortedPairs
    sums: Tensor
    reached: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, lane: Lane, pairs: SortedPairs, sums: Tensor, *, reached: tuple[int, int] = (0, 0)) -> "Reduction":
        """Without the order of the pairs, which is as long as the batch: the optimizer needs the rows alone."""
        return cls(lane, replace(pairs, order=pairs.order[:0].clone()), sums, reached)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """A step whose updates are all here.

    reductions: where the norm was asked for, and small enough to keep. norm: of order norm_order; 0.0 where that is.
    """

    step: int
    sequences: tuple[int, ...]
    want_norm: bool
    squared_norm: float
    finite: bool
    reductions: tuple[Reduction, ...] | None
    norm_order: float = 0.0
    norm: float = 0.0

    def answers(self, request: PrepareRequest) -> bool:
        """Whether all is known that is asked for."""
        return self.want_norm >= request.want_norm and request.norm_order in (0.0, self.norm_order)

    @property
    def kept_bytes(self) -> int:
        """Bytes of sums kept for the commit."""
        return sum(
            reduction.sums.nbytes + reduction.pairs.rows.nbytes * 3 + KEPT_BYTES for reduction in self.reductions or ()
        )

    @property
    def num_bytes(self) -> int:
        """What it costs besides its sums."""
        return ENTRY_BYTES + numbers_bytes(len(self.sequences))

    def is_of(self, step_id: StepId, sequences: tuple[int, ...]) -> bool:
        """Whether it is that step, of these updates (ascending)."""
        return self.step == step_id.step and self.sequences == sequences


@dataclass(slots=True)
class RankUpdates:
    """What one rank of a group has on this shard of one table.

    Attributes:
        owner: Who answers for the bytes: the connection that brought the first of them, else the rank.
        updates: By step, then sequence.
        num_bytes: Of all of it but the sums that ``prepared`` keeps.
    """

    owner: str
    num_bytes: int
    updates: dict[int, dict[int, HeldUpdate]] = field(default_factory=dict)
    prepared: PreparedStep | None = None
    touched_s: float = 0.0


class HeldUpdates:
    """Held updates of one table, by (group, rank), then step and sequence.

    Args:
        budget: Shared by the tables of a shard.
        lease_s: A rank that said nothing for longer is taken for dead: what it holds is dropped; after a sixth of that
            already where it stands in others' way. That is safe: Prepare reports what is missing, and a Commit that it
            is not prepared; a client that lives sends them again.
        clock: Seconds, monotonic; replaced in tests.
    """

    def __init__(self, *, budget: Budget, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        budget.holders.add(self)
        self._lease_s = lease_s
        self._clock = clock
        self._count = 0
        self._ranks: OrderedDict[Rank, RankUpdates] = OrderedDict()  # those that were silent longest come first
        self._prepared: dict[Rank, PreparedStep] = {}

    def __len__(self) -> int:
        return self._count

    def touch(self, step_id: StepId) -> None:
        """The rank is alive."""
        rank = step_id.group, step_id.rank
        found = self._ranks.get(rank)
        if found is not None:
            found.touched_s = self._clock()
            self._ranks.move_to_end(rank)

    def get(self, step_id: StepId, sequence: int) -> HeldUpdate | None:
        """The update of that step and sequence, if it is held."""
        found = self._ranks.get((step_id.group, step_id.rank))
        return found.updates.get(step_id.step, {}).get(sequence) if found else None

    def hold(self, step_id: StepId, sequence: int, update: HeldUpdate, *, caller: str = "") -> None:
        """Hold an update that is not held yet. caller: the connection that brought it, "" for this process itself.

        Raises:
            RequestTooLarge: Its owner holds more than one may.
            Overloaded: There is no room beside what others hold.
        """
        found = self._admitted(step_id, update.num_bytes, caller, "an update")
        found.updates.setdefault(step_id.step, {})[sequence] = update
        self._count += 1
        self._add(found, update.num_bytes)

    def require_room(self, step_id: StepId, num_bytes: int, *, caller: str = "") -> None:
        """Raise what ``hold`` of an update of so many bytes would: before anything is copied for it."""
        self._require((step_id.group, step_id.rank), num_bytes, caller, "an update")

    def prepared(self) -> Iterator[tuple[Rank, PreparedStep]]:
        """All steps that are prepared and not decided."""
        yield from self._prepared.items()

    @property
    def any_prepared(self) -> bool:
        """Whether there is a step that is prepared and not decided."""
        return bool(self._prepared)

    def prepared_step(self, step_id: StepId) -> PreparedStep | None:
        """The step of that rank that is prepared, whichever it is."""
        return self._prepared.get((step_id.group, step_id.rank))

    def set_prepared(self, step_id: StepId, prepared: PreparedStep, *, caller: str = "") -> None:
        """The step is prepared, in place of what its rank had prepared before.

        Raises as ``hold`` does, but for a rank that holds updates: that is small beside them, and the way to their end.
        """
        found = self._ranks.get((step_id.group, step_id.rank))
        if found is None or not found.updates:
            found = self._admitted(step_id, prepared.num_bytes, caller, "a prepared step")
        self.touch(step_id)
        self._end_prepare(found, step_id)
        found.prepared = self._prepared[step_id.group, step_id.rank] = prepared
        self.budget.kept_bytes += prepared.kept_bytes
        self._add(found, prepared.num_bytes)

    def give_up_older(self, step_id: StepId) -> None:
        """End the Prepare of an earlier step: a rank decides its steps in order, so this one's Discard was lost."""
        prepared = self.prepared_step(step_id)
        if prepared is not None and prepared.step < step_id.step:
            self._end_prepare(self._ranks[step_id.group, step_id.rank], step_id)

    def discard(self, step_id: StepId) -> int:
        """Drop what is held of one step. Returns how many updates that were."""
        found = self._ranks.get((step_id.group, step_id.rank))
        if found is None:
            return 0
        self.touch(step_id)
        if found.prepared is not None and found.prepared.step == step_id.step:
            self._end_prepare(found, step_id)
        dropped = self._drop_step(found, step_id.step)
        self._forget_empty(found, step_id)
        return dropped

    def decided(self, step_id: StepId) -> None:
        """A step was applied: drop it, and older ones that its rank left behind."""
        found = self._ranks.get((step_id.group, step_id.rank))
        if found is None:
            return
        self.touch(step_id)
        self._end_prepare(found, step_id)
        for step in [step for step in found.updates if step <= step_id.step]:
            self._drop_step(found, step)
        self._forget_empty(found, step_id)

    def clear(self) -> None:
        """Drop everything."""
        for rank in list(self._ranks):
            self._forget(rank)

    @property
    def patience_s(self) -> float:
        """Seconds of silence after which a rank that stands in others' way is taken for dead."""
        return self._lease_s / 6

    def expire(self, *, in_the_way: bool = False) -> None:
        """Drop what ranks hold that said nothing for too long."""
        now, lease_s = self._clock(), self.patience_s if in_the_way else self._lease_s
        while self._ranks:
            rank, found = next(iter(self._ranks.items()))
            if now - found.touched_s <= lease_s:
                return
            self._forget(rank)

    def _admitted(self, step_id: StepId, num_bytes: int, caller: str, what: str) -> RankUpdates:
        """The rank's entry, once so much more of it has room."""
        rank = step_id.group, step_id.rank
        self._require(rank, num_bytes, caller, what)
        found = self._ranks.get(rank)
        if found is None:
            found = self._ranks[rank] = RankUpdates(owner=_owner(rank, caller), num_bytes=0)
            self._add(found, _rank_bytes(rank))
        self.touch(step_id)
        return found

    def _require(self, rank: Rank, num_bytes: int, caller: str, what: str) -> None:
        refusal = self._refusal(rank, num_bytes, caller, what)
        if refusal is not None:
            for holder in self.budget.holders:  # the dead of whatever table make room
                holder.expire(in_the_way=True)
            refusal = self._refusal(rank, num_bytes, caller, what)
        if refusal is not None:
            raise refusal

    def _refusal(self, rank: Rank, num_bytes: int, caller: str, what: str) -> MempoolError | None:
        found = self._ranks.get(rank)
        if found is None:
            return self.budget.refusal(_owner(rank, caller), num_bytes + _rank_bytes(rank), what)
        return self.budget.refusal(found.owner, num_bytes, what)

    def _add(self, found: RankUpdates, num_bytes: int) -> None:
        found.num_bytes += num_bytes
        self.budget.hold(found.owner, num_bytes)

    def _end_prepare(self, found: RankUpdates, step_id: StepId) -> None:
        prepared = found.prepared
        if prepared is not None:
            found.prepared = None
            del self._prepared[step_id.group, step_id.rank]
            self.budget.kept_bytes -= prepared.kept_bytes
            self._add(found, -prepared.num_bytes)

    def _drop_step(self, found: RankUpdates, step: int) -> int:
        dropped = found.updates.pop(step, {})
        self._count -= len(dropped)
        self._add(found, -sum(update.num_bytes for update in dropped.values()))
        return len(dropped)

    def _forget_empty(self, found: RankUpdates, step_id: StepId) -> None:
        if not found.updates and found.prepared is None:
            self._forget((step_id.group, step_id.rank))

    def _forget(self, rank: Rank) -> None:
        found = self._ranks.pop(rank)
        prepared = self._prepared.pop(rank, None)
        if prepared is not None:
            self.budget.kept_bytes -= prepared.kept_bytes
        self._count -= sum(len(updates) for updates in found.updates.values())
        self.budget.hold(found.owner, -found.num_bytes)


def _owner(rank: Rank, caller: str) -> str:
    return caller or f"rank {rank[1]} of group {rank[0]!r}"


def _rank_bytes(rank: Rank) -> int:
    return 2 * ENTRY_BYTES + text_bytes(rank[0])


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
