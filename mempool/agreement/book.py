"""A trainer's steps on one table: which update belongs to which, what is sealed, committed, given up.

Pure: sends nothing and waits for nothing. How a step of several tables is agreed on is ``step``'s.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from mempool.types import StepId


class Weighed(Protocol):
    """An update, of which only its size matters here."""

    @property
    def num_bytes(self) -> int: ...


U = TypeVar("U", bound=Weighed)

OF_OTHER_RANKS = 2**40
"""To shards a sync group is one trainer: rank r numbers its updates from r times this on, so that ascending numbers are
in the canonical order (rank, sequence)."""


@dataclass(slots=True, kw_only=True, eq=False)
class Step(Generic[U]):
    """A step of one table, from its first update until every owner has applied it.

    Attributes:
        updates: By sequence.
        num_bytes: Of the updates.
        sealed: The sequences it consists of, once it is being prepared; later updates belong to the next step.
        committing: It may be decided already: it can only be committed any more.
    """

    step_id: StepId
    updates: dict[int, U] = field(default_factory=dict)
    num_bytes: int = 0
    sealed: tuple[int, ...] = ()
    committing: bool = False

    def add(self, sequence: int, update: U) -> None:
        self.updates[sequence] = update
        self.num_bytes += update.num_bytes

    def remove(self, sequence: int) -> None:
        """An update that failed is no part of the step, unless the step was sealed with it meanwhile."""
        if not self.sealed and (update := self.updates.pop(sequence, None)) is not None:
            self.num_bytes -= update.num_bytes


class Book(Generic[U]):
    """The steps of one rank on one table that are not over. Any thread may add updates; all else is for one.

    One is open, at most one is closing, and at most one is decided and not applied everywhere yet.

    Args:
        group: The rank's group, as ledgers name it.
        rank: Its number there.
        generation: How often the rank has gone back to an earlier step.
        first_sequence: Of its updates.

    Attributes:
        base: The number that its group's next step had when this rank last heard of one that was committed.
        open: Takes the updates that come.
        closing: Sealed, and neither acknowledged nor discarded.
        applying: Acknowledged: some owners may not have applied it yet, and may ask for its updates.
        given_up: Steps that were given up here and that some shard may still hold, or have prepared.
    """

    def __init__(self, *, group: str, rank: int = 0, generation: int = 0, first_sequence: int = 1) -> None:
        self._rank = group, rank, generation
        self._lock = threading.Lock()  # of the open step: what it has is what it is sealed with
        self._next_sequence = first_sequence
        self._next_step = 1
        self.base = 1
        self.open: Step[U] = self._step()
        self.closing: Step[U] | None = None
        self.applying: Step[U] | None = None
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
        undecided = closing is not None and not closing.committing
        return not (self.open.updates or undecided or self.given_up)

    @property
    def holds(self) -> bool:
        """Whether shards hold, or should hold, anything of it."""
        return bool(self.open.updates or self.closing or self.applying)

    def next_sequence(self) -> int:
        """A number for one more update."""
        with self._lock:
            return self._numbered()

    def add(self, update: U) -> tuple[Step[U], int]:
        """One more update of the open step: that, and the update's number."""
        with self._lock:
            step, sequence = self.open, self._numbered()
            step.add(sequence, update)
        return step, sequence

    def remove(self, step: Step[U], sequence: int) -> None:
        """An update that failed is no part of its step, unless that was sealed with it meanwhile."""
        with self._lock:
            step.remove(sequence)

    def merge(self) -> bool:
        """Where a step was prepared and more came: they become one, under the later number. Whether they did."""
        with self._lock:
            closing = self.closing
            if closing is None or closing.committing or not self.open.updates:
                return False
            self.open.updates = closing.updates | self.open.updates
            self.open.num_bytes += closing.num_bytes
            self.given_up.append(closing.step_id)
            self.closing = None
            return True

    def seal(self, *, empty: bool = False) -> Step[U] | None:
        """The step to prepare: what is pending, closed to further updates. None where nothing is, unless an empty step
        is wanted, as others have something pending."""
        with self._lock:
            if self.closing is None and (self.open.updates or empty):
                step = self.open
                step.sealed = tuple(sorted(step.updates))
                self.closing, self.open = step, self._step()
            return self.closing

    def renumber(self, past: int = 0) -> None:
        """The closing step goes on under a new number, as its old one is over; the open one's is above that. past: So
        many numbers are left out."""
        with self._lock:
            assert self.closing is not None
            self._next_step += past
            self.given_up.append(self.closing.step_id)
            self.closing.step_id = self._step_id()
            if self.open.updates:
                self.given_up.append(self.open.step_id)
            self.open.step_id = self._step_id()

    def leave_empty(self) -> None:
        """The closing step has no updates, and is not to be committed."""
        with self._lock:
            if self.closing is not None and not self.closing.updates:
                self.given_up.append(self.closing.step_id)
                self.closing = None

    @property
    def next_committed(self) -> int:
        """The number, at least, of the step that is committed next."""
        return (self.closing or self.open).step_id.step

    @property
    def generation(self) -> int:
        """In which its steps are numbered."""
        return self._rank[2]

    def follow(self, step: int, *, committed: bool) -> None:
        """The group's next step has this number: so has the open one. committed: What came before it is."""
        with self._lock:
            if committed:
                self.base = step
            group, rank, generation = self._rank
            self.open.step_id = StepId(group=group, rank=rank, step=step, generation=generation)
            self._next_step = step + 1

    def pass_over(self, step_id: StepId, *, by: int = 1) -> None:
        """The open step has a number that is so much higher, if it has this one: another rank has had that dropped."""
        with self._lock:
            if self.open.step_id == step_id:
                self._next_step += by - 1
                self.open.step_id = self._step_id()

    def renew(self, generation: int) -> None:
        """What is pending, none of which is decided, goes on in a later generation, as its first step."""
        with self._lock:
            group, rank, _ = self._rank
            self._rank = group, rank, generation
            if self.closing is not None:
                self.open.updates = self.closing.updates | self.open.updates
                self.open.num_bytes += self.closing.num_bytes
                self.closing = None
            self.given_up.clear()
            self.applying = None
            self._next_step = self.base = 1
            self.open.step_id = self._step_id()

    def acknowledged(self) -> int:
        """The closing step is decided; answers how many updates it has."""
        assert self.closing is not None
        self.applying, self.closing = self.closing, None
        return len(self.applying.sealed)

    def applied(self) -> None:
        """Every owner has applied what was acknowledged."""
        self.applying = None

    def go_under(self, step: int) -> None:
        """The closing step, which another rank commits, has this number there by now."""
        if self.closing is not None:
            self.closing.step_id = replace(self.closing.step_id, step=step)

    def take_back(self) -> None:
        """What others were told is to be committed is so no more: nothing of it is decided, nor will be."""
        if self.closing is not None:
            self.closing.committing = False

    def give_up(self) -> int:
        """Drop what is pending and not decided; answers how many updates that were."""
        with self._lock:
            dropped = 0
            if self.closing is not None and not self.closing.committing:
                dropped += len(self.closing.updates)
                self.given_up.append(self.closing.step_id)
                self.closing = None
            if self.open.updates:
                dropped += len(self.open.updates)
                self.given_up.append(self.open.step_id)
                self.open = self._step()
            return dropped

    def _numbered(self) -> int:
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        return sequence

    def _step(self) -> Step[U]:
        return Step(step_id=self._step_id())

    def _step_id(self) -> StepId:
        group, rank, generation = self._rank
        number, self._next_step = self._next_step, self._next_step + 1
        return StepId(group=group, rank=rank, step=number, generation=generation)
