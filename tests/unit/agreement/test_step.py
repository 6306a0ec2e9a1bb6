"""A step over tables and shards, by events alone, against shards that are a few sets: whatever fails, whenever."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.agreement.attempts import Attempts
from mempool.agreement.step import StepOfTables, TableStep
from mempool.agreement.step_events import (
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
    SentAgain,
)
from mempool.errors import Internal, StepConflict
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
        if first <= self.over and first not in self.decided:
            raise StepConflict("dropped")
        if all(self.has(shard, part) for part in parts):
            return [PreparedPart(stamp=STAMP, applied=True) for _ in parts]
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
        assert first in self.decided
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


@pytest.mark.parametrize("place", PLACES)
def test_a_step_is_two_rounds_and_one_where_one_shard_has_all(place: str) -> None:
    client = Client(place)
    assert isinstance(client.go("decided"), Reached)
    assert client.kinds() == (["Commit"] if place == "one" else ["Prepare", "Commit"])
    assert client.step.state == "decided"
    assert isinstance(client.go("applied"), Reached)
    client.assert_applied_once()
    # One message a shard and phase; those that gates number go after them.
    assert client.kinds()[2:] == {"one": [], "same": ["Apply"], "apart": ["Apply"] * 2, "crossed": ["Apply"] * 2}[place]


def test_prepared_with_a_norm_is_asked_once_and_again_only_for_a_norm() -> None:
    client = Client("same")
    assert isinstance(client.go("prepared", decide=False), Reached)
    assert isinstance(client.go("prepared", decide=False, want_norm=True), Reached)
    assert isinstance(client.go("prepared", decide=False, want_norm=True), Reached)
    assert client.step.norm(2) == (6.0, True, 0.0)
    assert isinstance(client.go("prepared", decide=False, want_norm=True, norm_order=1.0), Reached)
    assert client.step.norm(2) == (6.0, True, 9.0)
    assert isinstance(client.go("decided"), Reached)
    assert client.kinds() == ["Prepare", "Prepare", "Prepare", "Commit"]


def test_what_is_missing_is_sent_to_those_who_miss_it_alone() -> None:
    client = Client("same")
    client.shards.forget(1)
    client.go("decided")
    assert client.kinds() == ["Prepare", "SendAgain", "Prepare", "Commit"]
    again, prepare = client.shards.sent[1], client.shards.sent[2]
    assert isinstance(again, SendAgain)
    assert isinstance(prepare, Prepare)
    assert again.missing == {table_id: {1: SEQUENCES} for table_id in (1, 2, 3)}
    assert list(prepare.to) == [1]


def test_a_table_held_off_ends_the_others_prepare_and_is_waited_for_there_alone() -> None:
    client = Client("same")
    client.shards.held_off = {1}
    client.go("decided")
    assert client.kinds() == ["Prepare", "EndPrepare", "Prepare", "Prepare", "Commit"]
    _, ended, waited, anew, _ = client.shards.sent
    assert isinstance(ended, EndPrepare)
    assert isinstance(waited, Prepare)
    assert isinstance(anew, Prepare)
    assert (list(ended.to), list(waited.to), waited.wait, list(anew.to), anew.wait) == (
        [0, 2],
        [1],
        True,
        [0, 2],
        False,
    )


def test_copies_that_come_late_neither_end_nor_begin_anything() -> None:
    """What is decided stays prepared until it is applied; while a shard waits for a move, nothing else is prepared."""
    client = Client("same")
    shards = client.shards
    shards.held_off = {1}

    def late() -> None:
        for action in list(shards.sent) * 2:
            client.again(action)
            assert not (isinstance(shards.sent[-1], EndPrepare) and shards.prepared)
            for part in (part for parts in shards.decided.values() for part in parts):
                for shard in PLACES["same"][part.table_id]:
                    assert shards.has(shard, part) or (shard, part.step_id.step) in shards.prepared

    client.in_between = late
    assert isinstance(client.go("applied"), Reached)
    assert client.kinds() == ["Prepare", "EndPrepare", "Prepare", "Prepare", "Commit", "Apply"]
    client.assert_applied_once()


def test_every_prepare_has_a_higher_number_and_an_end_names_the_newest() -> None:
    client = Client("same")
    client.shards.held_off = {1}
    client.go("decided")
    numbers = [each.attempt for each in client.shards.sent if isinstance(each, Prepare | EndPrepare)]
    assert numbers == [1, 1, 2, 3]


def test_a_lost_answer_means_the_same_commit_again_whatever_is_said_then() -> None:
    client = Client("same")
    client.lost = lambda: isinstance(client.shards.sent[-1], Commit)
    client.go("decided")
    assert client.step.state == "in doubt"
    client.lost = lambda: False
    client.step.handle(Decided(numbers={1: (9.0, 9.0)}))
    client.shards.move("crossed")
    client.go("applied", decide=False)
    assert [action for action in client.kinds() if action == "Prepare"] == ["Prepare"]
    client.assert_applied_once()


def test_a_dropped_step_goes_on_under_the_next_number() -> None:
    client = Client("same")
    client.go("prepared", decide=False)
    client.shards.over = 1
    assert isinstance(client.go("applied"), Reached)
    assert client.kinds()[1:4] == ["Commit", "Renumber", "Prepare"]
    assert {table.step_id.step for table in client.step.tables.values()} == {2}
    client.assert_applied_once()


def test_a_step_that_is_always_dropped_is_no_endless_loop() -> None:
    client = Client("same")
    client.shards.over = 1_000
    failed = client.go("decided")
    assert isinstance(failed, Fail)
    assert str(failed.error) == "dropped"


def test_shards_that_forget_again_and_again_are_no_endless_loop() -> None:
    client = Client("same")
    client.in_between = lambda: client.shards.forget(1)
    failed = client.go("decided")
    assert isinstance(failed, Fail)
    assert isinstance(failed.error, Internal)
    assert "after 5 rounds of sending them again" in str(failed.error)
    client = Client("same")
    client.go("decided")
    client.in_between = lambda: client.shards.prepared.discard((1, 1))
    client.shards.prepared.discard((1, 1))
    failed = client.go("applied")
    assert isinstance(failed, Fail)
    assert "shards [1] forget again and again" in str(failed.error)


def test_a_step_that_somebody_else_committed_is_told() -> None:
    client = Client("same")
    for table_id, table in client.step.tables.items():
        client.shards.applied[1, table_id] = [Part(table_id=table_id, step_id=table.step_id, sequences=(7,))]
    failed = client.go("decided")
    assert isinstance(failed, Fail)
    assert isinstance(failed.error, StepConflict)
    assert "comes with a higher generation" in str(failed.error)


def test_numbers_that_are_refused_leave_all_open() -> None:
    step = StepOfTables([TableStep(table_id=1, step_id=StepId(group="g", rank=0, step=1), sequences=(1,))])
    step.handle(Placed(owners=owners("one")[:1]))
    step.handle(Begun())
    step.handle(Decided(numbers={1: (0.1, 1.0)}))
    assert isinstance(step.next("decided"), Commit)
    step.handle(CommitSent())
    step.handle(CommitInvalid())
    assert step.state == "open"
    step.handle(Begun())
    step.handle(Decided(numbers={1: (0.7, 1.0)}))
    commit = step.next("decided")
    assert isinstance(commit, Commit)
    assert commit.parts[0].lr == 0.7


def test_owners_of_keys_alone_are_asked_for_no_updates() -> None:
    step = StepOfTables([TableStep(table_id=1, step_id=StepId(group="g", rank=0, step=1), sequences=(1,))])
    step.handle(Placed(owners=(Owners(table_id=1, shards=(0, 1), holders=frozenset({1}), view=0),)))
    step.handle(Begun())
    prepare = step.next("prepared")
    assert isinstance(prepare, Prepare)
    assert {shard: parts[0].sequences for shard, parts in prepare.to.items()} == {0: (), 1: (1,)}


def test_a_table_that_was_dropped_leaves_the_step_to_the_others() -> None:
    client = Client("crossed")
    client.go("decided")
    client.step.handle(Gone(table_id=2))
    assert isinstance(client.go("applied", decide=False), Reached)
    assert list(client.step.tables) == [1, 3]
    client.assert_applied_once()


@given(
    place=st.sampled_from(sorted(PLACES)),
    tables=st.sampled_from([(1,), (1, 2), (1, 2, 3), (2, 3)]),
    prepare_first=st.booleans(),
    losses=st.lists(st.booleans(), max_size=25),
    happenings=st.lists(
        st.one_of(
            st.none(),
            st.tuples(st.just("forget"), st.integers(0, 3)),
            st.tuples(st.just("hold off"), st.integers(0, 3)),
            st.tuples(st.just("drop"), st.just(0)),
            st.tuples(st.just("come late"), st.integers(0, 30)),
            st.tuples(st.just("move"), st.sampled_from(sorted(PLACES))),
        ),
        max_size=25,
    ),
)
@settings(deadline=None, max_examples=300)
def test_whatever_happens_a_step_is_applied_once_everywhere(
    place: str, tables: tuple[int, ...], prepare_first: bool, losses: list[bool], happenings: list[Any]
) -> None:
    client = Client(place, tables=tables)
    shards = client.shards

    def happen() -> None:
        what, which = (happenings.pop() if happenings else None) or ("", 0)
        first = next(iter(client.step.tables.values())).step_id.step
        if what == "forget":
            shards.forget(which)
        elif what == "hold off":
            shards.held_off.add(which)
        elif what == "come late":
            for action in shards.sent[-which:]:
                client.again(action)
        elif what == "drop" and first not in shards.decided:
            shards.over = first
            shards.prepared.clear()
        elif what == "move" and (first in shards.decided or not shards.prepared):
            shards.move(which)

    client.in_between = happen
    client.lost = lambda: bool(losses) and losses.pop()
    if prepare_first:
        client.go("prepared", decide=False)
    for goal in ["decided"] * 10 + ["applied"] * 10:
        client.go(goal)
    losses.clear()
    happenings.clear()
    shards.held_off.clear()
    assert isinstance(client.go("decided"), Reached)
    decided = len(shards.sent)
    assert isinstance(client.go("applied"), Reached)
    assert len(shards.sent) - decided <= 8
    client.assert_applied_once()
    commits = [action for action in shards.sent if isinstance(action, Commit)]
    assert all((part.lr, part.grad_scale) == NUMBERS[part.table_id] for commit in commits for part in commit.parts)
