"""Updates held until their step is decided, and the steps that are prepared, each with the rank that they belong to.

Values only: arithmetic on tables is in ``commits``, who may hold how much in ``budget``.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter

from torch import Tensor

from mempool.agreement.attempts import Attempts
from mempool.agreement.ledger import over
from mempool.errors import MempoolError
from mempool.kernels import SortedPairs
from mempool.shard.pages.storage import Lane
from mempool.shard.steps.budget import ENTRY_BYTES, TENSOR_BYTES, Budget, numbers_bytes, tensors_bytes, text_bytes
from mempool.types import ShardInfo, StepId
from mempool.types.bags import Bags

Rank = tuple[str, int, int]
"""A trainer: group, rank, generation."""

KEPT_BYTES = 5 * TENSOR_BYTES
"""What a reduction costs besides its rows and their sums."""


class HeldUpdate:
    """One lookup's ids and weights with the gradient of its pooled values, [B, W] float32; written by nobody else.

    input_dim: Of experts, how wide u is: their pairs are here twice, first those that train u. 0: they are no experts.
    num_bytes: What it costs to hold it.
    """

    __slots__ = ("bags", "grads", "input_dim", "num_bytes")

    def __init__(self, bags: Bags, grads: Tensor, *, input_dim: int = 0) -> None:
        self.bags = bags
        self.grads = grads
        self.input_dim = input_dim
        self.num_bytes = ENTRY_BYTES + tensors_bytes((bags.ids, bags.weights, bags.offsets, grads))


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
        more: Of a slot that is summed in parts by itself: its pairs that ``pairs`` does not have.
    """

    lane: Lane
    pairs: SortedPairs
    sums: Tensor
    reached: tuple[int, int] = (0, 0)
    more: int = 0

    @classmethod
    def of(cls, lane: Lane, pairs: SortedPairs, sums: Tensor, *, reached: tuple[int, int] = (0, 0)) -> "Reduction":
        """Without the order of the pairs, which is as long as the batch: the optimizer needs the rows alone."""
        return cls(lane, replace(pairs, order=pairs.order[:0].clone()), sums, reached)


@dataclass(frozen=True, slots=True, kw_only=True)
class InOrder:
    """A step's pairs, sorted for one arena: all that applying it needs. ``copied``: they are not the updates' own.
    ``kept``: So that other shards find what was made of them."""

    lane: Lane
    in_order: SortedPairs
    pairs: Pairs
    copied: bool
    kept: object = None

    @property
    def num_bytes(self) -> int:
        """What keeping it costs, besides the updates."""
        order, pairs = self.in_order, self.pairs
        own = order.order.nbytes + order.rows.nbytes + order.slots.nbytes + order.starts.nbytes + pairs.bags.nbytes
        if self.copied:
            own += tensors_bytes((pairs.ids, pairs.weights, pairs.grads))
        return own + KEPT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """A step whose updates are all here.

    Attributes:
        decider: The table whose gate decides it, and the step as that table counts them.
        decider_at: Where that gate was then; None: not known.
        decided_here: That gate is this shard: nobody else knows more of it.
        since_s: When it was prepared first.
        reductions: Where the norm was asked for, and small enough to keep.
        sorted: Where it was not, and they are small enough to keep.
        norm: Of order norm_order; 0.0 where that is.
    """

    step_id: StepId
    decider: tuple[int, int]
    decider_at: ShardInfo | None = None
    decided_here: bool = False
    since_s: float = 0.0
    sequences: tuple[int, ...]
    want_norm: bool
    squared_norm: float
    finite: bool
    reductions: tuple[Reduction, ...] | None
    sorted: tuple[InOrder, ...] | None = None
    norm_order: float = 0.0
    norm: float = 0.0

    @property
    def step(self) -> int:
        return self.step_id.step

    def answers(self, *, want_norm: bool, norm_order: float) -> bool:
        """Whether all is known that is asked for."""
        return self.want_norm >= want_norm and norm_order in (0.0, self.norm_order)

    @property
    def kept_bytes(self) -> int:
        """Bytes kept for the commit: of sums, or of sorted pairs."""
        sums = sum(
            reduction.sums.nbytes + reduction.pairs.rows.nbytes * 3 + KEPT_BYTES for reduction in self.reductions or ()
        )
        return sums + sum(part.num_bytes for part in self.sorted or ())

    @property
    def num_bytes(self) -> int:
        """What it costs besides its sums."""
        return ENTRY_BYTES + numbers_bytes(len(self.sequences))

    def is_of(self, step_id: StepId, sequences: tuple[int, ...]) -> bool:
        """Whether it is that step, of these updates (ascending)."""
        return self.step_id == step_id and self.sequences == sequences


@dataclass(slots=True)
class RankUpdates:
    """What one rank of a group has on this shard of one table.

    Attributes:
        owner: Who answers for the bytes: the connection that brought the first of them, else the rank.
        updates: By step, then sequence.
        num_bytes: Of all of it but the sums that ``prepared`` keeps.
        attempts: Which Prepares of its newest step count.
    """

    owner: str
    num_bytes: int
    updates: dict[int, dict[int, HeldUpdate]] = field(default_factory=dict)
    prepared: PreparedStep | None = None
    attempts: Attempts = field(default_factory=Attempts)
    touched_s: float = 0.0


class HeldUpdates:
    """Held updates of one table, by rank, then step and sequence.

    Args:
        budget: Shared by the tables of a shard.
        lease_s: A rank that said nothing for longer is taken for dead: what it holds is dropped, what it prepared is
            ``silent``: no shard but its decider may drop that. It is safe: Prepare reports what is missing; a client
            that lives sends it again.
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
        self._settled: dict[Rank, float] = {}  # of prepared steps: when it was asked that was answered by "undecided"
        self._unwanted: set[Rank] = set()  # of prepared steps: whose clients want them decided no more
        self._newest: dict[tuple[str, int], int] = {}  # generation of each that is held

    def __len__(self) -> int:
        return self._count

    def touch(self, step_id: StepId) -> None:
        """The rank is alive."""
        self._touch(_rank(step_id))

    def heard_of(self, group: str, rank: int) -> int:
        """A rank is alive, in its newest generation. Returns how many updates of it are held."""
        generation = self._newest.get((group, rank))
        if generation is None:
            return 0
        key = group, rank, generation
        self._touch(key)
        return sum(len(updates) for updates in self._ranks[key].updates.values())

    def require_newest(self, step_id: StepId) -> None:
        """Raises StepConflict where a later generation of the rank holds anything here."""
        newest = self._newest.get((step_id.group, step_id.rank), 0)
        if step_id.generation < newest:
            raise over(step_id, newest)

    def lives(self, step_id: StepId) -> bool:
        """Whether the rank holds something and its lease has not ended."""
        found = self._ranks.get(_rank(step_id))
        return found is not None and self._clock() - found.touched_s <= self._lease_s

    def stalled(self, step_id: StepId) -> bool:
        """Whether that step has been prepared for longer than a lease: its trainer may live, and not reach some other
        shard."""
        return self.is_prepared(step_id) and self._clock() - self._prepared[_rank(step_id)].since_s > self._lease_s

    def under_way(self, step_id: StepId) -> bool:
        """Whether that step is prepared, not for longer than a lease, and its trainer lives."""
        return self.is_prepared(step_id) and self.lives(step_id) and not self.stalled(step_id)

    def silent(self) -> tuple[PreparedStep, ...]:
        """Prepared steps of ranks whose lease has ended."""
        now = self._clock()
        return tuple(
            prepared for rank, prepared in self._prepared.items() if now - self._ranks[rank].touched_s > self._lease_s
        )

    def _touch(self, rank: Rank) -> None:
        found = self._ranks.get(rank)
        if found is not None:
            found.touched_s = self._clock()
            self._ranks.move_to_end(rank)

    def get(self, step_id: StepId, sequence: int) -> HeldUpdate | None:
        """The update of that step and sequence, if it is held."""
        found = self._ranks.get(_rank(step_id))
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

    def let_go(self, step_id: StepId, sequence: int) -> None:
        """Drop one update, if it is held."""
        found = self._ranks.get(_rank(step_id))
        update = None if found is None else found.updates.get(step_id.step, {}).pop(sequence, None)
        if found is not None and update is not None:
            self._count -= 1
            self._add(found, -update.num_bytes)

    def require_room(self, step_id: StepId, num_bytes: int, *, caller: str = "") -> None:
        """Raise what ``hold`` of an update of so many bytes would: before anything is copied for it."""
        self._require(_rank(step_id), num_bytes, caller, "an update")

    def all_held(self) -> Iterator[tuple[StepId, int, HeldUpdate]]:
        """All updates, with their steps and sequences."""
        for (group, rank, generation), found in self._ranks.items():
            for step, updates in found.updates.items():
                for sequence, update in updates.items():
                    yield StepId(group=group, rank=rank, step=step, generation=generation), sequence, update

    def prepared(self) -> Iterator[PreparedStep]:
        """All steps that are prepared and not applied."""
        yield from self._prepared.values()

    @property
    def any_prepared(self) -> bool:
        """Whether there is a step that is prepared and not applied."""
        return bool(self._prepared)

    def doubtful(self, waits_since_s: float) -> PreparedStep | None:
        """A step that may have been decided elsewhere before then: prepared by then, and not asked for since."""
        for rank, prepared in self._prepared.items():
            asked_s = self._settled.get(rank, float("-inf"))
            if not prepared.decided_here and prepared.since_s <= waits_since_s and asked_s < waits_since_s:
                return prepared
        return None

    def give_up(self, step_id: StepId) -> PreparedStep | None:
        """Its client discards the step, or has gone on. Returns it where that is for another shard to say: it is
        prepared, and decided there."""
        prepared = self.prepared_step(step_id)
        if prepared is None or prepared.step_id != step_id or prepared.decided_here:
            return None
        self._unwanted.add(_rank(step_id))
        return prepared

    def unwanted(self, step_id: StepId) -> bool:
        """Whether the client of the step that is prepared wants it decided no more."""
        return _rank(step_id) in self._unwanted

    def settle(self, step_id: StepId, asked_s: float) -> None:
        """Its decider, asked then, had not decided the step."""
        prepared = self.prepared_step(step_id)
        if prepared is not None and prepared.step_id == step_id:
            rank = _rank(step_id)
            self._settled[rank] = max(asked_s, self._settled.get(rank, asked_s))

    def prepared_step(self, step_id: StepId) -> PreparedStep | None:
        """The step of that rank that is prepared, whichever it is."""
        return self._prepared.get(_rank(step_id))

    def is_prepared(self, step_id: StepId, *, decider: tuple[int, int] | None = None) -> bool:
        """Whether it is that very step of its rank, for that decider (None: any)."""
        prepared = self.prepared_step(step_id)
        return prepared is not None and prepared.step_id == step_id and (decider is None or prepared.decider == decider)

    def set_prepared(self, step_id: StepId, prepared: PreparedStep, *, caller: str = "") -> None:
        """The step is prepared, in place of what its rank had prepared before.

        Raises as ``hold`` does, but for a rank that holds updates: that is small beside them, and the way to their end.
        """
        found = self._ranks.get(_rank(step_id))
        if found is None or not found.updates:
            found = self._admitted(step_id, prepared.num_bytes, caller, "a prepared step")
        self.touch(step_id)
        known, settled_s = found.prepared, self._settled.get(_rank(step_id))
        again = known is not None and known.step_id == step_id
        self._end_prepare(found, step_id)
        since_s = known.since_s if again and known is not None else self._clock()
        prepared = replace(prepared, since_s=since_s)
        found.prepared = self._prepared[_rank(step_id)] = prepared
        if again and settled_s is not None:
            self._settled[_rank(step_id)] = settled_s
        self.budget.kept_bytes += prepared.kept_bytes
        self._add(found, prepared.num_bytes)

    def decided_unnumbered(self, step_id: StepId) -> None:
        """The step that is prepared is decided here, and another shard says which version of this table it makes."""
        if self.is_prepared(step_id):
            rank = _rank(step_id)
            found = replace(self._prepared[rank], decided_here=False)
            self._ranks[rank].prepared = self._prepared[rank] = found

    def end_prepare(self, step_id: StepId) -> bool:
        """The step is prepared no more; its updates stay. Returns whether it was."""
        prepared = self.prepared_step(step_id)
        if prepared is None or prepared.step != step_id.step:
            return False
        found = self._ranks[_rank(step_id)]
        self._end_prepare(found, step_id)
        self._forget_empty(found, step_id)
        return True

    def attempted(self, step_id: StepId, attempt: int) -> None:
        """This Prepare of the step has prepared it, or found that it is."""
        self._ranks[_rank(step_id)].attempts.prepared(step_id.step, attempt)

    def late(self, step_id: StepId, attempt: int) -> str:
        """Why this Prepare of the step counts no more, in words; "": it counts."""
        found = self._ranks.get(_rank(step_id))
        return "" if found is None else found.attempts.late(step_id.step, attempt)

    def end_attempt(self, step_id: StepId, attempt: int) -> None:
        """The step's Prepares up to this one are ended; its updates stay. That they are is kept with the rank, whatever
        else it has here, until it was silent for a lease."""
        found = self._ranks.get(_rank(step_id))
        if found is not None and found.attempts.end(step_id.step, attempt) and self.is_prepared(step_id):
            self._end_prepare(found, step_id)

    def discard(self, step_id: StepId) -> int:
        """Drop what is held of one step. Returns how many updates that were."""
        found = self._ranks.get(_rank(step_id))
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
        found = self._ranks.get(_rank(step_id))
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

    def expire(self) -> None:
        """Drop what ranks hold that said nothing for too long, but for what they have prepared."""
        now = self._clock()
        late = []
        for rank, found in self._ranks.items():
            if now - found.touched_s <= self._lease_s:
                break
            if found.prepared is None:
                late.append(rank)
        for rank in late:
            self._forget(rank)

    def _admitted(self, step_id: StepId, num_bytes: int, caller: str, what: str) -> RankUpdates:
        """The rank's entry, once so much more of it has room."""
        rank = _rank(step_id)
        self._require(rank, num_bytes, caller, what)
        found = self._ranks.get(rank)
        if found is None:
            found = self._ranks[rank] = RankUpdates(owner=_owner(rank, caller), num_bytes=0)
            self._newest[rank[:2]] = max(rank[2], self._newest.get(rank[:2], 0))
            self._add(found, _rank_bytes(rank))
        self.touch(step_id)
        return found

    def _require(self, rank: Rank, num_bytes: int, caller: str, what: str) -> None:
        refusal = self._refusal(rank, num_bytes, caller, what)
        if refusal is not None:
            for holder in self.budget.holders:  # the dead of whatever table make room
                holder.expire()
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
            del self._prepared[_rank(step_id)]
            self._settled.pop(_rank(step_id), None)
            self._unwanted.discard(_rank(step_id))
            self.budget.kept_bytes -= prepared.kept_bytes
            self._add(found, -prepared.num_bytes)

    def _drop_step(self, found: RankUpdates, step: int) -> int:
        dropped = found.updates.pop(step, {})
        self._count -= len(dropped)
        self._add(found, -sum(update.num_bytes for update in dropped.values()))
        return len(dropped)

    def _forget_empty(self, found: RankUpdates, step_id: StepId) -> None:
        if not found.updates and found.prepared is None:
            self._forget(_rank(step_id))

    def _forget(self, rank: Rank) -> None:
        found = self._ranks.pop(rank)
        if self._newest.get(rank[:2]) == rank[2]:
            del self._newest[rank[:2]]
        prepared = self._prepared.pop(rank, None)
        self._settled.pop(rank, None)
        self._unwanted.discard(rank)
        if prepared is not None:
            self.budget.kept_bytes -= prepared.kept_bytes
        self._count -= sum(len(updates) for updates in found.updates.values())
        self.budget.hold(found.owner, -found.num_bytes)


_rank: Callable[[StepId], Rank] = attrgetter("group", "rank", "generation")


def _owner(rank: Rank, caller: str) -> str:
    return caller or f"rank {rank[1]} of group {rank[0]!r}"


def _rank_bytes(rank: Rank) -> int:
    return 2 * ENTRY_BYTES + text_bytes(rank[0])
