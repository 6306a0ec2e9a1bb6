"""What was applied to a table's pages: the rule that a step is applied once, or never. Values only."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from mempool.agreement.order import NOBODY
from mempool.errors import StepConflict
from mempool.types import DecidedStep, Ledger, LedgerEntry, StepId

MAX_ENTRIES = 16_384
"""Every client that ever committed leaves an entry, and the ledger goes with every move of pages. An entry is needed
only while its client may repeat its newest commit; so many other clients do not come in between."""

MAX_OTHERS = 65_536
"""Parts at other tables, of all entries together: what is above is forgotten of the oldest."""

FORGOTTEN = DecidedStep(table_id=0, version=0, step_id=NOBODY, lr=0.0, grad_scale=1.0)
"""In the place of those parts."""

_NONE = LedgerEntry()


class StepLog(Protocol):
    """Told on the thread that changes the ledger, after it did."""

    def applied(self, step: DecidedStep, others: tuple[DecidedStep, ...]) -> None:
        """A step was applied, with these sequences; others: its parts at other tables, of which this is the first."""

    def numbered(self, step: DecidedStep) -> None:
        """A step that was decided got its version."""

    def over(self, step_id: StepId) -> None:
        """A step that was not applied never will be."""


class NoStepLog:
    """Keeps nothing."""

    def applied(self, step: DecidedStep, others: tuple[DecidedStep, ...]) -> None:
        """See ``StepLog``."""

    def numbered(self, step: DecidedStep) -> None:
        """See ``StepLog``."""

    def over(self, step_id: StepId) -> None:
        """See ``StepLog``."""


class AppliedLedger:
    """Of very many ranks, those that committed last are remembered.

    Attributes:
        version: The table version: steps applied.
        updates_applied: Updates of them.
        log: Told what becomes of steps.
    """

    def __init__(self, ledger: Ledger | None) -> None:
        self.log: StepLog = NoStepLog()
        self.version = 0
        self.updates_applied = 0
        self._step_offset = 0
        self._entries: dict[tuple[str, int], LedgerEntry] = {}
        self._never: OrderedDict[tuple[str, int], None] = OrderedDict()  # those that never committed: of dropped steps
        self._num_others = 0
        self._take(ledger or Ledger())

    @property
    def step(self) -> int:
        """Steps that the optimizer counts: commits, unless it was told another number."""
        return self.version + self._step_offset

    def count_steps(self, step: int, *, at_version: int) -> None:
        """From now on, ``step`` steps are done at the present version.

        Raises:
            StepConflict: The version is another one.
        """
        if at_version != self.version:
            raise StepConflict(
                f"the step count is to be {step} at table version {at_version}, and the table is at {self.version}: "
                "somebody commits meanwhile. Set it while nobody trains. Nothing was changed."
            )
        self._step_offset = step - at_version

    def entry(self, step_id: StepId) -> LedgerEntry:
        """What is known of the step's rank, in the newest generation heard of."""
        return self._entries.get((step_id.group, step_id.rank), _NONE)

    def entry_of_its_generation(self, step_id: StepId) -> LedgerEntry | None:
        """What is known of the step's rank in the step's own generation; None where nothing is any more."""
        entry = self.entry(step_id)
        if step_id.generation > entry.generation:
            return LedgerEntry(generation=step_id.generation)
        return next((each for each in generations(entry) if each.generation == step_id.generation), None)

    def applied(self, step_id: StepId) -> int:
        """The table version that the step made, or a later one of its rank; 0 where it may still be applied.

        Raises:
            StepConflict: Its generation is over, or it was dropped.
        """
        entry = self._entries.get((step_id.group, step_id.rank))
        if entry is None:
            return 0
        if step_id.generation < entry.generation:
            raise over(step_id, entry.generation)
        if step_id.generation > entry.generation:
            return 0
        if step_id.step <= entry.step:
            return entry.version
        if step_id.step <= entry.dropped:
            raise StepConflict(
                f"step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} was dropped: its trainer "
                "discarded it, or was not heard of for longer than its lease. The same updates "
                "can be committed as a later step. Nothing was changed."
            )
        return 0

    def has(self, step_id: StepId) -> bool:
        """Whether that step, or a later one of its rank, was applied. Raises as ``applied`` does."""
        return self.applied(step_id) > 0

    def add(self, step_id: StepId | None, sequences: tuple[int, ...], others: tuple[DecidedStep, ...] = ()) -> None:
        """A step was applied; None: one that this shard knows nothing of."""
        self.version += 1
        if step_id is None:
            return
        self.updates_applied += len(sequences)
        entry = self._current(step_id)
        if entry.generation == step_id.generation and step_id.step > entry.step:
            entry = LedgerEntry(
                generation=entry.generation,
                step=step_id.step,
                version=self.version,
                dropped=entry.dropped,
                others=others,
                older=entry.older,
            )
        self._put(step_id, entry)

    def drop(self, step_id: StepId) -> None:
        """A step that was not applied never will be; one of a generation that is over is so already."""
        entry = self._current(step_id)
        if entry.generation == step_id.generation:
            self._put(step_id, replace(entry, dropped=max(entry.dropped, step_id.step)))
            self.log.over(step_id)

    def adopt(self, ledger: Ledger | None) -> bool:
        """Take over the ledger that came with pages, where it is ahead: a shard that owned nothing got no commits.

        Returns:
            Whether it was ahead.
        """
        if ledger is None or ledger.version < self.version:
            return False
        if ledger.version == self.version:
            self._step_offset = ledger.step_offset
            return False
        self._take(ledger)
        return True

    def begin_as(self, ledger: Ledger) -> None:
        """Begin anew where that ledger stands, as a table that was forked does."""
        self._take(ledger)

    def learn_others(self, ledger: Ledger | None) -> None:
        """Take over, of steps that another shard has decided, their parts at other tables: it alone knows them."""
        for rank, decided in () if ledger is None else ledger.entries.items():
            if (entry := self._entries.get(rank)) is not None:
                others = {(each.generation, each.step): each.others for each in generations(decided)}
                learned = self._entries[rank] = _with_others(entry, others)
                self._num_others += _count(learned) - _count(entry)
        if self._num_others > MAX_OTHERS:
            self._forget_others()

    def snapshot(self) -> Ledger:
        return Ledger(
            version=self.version,
            updates_applied=self.updates_applied,
            entries=dict(self._entries),
            step_offset=self._step_offset,
        )

    def _current(self, step_id: StepId) -> LedgerEntry:
        entry = self.entry(step_id)
        return entry if entry.generation >= step_id.generation else LedgerEntry(generation=step_id.generation)

    def _put(self, step_id: StepId, entry: LedgerEntry) -> None:
        rank = step_id.group, step_id.rank
        before = self._entries.pop(rank, _NONE)  # so that the order is that of the newest commits
        if before.generation < entry.generation:  # of its last step shards may be in doubt when the next one commits
            entry = replace(entry, older=replace(before, older=None) if before.step else before.older)
        self._entries[rank] = entry
        self._never.pop(rank, None)
        if _never_committed(entry):
            self._never[rank] = None
        self._num_others += _count(entry) - _count(before)
        if len(self._entries) > MAX_ENTRIES:
            # What is refused leaves an entry, too: however many there are, they push out none that was applied.
            oldest = next(iter(self._never or self._entries))
            self._never.pop(oldest, None)
            self._num_others -= _count(self._entries.pop(oldest))
        if self._num_others > MAX_OTHERS:
            self._forget_others()

    def _forget_others(self) -> None:
        """Of the oldest half: whoever is in doubt of a step asks within seconds."""
        ranks = [rank for rank, entry in self._entries.items() if _count(entry)]
        for rank in ranks[: (len(ranks) + 1) // 2]:
            entry = self._entries[rank]
            forgotten = {(each.generation, each.step): (FORGOTTEN,) for each in generations(entry) if each.others}
            self._entries[rank] = _with_others(entry, forgotten, anew=True)
        self._num_others = sum(_count(entry) for entry in self._entries.values())

    def _take(self, ledger: Ledger) -> None:
        self.version = ledger.version
        self.updates_applied = ledger.updates_applied
        self._step_offset = ledger.step_offset
        self._entries = dict(ledger.entries)
        self._never = OrderedDict((rank, None) for rank, entry in self._entries.items() if _never_committed(entry))
        self._num_others = sum(_count(entry) for entry in self._entries.values())


def generations(entry: LedgerEntry) -> tuple[LedgerEntry, ...]:
    """What is known of a rank's newest generation, and of the one before it."""
    return (entry,) if entry.older is None else (entry, entry.older)


def _with_others(
    entry: LedgerEntry, others: Mapping[tuple[int, int], tuple[DecidedStep, ...]], *, anew: bool = False
) -> LedgerEntry:
    """The parts at other tables of these steps, by generation and step: where none are known, or anew."""
    older = None if entry.older is None else _with_others(entry.older, others, anew=anew)
    found = others.get((entry.generation, entry.step), ())
    return replace(entry, others=found or entry.others if anew else entry.others or found, older=older)


def _never_committed(entry: LedgerEntry) -> bool:
    """Whether it stands for dropped steps alone, and of no earlier generation."""
    return not (entry.step or entry.generation)


def _count(entry: LedgerEntry) -> int:
    """Parts at other tables that are remembered with it."""
    if not entry.others and entry.older is None:
        return 0
    return sum(len(each.others) for each in generations(entry) if each.others != (FORGOTTEN,))


def over(step_id: StepId, generation: int) -> StepConflict:
    """The refusal of a step whose generation has ended, as that one has begun."""
    return StepConflict(
        f"step {step_id.step} of rank {step_id.rank} of group {step_id.group!r} is of generation {step_id.generation}, "
        f"and generation {generation} has begun: this trainer was replaced by one that came later. It must not go on. "
        "Nothing was changed."
    )
