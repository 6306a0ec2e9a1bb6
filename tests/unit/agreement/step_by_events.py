"""A client that does what a step says, and shards that are a few sets, for tests by events alone."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mempool.agreement.attempts import Attempts
from mempool.agreement.step import StepOfTables, TableStep
from mempool.agreement.step_events import (
    Acknowledge,
    Action,
    Apply,
    ApplyAnswered,
    ApplyRefused,
    Begun,
    Commit,
    CommitAnswered,
    CommitSent,
    Decided,
    EndPrepare,
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
from mempool.errors import StepConflict
from mempool.types import CommittedPart, PreparedPart, Stamp, StepId

STAMP = Stamp(shard=0, incarnation=1, epoch=1, table_version=0)
NUMBERS = {1: (0.1, 1.0), 2: (0.2, 0.5), 3: (0.3, 1.0)}
PLACES: dict[str, dict[int, tuple[int, ...]]] = {
    "one": {1: (0,), 2: (0,), 3: (0,)},
    "same": {1: (0, 1, 2), 2: (0, 1, 2), 3: (0, 1, 2)},
    "apart": {1: (0,), 2: (1, 2), 3: (3,)},
    "crossed": {1: (1, 2), 2: (0, 1), 3: (0, 2, 3)},
}


def owners(place: str, epoch: int = 1) -> tuple[Owners, ...]:
    return tuple(
        Owners(table_id=table_id, shards=shards, holders=frozenset(shards), view=(place, epoch))
        for table_id, shards in PLACES[place].items()
    )


@dataclass
class Shards:
    """What four shards know, as the protocol has it; ``sent`` are the rounds that were sent to them.

    Attributes:
        held: (shard, table, step, sequence).
        prepared: (shard, step of the first table).
        attempts: By shard.
        decided: By step of the first table: (lr, grad_scale) by table, and versions.
        applied: (shard, table) -> what was applied there, in order: (step, sequences, lr, grad_scale).
    """

    place: str
    epoch: int = 1
    held: set[tuple[int, int, int, int]] = field(default_factory=set)
    prepared: set[tuple[int, int]] = field(default_factory=set)
    attempts: dict[int, Attempts] = field(default_factory=lambda: defaultdict(Attempts))
    over: int = 0
    decided: dict[int, Parts] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    applied: dict[tuple[int, int], list[Part]] = field(default_factory=dict)
    held_off: set[int] = field(default_factory=set)
    sent: list[Action] = field(default_factory=list)

    def prepare(
        self, shard: int, parts: Parts, first: int, *, wait: bool = False, attempt: int = 0
    ) -> list[PreparedPart]:
        if all(self.has(shard, part) for part in parts):
            return [PreparedPart(stamp=STAMP, applied=True) for _ in parts]
        if first <= self.over and first not in self.decided:
            raise StepConflict("dropped")
        if late := self.attempts[shard].late(first, attempt):
            raise StepConflict(late)
        if wait:
            self.held_off.discard(shard)
        if shard in self.held_off:
            return [PreparedPart(stamp=STAMP, held_off=True) for _ in parts]
        missing = [
            tuple(s for s in part.sequences if (shard, part.table_id, part.step_id.step, s) not in self.held)
            if not self.has(shard, part)
            else ()
            for part in parts
        ]
        if not any(missing):
            self.prepared.add((shard, first))
            self.attempts[shard].prepared(first, attempt)
        return [
            PreparedPart(stamp=STAMP, missing=each, squared_norm=2.0, norm=3.0, applied=self.has(shard, part))
            for each, part in zip(missing, parts, strict=True)
        ]

    def end(self, shard: int, first: int, attempt: int) -> None:
        if self.attempts[shard].end(first, attempt):
            self.prepared.discard((shard, first))

    def has(self, shard: int, part: Part) -> bool:
        return any(done.step_id == part.step_id for done in self.applied.get((shard, part.table_id), []))

    def commit(self, shard: int, parts: Parts, *, one_phase: bool) -> list[CommittedPart]:
        first = parts[0].step_id.step
        if first not in self.decided:
            if one_phase:
                reply = self.prepare(shard, parts, first, wait=True)
                if any(part.missing for part in reply):
                    return [CommittedPart(stamp=STAMP, missing=part.missing) for part in reply]
            elif (shard, first) not in self.prepared or first <= self.over:
                self.over = max(self.over, first)
                raise StepConflict("not prepared")
            self.decided[first] = parts
            for part in parts:
                if PLACES[self.place][part.table_id][0] == shard:
                    self.versions[part.table_id] = self.versions.get(part.table_id, 0) + 1
                    self._apply(shard, part)
        return [
            CommittedPart(
                stamp=STAMP,
                version=self.versions[part.table_id] if PLACES[self.place][part.table_id][0] == shard else 0,
            )
            for part in parts
        ]

    def apply(self, shard: int, parts: Parts, first: int) -> list[CommittedPart]:
        assert first in self.decided or all(self.has(shard, part) for part in parts)
        if not all(self.has(shard, part) for part in parts) and (shard, first) not in self.prepared:
            raise StepConflict("not prepared here")
        for part in parts:
            if not self.has(shard, part):
                gate = PLACES[self.place][part.table_id][0] == shard
                assert gate or part.version, "others than the gate are told the version"
                if gate and not part.version:
                    self.versions[part.table_id] = self.versions.get(part.table_id, 0) + 1
                self._apply(shard, part)
        return [CommittedPart(stamp=STAMP, version=self.versions[part.table_id]) for part in parts]

    def _apply(self, shard: int, part: Part) -> None:
        self.applied.setdefault((shard, part.table_id), []).append(part)

    def move(self, place: str) -> None:
        """Prepared steps were decided and applied, or are dropped; what is held is dropped; ledgers go with pages."""
        done = {table_id: part for parts in self.decided.values() for part in parts for table_id in [part.table_id]}
        for table_id, part in done.items():
            self.versions.setdefault(table_id, 1)
            for shard in {*PLACES[self.place][table_id], *PLACES[place][table_id]}:
                if not self.has(shard, part):
                    self._apply(shard, replace(part, sequences=SEQUENCES))
        self.place, self.epoch = place, self.epoch + 1
        self.held.clear()
        self.prepared.clear()
        self.attempts.clear()

    def lose_decider(self, first: int, parts: Parts, heard: set[int], *, dropped: bool) -> None:
        """What it decided is known to those who have asked it; the others have dropped it, or are in doubt."""
        self.decided.pop(first, None)
        for part in parts:
            for shard in PLACES[self.place][part.table_id]:
                if part.table_id in heard and not self.has(shard, part):
                    self._apply(shard, part)
            if part.table_id in heard:
                self.versions[part.table_id] = 1
        if dropped:
            self.prepared.clear()
            self.held.clear()

    def forget(self, shard: int) -> None:
        self.held = {each for each in self.held if each[0] != shard}
        self.prepared = {each for each in self.prepared if each[0] != shard}
        self.attempts.pop(shard, None)


SEQUENCES = (1, 2)


class Client:
    """Carries out what a step says, on ``Shards``; every answer may be lost."""

    def __init__(self, place: str, *, tables: tuple[int, ...] = (1, 2, 3), held: bool = True) -> None:
        self.shards = Shards(place)
        self.next_step = 1
        self.step = StepOfTables(
            TableStep(table_id=table_id, step_id=self.step_id(), sequences=SEQUENCES) for table_id in tables
        )
        self.next_step = 2
        self.apart: list[int] = []
        self.lost: Callable[[], bool] = lambda: False
        self.in_between: Callable[[], None] = lambda: None
        if held:
            self._hold({t: dict.fromkeys(PLACES[place][t], SEQUENCES) for t in tables})

    def step_id(self) -> StepId:
        return StepId(group="g", rank=0, step=self.next_step)

    def go(
        self, goal: Any, *, decide: bool = True, want_norm: bool = False, norm_order: float = 0.0, actions: int = 100
    ) -> Action:
        """Until the goal is reached, it fails, or an answer is lost."""
        step, shards = self.step, self.shards
        step.handle(Begun(want_norm=want_norm, norm_order=norm_order))
        if decide:
            step.handle(Decided(numbers={table_id: NUMBERS[table_id] for table_id in step.tables}))
        for _ in range(actions):
            self.in_between()
            placed = [each for each in owners(shards.place, shards.epoch) if each.table_id in step.tables]
            step.handle(Placed(owners=tuple(placed)))
            action = step.next(goal)
            if isinstance(action, Reached | Fail):
                return action
            shards.sent.append(action)
            for _ in self._carry_out(action):
                if self.lost():
                    return action
        raise AssertionError(f"no end in sight: {shards.sent[-6:]}")

    def _carry_out(self, action: Action) -> Iterator[None]:
        step, shards = self.step, self.shards
        if isinstance(action, Prepare):
            first = action.decider.step_id.step
            for shard, parts in action.to.items():
                try:
                    reply = shards.prepare(shard, parts, first, wait=action.wait, attempt=action.attempt)
                except StepConflict as error:
                    step.handle(Refused(error=error))
                    return
                yield
                step.handle(
                    PrepareAnswered(
                        shard=shard,
                        parts=parts,
                        reply=reply,
                        want_norm=action.want_norm,
                        norm_order=action.norm_order,
                    )
                )
        elif isinstance(action, SendAgain):
            first = next(iter(step.tables.values())).step_id.step
            if first <= shards.over and first not in shards.decided:
                yield
                step.handle(SendRefused(error=StepConflict("dropped")))
                return
            self._hold(action.missing)
            yield
            step.handle(SentAgain())
        elif isinstance(action, EndPrepare):
            for shard, parts in action.to.items():
                shards.end(shard, parts[0].step_id.step, action.attempt)
                yield
                step.handle(PrepareEnded(shard=shard))
        elif isinstance(action, Commit):
            step.handle(CommitSent())
            try:
                answer = shards.commit(action.shard, action.parts, one_phase=action.one_phase)
            except StepConflict as error:
                yield
                step.handle(Refused(error=error))
                return
            yield
            step.handle(CommitAnswered(shard=action.shard, reply=answer))
        elif isinstance(action, Apply):
            first = next(iter(step.tables.values())).step_id.step
            for shard, parts in action.to.items():
                try:
                    answer = shards.apply(shard, parts, first)
                except StepConflict:
                    step.handle(ApplyRefused(shard=shard))
                    continue
                yield
                step.handle(ApplyAnswered(shard=shard, parts=parts, reply=answer))
        elif isinstance(action, Acknowledge):
            self.apart.append(action.table_id)
            step.handle(Gone(table_id=action.table_id))
        elif isinstance(action, Renumber):
            step_id = self.step_id()
            self.next_step += 1
            step.handle(Renumbered(step_ids=dict.fromkeys(step.tables, step_id)))

    def _hold(self, missing: Any) -> None:
        for table_id, by_shard in missing.items():
            number = self.step.tables[table_id].step_id.step
            for shard, sequences in by_shard.items():
                self.shards.held |= {(shard, table_id, number, sequence) for sequence in sequences}

    def again(self, action: Action) -> None:
        """Copies of what was sent come once more."""
        if not isinstance(action, Prepare | EndPrepare):
            return
        for shard, parts in action.to.items():
            first = parts[0].step_id.step  # all tables of a step here count alike
            if isinstance(action, EndPrepare):
                self.shards.end(shard, first, action.attempt)
            else:
                with suppress(StepConflict):
                    self.shards.prepare(shard, parts, first, attempt=action.attempt)

    def kinds(self) -> list[str]:
        return [type(action).__name__ for action in self.shards.sent]

    def assert_applied_once(self) -> None:
        place = PLACES[self.shards.place]
        for table_id, table in self.step.tables.items():
            for shard in place[table_id]:
                (part,) = self.shards.applied[shard, table_id]
                assert part.step_id == table.step_id
                assert (part.lr, part.grad_scale) == NUMBERS[table_id]
        assert len(self.shards.decided) == 1
