import pytest

from mempool.shard.steps import ledger as ledgers
from mempool.shard.steps.ledger import AppliedLedger
from mempool.types import Ledger, StepId


def _step(step: int, group: str = "a", rank: int = 0) -> StepId:
    return StepId(group=group, rank=rank, step=step)


def test_the_ledger_knows_every_step_up_to_the_newest() -> None:
    ledger = AppliedLedger(None)
    ledger.add(_step(4), (1, 2))
    assert [ledger.has(_step(step)) for step in (3, 4, 5)] == [True, True, False]
    assert not ledger.has(_step(4, "b"))
    assert not ledger.has(_step(4, rank=1))
    entry = 4  # which updates they were is not asked again
    assert ledger.snapshot() == Ledger(version=1, updates_applied=2, entries={("a", 0): entry})


def test_only_a_newer_ledger_is_taken_over() -> None:
    ledger = AppliedLedger(Ledger(version=3, updates_applied=5))
    ledger.adopt(Ledger(version=2, updates_applied=9))
    ledger.adopt(None)
    assert ledger.snapshot() == Ledger(version=3, updates_applied=5)
    newer = Ledger(version=4, updates_applied=6, entries={("a", 0): 1})
    ledger.adopt(newer)
    assert ledger.snapshot() == newer
    ledger.add(_step(2), (3,))
    assert newer.entries == {("a", 0): 1}


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
