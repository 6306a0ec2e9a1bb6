"""A trainer's step over several tables and shards, until every owner has applied it: events in, actions out.

One object is one step. ``handle`` takes what was heard, ``next`` says what to do now; doing the same twice, or being
cut off anywhere, is harmless. Which updates a step has is ``book``'s; sending is the client's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mempool.agreement.step_events import (
    Acknowledge,
    Action,
    Apply,
    ApplyAnswered,
    ApplyRefused,
    Begun,
    Commit,
    CommitAnswered,
    CommitInvalid,
    CommitSent,
    Decided,
    EndPrepare,
    Event,
    Fail,
    Gone,
    Owners,
    Part,
    Parts,
    Placed,
    Prepare,
    PrepareAnswered,
    PrepareEnded,
    Reached,
    Refused,
    Renumber,
    Renumbered,
    SendAgain,
    SendRefused,
    SentAgain,
)
from mempool.errors import Internal, MempoolError, StepConflict
from mempool.types import PreparedPart, StepId
from mempool.types.norms import joined_norm

# How often, in one go, updates are sent again, or the step goes under another number, before that is an error.
MAX_ROUNDS = 5
_PAST = (0, 0, 32, 256, 1024)
"""Numbers that are left out each time: of a group's ranks one may have dropped many steps while another was silent."""

Goal = Literal["prepared", "decided", "applied"]
State = Literal["open", "in doubt", "decided"]
"""Of a step: nothing is decided; its Commit was sent and not answered; it is decided, whatever happens now."""


@dataclass(slots=True, kw_only=True)
class TableStep:
    """One table's part of the step.

    Attributes:
        sequences: Its updates, ascending.
        version: The table version it makes; 0 while that is not known.
    """

    table_id: int
    step_id: StepId
    sequences: tuple[int, ...]
    lr: float = 0.0
    grad_scale: float = 1.0
    version: int = 0


@dataclass(slots=True)
class _Shard:
    """What is known of the step at one shard.

    Attributes:
        prepared: Whether, under the present placement and number; with_norm: and with a norm.
        missing: Sequences by table.
        held_off: Its pages move.
        unprepared: It was told that the step is decided, and had not prepared it; refusals: how often, in this go.
        applied: Tables of which it has applied the step.
    """

    prepared: bool = False
    with_norm: bool = False
    norm_order: float = 0.0
    missing: dict[int, tuple[int, ...]] = field(default_factory=dict)
    held_off: bool = False
    unprepared: bool = False
    refusals: int = 0
    applied: set[int] = field(default_factory=set)


class StepOfTables:
    """One step of one rank over some tables of a pool; the first table's gate decides it.

    Where the decider's table leaves while the step is in doubt, the decision may have reached the gates of some tables
    and not those of others, and nobody is left to ask. Then each gate is asked by a Prepare of the same number that
    names the next decider. Where it was applied that table is acknowledged; where not, the gate has heard of a decider
    that decided nothing, and does not take the old one's word any more. Only then may a number change.

    Args:
        tables: In the step's order; at least one.
        decided: It is known to be decided.

    Attributes:
        tables: By id, in order.
        state: See ``State``.
    """

    def __init__(self, tables: Iterable[TableStep], *, decided: bool = False) -> None:
        self.tables = {table.table_id: table for table in tables}
        self.state: State = "decided" if decided else "open"
        self._unasked: tuple[int, ...] = ()  # tables whose gates are to be asked, as the decider has left
        self._apart: int | None = None  # a table that was applied, and is to leave
        self._owners: dict[int, Owners] = {}
        self._shards: dict[int, _Shard] = {}
        self._norms: dict[int, dict[int, PreparedPart]] = {}  # by table, then shard
        self._want_norm = False
        self._norm_order = 0.0
        self._committing = False
        self._one_phase = False
        self._refused: StepConflict | None = None
        self._failed: MempoolError | None = None
        self._rounds = 0
        self._numbers = 0
        self._attempts = 0  # Prepares so far, under whatever number

    @property
    def prepared(self) -> bool:
        """Whether every owner has prepared it, under the placement that is known."""
        for shard in self._shards.values():
            if not shard.prepared:
                return False
        return bool(self._shards)

    def norm(self, table_id: int) -> tuple[float, bool, float]:
        """Once prepared with a norm: its square, whether it is finite, and the norm of the order asked for (else 0)."""
        parts = [part for _, part in sorted(self._norms.get(table_id, {}).items())]
        order = self._norm_order
        norm = joined_norm([part.norm for part in parts], order) if order else 0.0
        return math.fsum(part.squared_norm for part in parts), all(part.finite for part in parts), norm

    def handle(self, event: Event) -> None:
        """Something was heard, or done."""
        match event:
            case Begun():
                self._want_norm, self._committing = event.want_norm, self.state != "open"
                self._norm_order = event.norm_order
                self._rounds = self._numbers = 0
                self._failed = None
                for shard in self._shards.values():
                    shard.refusals = 0
            case Placed():
                self._place(event.owners)
            case Decided():
                self._decide(event.numbers)
            case PrepareAnswered():
                self._take_prepared(event)
            case PrepareEnded():
                self._shards[event.shard].prepared = False
            case SentAgain():
                self._sent_again()
            case SendRefused() if self.state == "in doubt":
                self._sent_again()  # its decider is asked by the Commit itself
            case CommitSent():
                self.state = "in doubt"
            case CommitAnswered():
                self._take_committed(event)
            case CommitInvalid():
                self._reopen()
            case Refused() if self._unasked:
                self._refused = event.error  # to the first of them; others may have been applied
                self._asked(self._unasked[0])
            case Refused() | SendRefused() if self.state == "decided":
                self._failed = event.error
            case Refused() | SendRefused():
                self._reopen()
                self._refused = event.error
            case ApplyAnswered():
                self._take_applied(event)
            case ApplyRefused():
                self._shards[event.shard].unprepared = True
                self._shards[event.shard].prepared = False
                self._shards[event.shard].refusals += 1
            case Renumbered():
                self._renumber(event.step_ids)
            case Gone():
                self._leave(event.table_id)

    def next(self, goal: Goal) -> Action:
        """What to do now on the way to ``goal``."""
        if self._failed is not None:
            return Fail(error=self._failed)
        if self._apart is not None:
            return Acknowledge(table_id=self._apart)
        if self._unasked and not self._missing():
            return self._ask(self.tables[self._unasked[0]])
        if self._refused is not None and not self._unasked:
            return Renumber(past=_PAST[self._numbers]) if self._numbers < MAX_ROUNDS else Fail(error=self._refused)
        if self._rounds >= MAX_ROUNDS and (lacking := self._missing()):
            return Fail(error=self._keeps_missing(lacking))
        if self.state == "decided":
            return self._next_apply() if goal == "applied" else Reached()
        if self.state == "in doubt" and not self._missing():
            return self._commit(one_phase=self._one_phase and len(self._shards) == 1)
        if lacking := self._missing():
            return SendAgain(missing=lacking)
        if self._committing and goal != "prepared" and len(self._shards) == 1 and not self.prepared:
            return self._commit(one_phase=True)
        left = [number for number, shard in self._shards.items() if not self._is_prepared(shard)]
        if left:
            return self._prepare(left)
        if goal == "prepared":
            return Reached()
        if not self._committing:
            return Fail(error=Internal(f"{self.name} is to be committed and was not decided on. Please report it."))
        return self._commit(one_phase=False)

    @property
    def name(self) -> str:
        """The step, in a sentence."""
        first = next(iter(self.tables.values())).step_id
        return f"step {first.step} of rank {first.rank} of group {first.group!r}"

    @property
    def _first(self) -> TableStep:
        return next(iter(self.tables.values()))

    @property
    def _decider(self) -> int:
        return self._owners[self._first.table_id].shards[0]

    def _place(self, owners: tuple[Owners, ...]) -> None:
        placed = {each.table_id: each for each in owners}
        known = self._owners
        if len(placed) == len(known) and all(
            table_id in known and (each is known[table_id] or each.view == known[table_id].view)
            for table_id, each in placed.items()
        ):
            return
        self._owners = {table_id: placed[table_id] for table_id in self.tables}
        self._rounds = 0  # updates that pages have left behind are sent once more, however often these move
        # What was prepared elsewhere is void; what was applied is told again, which is harmless.
        self._shards = {number: _Shard() for number in sorted({n for each in owners for n in each.shards})}
        self._norms = {}

    def _decide(self, numbers: Mapping[int, tuple[float, float]]) -> None:
        self._committing = True
        if self.state == "open":
            for table_id, (lr, grad_scale) in numbers.items():
                self.tables[table_id].lr, self.tables[table_id].grad_scale = lr, grad_scale

    def _take_prepared(self, event: PrepareAnswered) -> None:
        shard = self._shards[event.shard]
        answers = list(zip(event.parts, event.reply, strict=True))
        if self._unasked and any(answer.applied for _, answer in answers):
            self._take_applied_before(next(part.table_id for part, answer in answers if answer.applied))
            return
        if self.state == "decided":
            shard.applied |= {part.table_id for part, answer in answers if answer.applied}
            answers = [(part, answer) for part, answer in answers if not answer.applied]
        elif any(answer.applied for _, answer in answers):
            self._failed = self._committed_by_others(next(part for part, answer in answers if answer.applied))
            return
        shard.held_off = any(answer.held_off for _, answer in answers)
        shard.missing = {} if shard.held_off else {p.table_id: a.missing for p, a in answers if a.missing}
        prepared = not (shard.held_off or shard.missing)
        if self._unasked:  # a part of what is to be prepared there
            if prepared:
                self._asked(event.parts[0].table_id)
            return
        shard.prepared = prepared
        if not shard.prepared:
            return
        shard.unprepared = False
        shard.with_norm, shard.norm_order = event.want_norm, event.norm_order
        if event.want_norm:
            for part, answer in answers:
                self._norms.setdefault(part.table_id, {})[event.shard] = answer

    def _take_committed(self, event: CommitAnswered) -> None:
        missing = {}
        for table_id, answer in zip(self.tables, event.reply, strict=True):
            if answer.missing:
                missing[table_id] = answer.missing
        if missing:  # it stays in doubt: once they are there, a copy of this Commit that comes late decides it, too
            self._shards[event.shard].missing = missing
            return
        if not event.reply[0].version:
            self._failed = Internal(
                f"shard {event.shard} decided {self.name} and gave it no version. Please report it."
            )
            return
        self.state = "decided"
        for table, answer in zip(self.tables.values(), event.reply, strict=True):
            if answer.version:
                table.version = answer.version
                self._shards[event.shard].applied.add(table.table_id)

    def _take_applied(self, event: ApplyAnswered) -> None:
        shard = self._shards[event.shard]
        for part, answer in zip(event.parts, event.reply, strict=True):
            if answer.missing:
                shard.missing[part.table_id] = answer.missing
                continue
            shard.applied.add(part.table_id)
            table = self.tables[part.table_id]
            table.version = table.version or answer.version
            if not table.version:
                self._failed = Internal(
                    f"shard {event.shard}, the gate of table {part.table_id}, applied {self.name} and gave it no"
                    " version. Please report it."
                )

    def _sent_again(self) -> None:
        self._rounds += 1
        for shard in self._shards.values():
            shard.missing = {}

    def _leave(self, table_id: int) -> None:
        decider = self._first.table_id == table_id
        del self.tables[table_id]
        self._owners, self._shards, self._norms = {}, {}, {}
        self._apart = None
        if decider and self.state == "in doubt":
            self._unasked = tuple(self.tables)
        elif self._unasked:
            self._asked(table_id)

    def _asked(self, table_id: int) -> None:
        """The gate of that table has answered, or is not asked any more. When all have, nothing is decided."""
        self._unasked = tuple(each for each in self._unasked if each != table_id)
        if not self._unasked:
            self._reopen()

    def _take_applied_before(self, table_id: int) -> None:
        if len(self.tables) > 1:
            self._apart = table_id
        else:
            self.state, self._unasked, self._refused = "decided", (), None

    def _reopen(self) -> None:
        self.state = "open"
        self._one_phase = False

    def _renumber(self, step_ids: Mapping[int, StepId]) -> None:
        for table_id, step_id in step_ids.items():
            self.tables[table_id].step_id = step_id
        self._refused = None
        self._numbers += 1
        self._shards = {number: _Shard() for number in self._shards}
        self._norms = {}

    def _is_prepared(self, shard: _Shard) -> bool:
        known = shard.with_norm and self._norm_order in (0.0, shard.norm_order)
        return shard.prepared and (known or not self._want_norm)

    def _missing(self) -> dict[int, dict[int, tuple[int, ...]]]:
        missing: dict[int, dict[int, tuple[int, ...]]] = {}
        for number, shard in self._shards.items():
            for table_id, sequences in shard.missing.items():
                missing.setdefault(table_id, {})[number] = sequences
        return missing

    def _prepare(self, shards: Sequence[int], *, want_norm: bool | None = None) -> Action:
        held_off = next((number for number, shard in self._shards.items() if shard.held_off), None)
        if held_off is not None:
            # No step is prepared on one shard and held off on another, each waiting for the other's end.
            prepared = [number for number, shard in self._shards.items() if shard.prepared]
            if prepared and self.state == "open":
                return EndPrepare(to=self._parts(prepared), attempt=self._attempts)
            shards = [held_off]
        self._attempts += 1
        return Prepare(
            to=self._parts(shards),
            want_norm=self._want_norm if want_norm is None else want_norm,
            norm_order=self._norm_order if want_norm is None else 0.0,
            decider=self._part(self._first, self._decider),
            wait=held_off is not None,
            attempt=self._attempts,
        )

    def _ask(self, table: TableStep) -> Prepare:
        """Alone, as one refusal is that of all parts of a message, and another part of it may have been applied."""
        gate = self._owners[table.table_id].shards[0]
        self._attempts += 1
        return Prepare(
            to={gate: (self._part(table, gate),)},
            want_norm=False,
            decider=self._part(self._first, self._decider),
            wait=self._shards[gate].held_off,
            attempt=self._attempts,
        )

    def _commit(self, *, one_phase: bool) -> Commit:
        self._one_phase = one_phase
        decider = self._decider
        # Of a table that has another gate the decider records what it decides; the updates are that gate's matter.
        parts = tuple(
            self._part(table, decider if self._owners[table.table_id].shards[0] == decider else -1)
            for table in self.tables.values()
        )
        return Commit(shard=decider, parts=parts, one_phase=one_phase)

    def _next_apply(self) -> Action:
        for shard in self._shards.values():
            if len(shard.applied) < len(self.tables):
                break
        else:
            return Reached()
        if lacking := self._missing():
            return SendAgain(missing=lacking)
        unprepared = [number for number, shard in self._shards.items() if shard.unprepared and self._left(number)]
        if any(self._shards[number].refusals > MAX_ROUNDS for number in unprepared):
            return Fail(
                error=Internal(
                    f"{self.name} is decided, and shards {unprepared} forget again and again that they have"
                    " prepared it. Please report it."
                )
            )
        if unprepared:
            return self._prepare(unprepared, want_norm=False)
        unnumbered = [table_id for table_id, table in self.tables.items() if not table.version]
        if unnumbered:
            gates = {self._owners[table_id].shards[0] for table_id in unnumbered}
            to = {
                gate: tuple(
                    part for part in self._left(gate) if part.version or self._owners[part.table_id].shards[0] == gate
                )
                for gate in sorted(gates)
            }
            return Apply(to=to)
        to = {number: parts for number in self._shards if (parts := self._left(number))}
        return Apply(to=to) if to else Reached()

    def _left(self, shard: int) -> Parts:
        """What is still to be applied there."""
        applied = self._shards[shard].applied
        return tuple(part for part in self._parts([shard])[shard] if part.table_id not in applied)

    def _parts(self, shards: Sequence[int]) -> dict[int, Parts]:
        return {
            shard: tuple(
                self._part(table, shard)
                for table_id, table in self.tables.items()
                if shard in self._owners[table_id].shards
            )
            for shard in shards
        }

    def _part(self, table: TableStep, shard: int) -> Part:
        """Owners of key pages alone hold no updates, but their ledger follows."""
        return Part(
            table_id=table.table_id,
            step_id=table.step_id,
            sequences=table.sequences if shard in self._owners[table.table_id].holders else (),
            lr=table.lr,
            grad_scale=table.grad_scale,
            version=table.version,
        )

    def _committed_by_others(self, part: Part) -> StepConflict:
        step_id = part.step_id
        return StepConflict(
            f"step {step_id.step}, generation {step_id.generation}, of rank {step_id.rank} of group {step_id.group!r}"
            " was committed before, by another process: a rank is one process at a time, and one that goes back to an"
            " earlier step comes with a higher generation. Nothing was changed"
        )

    def _keeps_missing(self, missing: Mapping[int, Mapping[int, tuple[int, ...]]]) -> Internal:
        return Internal(
            f"{self.name}: shards still miss updates after {MAX_ROUNDS} rounds of sending them again:"
            f" { ({table_id: dict(shards) for table_id, shards in missing.items()}) } (table: shard: sequences)."
            " Please report it."
        )
