import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.agreement import ledger as ledgers
from mempool.agreement.ledger import FORGOTTEN, AppliedLedger
from mempool.errors import StepConflict
from mempool.types import DecidedStep, Ledger, LedgerEntry, StepId


def _step(step: int, group: str = "a", rank: int = 0, generation: int = 0) -> StepId:
    return StepId(group=group, rank=rank, step=step, generation=generation)


def _other(table_id: int, step_id: StepId) -> DecidedStep:
    return DecidedStep(table_id=table_id, version=0, step_id=step_id, lr=0.1, grad_scale=1.0)


def test_the_ledger_knows_every_step_up_to_the_newest() -> None:
    ledger = AppliedLedger(None)
    ledger.add(_step(4), (1, 2))
    assert [ledger.has(_step(step)) for step in (3, 4, 5)] == [True, True, False]
    assert not ledger.has(_step(4, "b"))
    assert not ledger.has(_step(4, rank=1))
    entry = LedgerEntry(step=4, version=1)  # which updates they were is not asked again
    assert ledger.snapshot() == Ledger(version=1, updates_applied=2, entries={("a", 0): entry})


def test_only_a_newer_ledger_is_taken_over() -> None:
    ledger = AppliedLedger(Ledger(version=3, updates_applied=5))
    ledger.adopt(Ledger(version=2, updates_applied=9))
    ledger.adopt(None)
    assert ledger.snapshot() == Ledger(version=3, updates_applied=5)
    newer = Ledger(version=4, updates_applied=6, entries={("a", 0): LedgerEntry(step=1, version=4)})
    ledger.adopt(newer)
    assert ledger.snapshot() == newer
    ledger.add(_step(2), (3,))
    assert newer.entries == {("a", 0): LedgerEntry(step=1, version=4)}


def test_the_ledger_forgets_the_ranks_that_have_been_silent_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_ENTRIES", 3)
    ledger = AppliedLedger(None)
    for group in ("a", "b", "c"):
        ledger.add(_step(1, group), (0,))
    ledger.add(_step(2, "a"), (1,))
    ledger.add(_step(1, "d"), (0,))
    assert [ledger.has(_step(1, group)) for group in "abcd"] == [True, False, True, True]
    assert list(ledger.snapshot().entries) == [("c", 0), ("a", 0), ("d", 0)]  # in this order they move with pages
    assert (ledger.version, ledger.updates_applied) == (5, 5)


def test_what_is_refused_pushes_out_nothing_that_was_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends Commits of thousands of ranks that hold nothing: no other client's step is applied twice."""
    monkeypatch.setattr(ledgers, "MAX_ENTRIES", 4)
    ledger = AppliedLedger(None)
    for group in ("a", "b"):
        ledger.add(_step(1, group), (0,))
    ledger.drop(_step(1, "a", generation=1))
    for number in range(100):
        ledger.drop(_step(1, f"refused {number}"))
        if number == 50:
            moved = AppliedLedger(None)
            moved.adopt(ledger.snapshot())
            ledger = moved
    with pytest.raises(StepConflict, match="generation 0, and generation 1 has begun"):
        ledger.applied(_step(1, "a"))
    assert ledger.has(_step(1, "b"))
    assert list(ledger.snapshot().entries)[2:] == [("refused 98", 0), ("refused 99", 0)]
    for group in "cdef":
        ledger.add(_step(1, group), (0,))
    assert list(ledger.snapshot().entries) == [(group, 0) for group in "cdef"]


def test_a_generation_that_is_over_is_refused_and_a_new_one_begins_anew() -> None:
    ledger = AppliedLedger(None)
    ledger.add(_step(9), (0,))
    ledger.add(_step(2, generation=1), (1,))
    assert ledger.applied(_step(2, generation=1)) == 2
    assert ledger.applied(_step(3, generation=1)) == 0
    assert ledger.applied(_step(1, generation=2)) == 0
    with pytest.raises(StepConflict, match="step 9 of rank 0 of group 'a' is of generation 0, and generation 1 has"):
        ledger.applied(_step(9))


def test_the_last_step_of_the_generation_before_is_remembered_and_moves_with_the_ledger() -> None:
    ledger = AppliedLedger(None)
    for generation in range(4):
        ledger.add(_step(5 + generation, generation=generation), ())
    ledger.drop(_step(1, generation=4))
    ledger.drop(_step(1, generation=5))  # that applied nothing before
    for each in (ledger, AppliedLedger(ledger.snapshot())):
        known = [each.entry_of_its_generation(_step(1, generation=generation)) for generation in range(7)]
        found = [entry and (entry.step, entry.version) for entry in known]
        assert found == [None, None, None, (8, 4), None, (0, 0), (0, 0)]


@pytest.mark.parametrize("late", [AppliedLedger.drop, lambda ledger, step_id: ledger.add(step_id, ())])
def test_what_comes_late_of_an_old_generation_takes_no_step_from_the_new_one(late: object) -> None:
    ledger = AppliedLedger(None)
    ledger.add(_step(2, generation=1), ())
    late(ledger, _step(100))  # type: ignore[operator]
    assert [ledger.applied(_step(step, generation=1)) for step in (2, 3, 100)] == [1, 0, 0]


def test_a_step_that_was_dropped_is_never_applied() -> None:
    ledger = AppliedLedger(None)
    ledger.add(_step(2), ())
    ledger.drop(_step(5))
    ledger.drop(_step(4))
    assert ledger.applied(_step(2)) == 1
    for step in (3, 4, 5):
        with pytest.raises(StepConflict, match=f"step {step} .* was dropped"):
            ledger.applied(_step(step))
    assert ledger.applied(_step(6)) == 0
    assert ledger.snapshot().entries == {("a", 0): LedgerEntry(step=2, version=1, dropped=5)}


def test_parts_at_other_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_OTHERS", 10)
    ledger = AppliedLedger(None)
    for number in range(50):
        step_id = _step(1, f"group {number}")
        ledger.add(step_id, (), tuple(_other(table_id, step_id) for table_id in range(3)))
        entries = ledger.snapshot().entries
        assert all(entry.others for entry in entries.values())  # that there were some is known
        assert sum(len(entry.others) for entry in entries.values() if entry.others != (FORGOTTEN,)) <= 10
        assert len(entries[f"group {number}", 0].others) == 3
    assert len(entries) == 50


def test_the_step_count_is_set_at_the_version_it_was_read_at() -> None:
    ledger = AppliedLedger(None)
    ledger.count_steps(7, at_version=0)
    ledger.add(_step(1), ())
    assert ledger.step == 8
    with pytest.raises(StepConflict, match="somebody commits meanwhile"):
        ledger.count_steps(3, at_version=0)
    assert ledger.step == 8


@given(
    st.lists(
        st.tuples(st.sampled_from(["apply", "drop", "move"]), st.integers(0, 1), st.integers(0, 2), st.integers(1, 6)),
        max_size=60,
    )
)
def test_a_step_is_applied_once_or_never(events: list[tuple[str, int, int, int]]) -> None:
    """Whoever asks before each act; the ledger moves now and then."""
    ledger = AppliedLedger(None)
    applied: set[StepId] = set()
    dropped: set[StepId] = set()
    for kind, rank, generation, step in events:
        step_id = _step(step, rank=rank, generation=generation)
        if kind == "move":
            moved = AppliedLedger(None)
            assert moved.adopt(ledger.snapshot()) == (ledger.version > 0)
            ledger = moved if ledger.version else ledger
            continue
        try:
            known = ledger.applied(step_id)
        except StepConflict:
            newest = ledger.entry(step_id).generation
            assert generation < newest or step_id not in applied
            continue
        if known:
            assert known <= ledger.version
        elif kind == "apply":
            assert step_id not in applied | dropped
            ledger.add(step_id, ())
            applied.add(step_id)
            assert ledger.applied(step_id) == ledger.version == len(applied)
        else:
            ledger.drop(step_id)
            dropped.add(step_id)
    assert not applied & dropped


def test_a_new_gate_learns_which_other_parts_the_steps_had_that_it_knows() -> None:
    other = DecidedStep(table_id=2, version=0, step_id=StepId(group="a", rank=0, step=3), lr=0.1, grad_scale=1.0)
    gate, owner = AppliedLedger(None), AppliedLedger(None)
    for ledger, others in ((gate, (other,)), (owner, ())):
        ledger.add(StepId(group="a", rank=0, step=3), (1,), others)
        ledger.add(StepId(group="b", rank=0, step=1), (2,))
    gate.drop(StepId(group="c", rank=0, step=1))
    owner.learn_others(gate.snapshot())
    entries = owner.snapshot().entries
    assert list(entries) == [("a", 0), ("b", 0)]  # and nobody it has not heard of
    assert entries["a", 0].others == (other,)
    owner.add(StepId(group="a", rank=0, step=4), (1,))
    owner.learn_others(gate.snapshot())  # of an older step: that one is not asked for any more
    assert owner.snapshot().entries["a", 0].others == ()
