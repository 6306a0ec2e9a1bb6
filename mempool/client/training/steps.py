"""What a trainer's steps on one table consist of: which update belongs to which, what is sealed, decided, given up.

Pure: sends nothing and waits for nothing. The session carries out.
"""

from dataclasses import dataclass, field

from torch import Tensor

from mempool.client.routing.attempt import LookupRecord
from mempool.client.routing.plan import TablePlan
from mempool.types import StepId


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pushed:
    """An update that was pushed: its lookup and its gradient [B, V]."""

    record: LookupRecord
    grads: Tensor

    @property
    def num_bytes(self) -> int:
        """What keeping it costs, in tensors."""
        return self.grads.nbytes + self.record.bags.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a step is committed with."""

    lr: float
    grad_scale: float


@dataclass(slots=True, kw_only=True, eq=False)
class Step:
    """A step from its first update to its acknowledged commit.

    Attributes:
        updates: By sequence.
        num_bytes: Of the updates.
        sealed: The sequences it consists of, once it is being prepared; later updates belong to the next step.
        prepared_on: The plan under which all owners have prepared it.
        decision: Set before the first message that may apply it; from then on it can only be committed, by this.
    """

    step_id: StepId
    updates: dict[int, Pushed] = field(default_factory=dict)
    num_bytes: int = 0
    sealed: tuple[int, ...] = ()
    prepared_on: TablePlan | None = None
    decision: Decision | None = None

    def add(self, sequence: int, pushed: Pushed) -> None:
        self.updates[sequence] = pushed
        self.num_bytes += pushed.num_bytes

    def remove(self, sequence: int) -> None:
        """An update that failed is no part of the step, unless the step was sealed with it meanwhile."""
        if not self.sealed and (pushed := self.updates.pop(sequence, None)) is not None:
            self.num_bytes -= pushed.num_bytes


class Steps:
    """The steps of one rank on one table that are not over: one open, at most one closing, and those given up.

    Args:
        group: The rank's group, as ledgers name it.
        rank: Its number there.

    Attributes:
        open: Takes the updates that come.
        closing: Sealed, and neither acknowledged nor discarded.
        given_up: Steps that were given up here and that some shard may still hold, or have prepared.
    """

    def __init__(self, *, group: str, rank: int = 0) -> None:
        self._group = group
        self._rank = rank
        self._next_sequence = 1
        self.open = self._step(1)
        self.closing: Step | None = None
        self.given_up: list[StepId] = []

    @property
    def pending(self) -> int:
        """Updates pushed and not yet committed or discarded."""
        closing = self.closing
        return len(self.open.updates) + (0 if closing is None else len(closing.sealed))

    @property
    def pending_bytes(self) -> int:
        """Bytes of tensors that are kept for them here."""
        closing = self.closing
        return self.open.num_bytes + (0 if closing is None else closing.num_bytes)

    @property
    def nothing_to_drop(self) -> bool:
        """Whether a discard would neither drop nor tell anybody anything."""
        closing = self.closing
        undecided = closing is not None and closing.decision is None
        return not (self.open.updates or undecided or self.given_up)

    @property
    def decided(self) -> Step | None:
        """The step whose commit is under way: it has to be finished before anything else."""
        closing = self.closing
        return closing if closing is not None and closing.decision is not None else None

    def next_sequence(self) -> int:
        """A number for one more update."""
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        return sequence

    def merge(self) -> None:
        """Where a step was prepared and more came: the two become one step, under the later number."""
        closing = self.closing
        if closing is None or closing.decision is not None or not self.open.updates:
            return
        self.open.updates = closing.updates | self.open.updates
        self.open.num_bytes += closing.num_bytes
        self.given_up.append(closing.step_id)
        self.closing = None

    def seal(self) -> Step | None:
        """The step to prepare: what is pending, closed to further updates. None where nothing is."""
        if self.closing is None and self.open.updates:
            step = self.open
            step.sealed = tuple(sorted(step.updates))
            self.closing, self.open = step, self._step(step.step_id.step + 1)
        return self.closing

    def acknowledged(self) -> None:
        """Every owner has applied the closing step."""
        self.closing = None

    def give_up(self) -> int:
        """Drop what is pending and not decided; answers how many updates that were."""
        dropped = 0
        if self.closing is not None and self.closing.decision is None:
            dropped += len(self.closing.updates)
            self.given_up.append(self.closing.step_id)
            self.closing = None
        if self.open.updates:
            dropped += len(self.open.updates)
            self.given_up.append(self.open.step_id)
            self.open = self._step(self.open.step_id.step + 1)
        return dropped

    def _step(self, number: int) -> Step:
        return Step(step_id=StepId(group=self._group, rank=self._rank, step=number))
