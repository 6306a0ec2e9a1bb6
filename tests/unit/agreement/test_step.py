"""A step over tables and shards, by events alone, against shards that are a few sets: whatever fails, whenever."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.agreement.step import MAX_ROUNDS, StepOfTables, TableStep
from mempool.agreement.step_events import (
    Begun,
    Commit,
    CommitInvalid,
    CommitSent,
    Decided,
    EndPrepare,
    Fail,
    Gone,
    Owners,
    Part,
    Placed,
    Prepare,
    PrepareAnswered,
    Reached,
    SendAgain,
    SentAgain,
)
from mempool.errors import Internal, StepConflict
from mempool.types import PreparedPart, StepId
from tests.unit.agreement.step_by_events import NUMBERS, PLACES, SEQUENCES, STAMP, Client, owners


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


def test_a_commit_in_one_phase_that_misses_updates_may_still_be_decided() -> None:
    """By a copy of it that comes once they are there: so it is neither dropped nor committed by other numbers."""
    client = Client("one", held=False)
    client.lost = lambda: isinstance(client.shards.sent[-1], SendAgain)
    client.go("decided")
    assert client.kinds() == ["Commit", "SendAgain"]
    assert client.step.state == "in doubt"
    client.step.handle(Decided(numbers={1: (9.0, 9.0)}))
    client.lost = lambda: False
    assert isinstance(client.go("applied", decide=False), Reached)
    assert client.kinds()[2:] == ["SendAgain", "Commit"]
    client.assert_applied_once()


def test_a_dropped_step_goes_on_under_the_next_number() -> None:
    client = Client("same")
    client.go("prepared", decide=False)
    client.shards.over = 1
    assert isinstance(client.go("applied"), Reached)
    assert client.kinds()[1:4] == ["Commit", "Renumber", "Prepare"]
    assert {table.step_id.step for table in client.step.tables.values()} == {2}
    client.assert_applied_once()


@pytest.mark.parametrize(("place", "begins"), [("same", "Prepare"), ("one", "Commit")])
def test_a_step_that_was_dropped_while_its_updates_are_sent_again_goes_on_under_the_next_number(
    place: str, begins: str
) -> None:
    """Its trainer was silent after it had heard that they are missing (simulation, seed 4017)."""
    client = Client(place, held=False)

    def silent() -> None:
        client.shards.over = int(bool(client.shards.sent))

    client.in_between = silent
    assert isinstance(client.go("applied"), Reached)
    asked_again = ["Commit"] if place == "one" else []  # in doubt: the decider itself is to say that it is dropped
    assert client.kinds()[: 3 + len(asked_again)] == [begins, "SendAgain", *asked_again, "Renumber"]
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


def test_updates_that_pages_leave_behind_are_sent_as_often_as_these_move() -> None:
    step = StepOfTables([TableStep(table_id=1, step_id=StepId(group="g", rank=0, step=1), sequences=(1,))])
    step.handle(Begun())

    def missed() -> None:
        prepare = step.next("prepared")
        assert isinstance(prepare, Prepare)
        reply = (PreparedPart(stamp=STAMP, missing=(1,)),)
        step.handle(PrepareAnswered(shard=0, parts=prepare.to[0], reply=reply, want_norm=False, norm_order=0.0))

    def sent_again() -> None:
        assert isinstance(step.next("prepared"), SendAgain)
        step.handle(SentAgain())

    for epoch in range(1, 3 * MAX_ROUNDS):
        step.handle(Placed(owners=owners("one", epoch)[:1]))
        missed()
        sent_again()
    for _ in range(MAX_ROUNDS - 1):  # without a move not so often
        missed()
        sent_again()
    missed()
    assert isinstance(step.next("prepared"), Fail)


def test_a_table_that_was_dropped_leaves_the_step_to_the_others() -> None:
    client = Client("crossed")
    client.go("decided")
    client.step.handle(Gone(table_id=2))
    assert isinstance(client.go("applied", decide=False), Reached)
    assert list(client.step.tables) == [1, 3]
    client.assert_applied_once()


@given(
    place=st.sampled_from(["same", "apart", "crossed"]),
    heard=st.sets(st.sampled_from([2, 3])),
    over=st.booleans(),
    dropped=st.booleans(),
    losses=st.lists(st.booleans(), max_size=12),
    forgotten=st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=6),
)
@settings(deadline=None, max_examples=300)
def test_a_lost_decider_has_nothing_applied_twice_whoever_has_heard_of_its_decision(
    place: str, heard: set[int], over: bool, dropped: bool, losses: list[bool], forgotten: list[int | None]
) -> None:
    client = Client(place)
    shards = client.shards
    client.lost = lambda: isinstance(shards.sent[-1], Commit)
    client.go("decided")
    assert client.step.state == "in doubt"
    commit = shards.sent[-1]
    assert isinstance(commit, Commit)
    shards.applied.clear()
    parts = tuple(
        Part(table_id=each.table_id, step_id=each.step_id, sequences=SEQUENCES, lr=each.lr, grad_scale=each.grad_scale)
        for each in commit.parts[1:]
    )
    shards.lose_decider(1, parts, heard, dropped=dropped)
    client.step.handle(Gone(table_id=1))
    shards.over = int(over)
    client.lost = lambda: bool(losses) and losses.pop()

    forgot: list[int] = []

    def happen() -> None:
        if forgotten and (which := forgotten.pop()) is not None:
            shards.forget(which)
            forgot.append(which)

    client.in_between = happen
    for _ in range(20):
        client.go("decided")
    losses.clear()
    assert isinstance(client.go("applied"), Reached)
    assert set(client.apart) <= heard
    for table_id in (2, 3):
        for shard in PLACES[place][table_id]:
            (part,) = shards.applied[shard, table_id]
            number = part.step_id.step
            if table_id in heard:
                assert number == 1
            elif over:
                assert number > 1
            elif not forgot:  # a decider that has forgotten what was prepared refuses that number
                assert number == 1
            assert (part.lr, part.grad_scale) == NUMBERS[table_id]


def test_a_number_changes_only_when_every_gate_was_asked() -> None:
    """Each alone: one refusal is that of all parts of a message."""
    client = Client("same")
    shards = client.shards
    client.lost = lambda: isinstance(shards.sent[-1], Commit)
    client.go("decided")
    client.lost = lambda: False
    client.step.handle(Gone(table_id=1))
    shards.decided.clear()
    shards.applied.clear()
    shards.over = 1
    shards.sent.clear()
    assert isinstance(client.go("applied"), Reached)
    assert client.kinds()[:3] == ["Prepare", "Prepare", "Renumber"]
    asked = [each for each in shards.sent if isinstance(each, Prepare)][:2]
    assert [[part.table_id for parts in each.to.values() for part in parts] for each in asked] == [[2], [3]]


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
