import pytest
import torch

from mempool.errors import RequestTooLarge
from mempool.shard.steps import held
from mempool.shard.steps.held import AppliedLedger, Budget, HeldUpdate, HeldUpdates, PreparedStep, in_canonical_order
from mempool.types import Ledger, StepId
from mempool.types.bags import Bags


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _step(step: int, group: str = "a", rank: int = 0) -> StepId:
    return StepId(group=group, rank=rank, step=step)


def _update(ids: list[int], lengths: list[int], weights: list[float] | None = None, start: float = 0.0) -> HeldUpdate:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    grads = torch.arange(2.0 * len(lengths)).view(-1, 2) + start
    return HeldUpdate(Bags(torch.tensor(ids), torch.tensor(weights) if weights else None, offsets), grads)


def _prepared(step: int) -> PreparedStep:
    return PreparedStep(step=step, sequences=(), want_norm=False, squared_norm=0.0, finite=True, reductions=None)


def test_pairs_come_in_order_of_sequence_bag_and_pair() -> None:
    pairs = in_canonical_order(
        [_update([4, 5, 6], [1, 0, 2]), _update([7, 8], [2], [0.5, -1.0], start=100.0)],
        width=2,
        device=torch.device("cpu"),
    )
    assert pairs.ids.tolist() == [4, 5, 6, 7, 8]
    assert pairs.weights is not None
    assert pairs.weights.tolist() == [1.0, 1.0, 1.0, 0.5, -1.0]
    assert pairs.bags.tolist() == [0, 2, 2, 3, 3]
    assert pairs.grads.tolist() == [[0, 1], [2, 3], [4, 5], [100, 101]]


def test_without_any_weights_there_are_none() -> None:
    pairs = in_canonical_order([_update([1], [1]), _update([2], [1])], width=2, device=torch.device("cpu"))
    assert pairs.weights is None
    assert in_canonical_order([], width=2, device=torch.device("cpu")).grads.shape == (0, 2)


def test_the_budget_is_shared_refuses_and_is_given_back() -> None:
    update = _update([1, 2], [2])
    budget = Budget(2 * update.num_bytes)
    first = HeldUpdates(budget=budget, lease_s=10.0, clock=Clock())
    second = HeldUpdates(budget=budget, lease_s=10.0, clock=Clock())
    first.hold(_step(1), 0, update)
    second.hold(_step(1), 0, update)
    with pytest.raises(RequestTooLarge, match=f"holds {budget.num_bytes} bytes.*may hold {budget.limit_bytes}"):
        first.hold(_step(1), 1, update)
    assert (len(first), len(second)) == (1, 1)
    second.clear()
    first.hold(_step(1), 1, update)
    assert first.discard(_step(1)) == 2
    assert budget.num_bytes == 0


def test_dead_ranks_make_room() -> None:
    clock, update = Clock(), _update([1, 2], [2])
    held = HeldUpdates(budget=Budget(update.num_bytes), lease_s=10.0, clock=clock)
    held.hold(_step(1, "dead"), 0, update)
    held.set_prepared(_step(1, "dead"), _prepared(1))
    clock.now_s = 11.0
    held.hold(_step(1, "alive"), 0, update)
    assert held.get(_step(1, "dead"), 0) is None
    assert held.get(_step(1, "alive"), 0) is update
    assert not list(held.prepared())


def test_a_rank_that_speaks_is_alive() -> None:
    clock, update = Clock(), _update([1, 2], [2])
    held = HeldUpdates(budget=Budget(update.num_bytes), lease_s=10.0, clock=clock)
    held.hold(_step(1), 0, update)
    clock.now_s = 9.0
    held.touch(_step(1))
    clock.now_s = 18.0
    held.expire()
    assert len(held) == 1
    clock.now_s = 20.0
    held.expire()
    assert len(held) == 0


def test_a_decided_step_takes_older_ones_with_it() -> None:
    held = HeldUpdates(budget=Budget(2**20), lease_s=10.0, clock=Clock())
    for step, sequence in ((1, 0), (2, 1), (3, 2)):
        held.hold(_step(step), sequence, _update([1], [1]))
    held.hold(_step(1, rank=1), 0, _update([1], [1]))
    held.set_prepared(_step(2), _prepared(2))
    held.decided(_step(2))
    assert held.get(_step(3), 2) is not None
    assert held.get(_step(1, rank=1), 0) is not None
    assert len(held) == 2
    assert held.prepared_step(_step(2)) is None


def test_a_newer_step_ends_an_older_prepare_only() -> None:
    held = HeldUpdates(budget=Budget(2**20), lease_s=10.0, clock=Clock())
    held.set_prepared(_step(5), _prepared(5))
    held.give_up_older(_step(4))
    held.give_up_older(_step(5))
    assert held.prepared_step(_step(9)) is not None
    held.give_up_older(_step(6))
    assert held.prepared_step(_step(9)) is None


def test_the_ledger_knows_every_step_up_to_the_newest() -> None:
    ledger = AppliedLedger(None)
    ledger.add(_step(4), (1, 2))
    assert [ledger.has(_step(step)) for step in (3, 4, 5)] == [True, True, False]
    assert not ledger.has(_step(4, "b"))
    assert not ledger.has(_step(4, rank=1))
    assert ledger.snapshot() == Ledger(version=1, updates_applied=2, entries={("a", 0): 4})


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


def test_dead_ranks_of_another_table_make_room_too() -> None:
    update, clock = _update([1, 2], [2]), Clock()
    budget = Budget(update.num_bytes)
    first = HeldUpdates(budget=budget, lease_s=10.0, clock=clock)
    second = HeldUpdates(budget=budget, lease_s=10.0, clock=clock)
    first.hold(_step(1), 0, update)
    clock.now_s = 9.0
    with pytest.raises(RequestTooLarge):
        second.hold(_step(1), 0, update)
    clock.now_s = 11.0
    second.hold(_step(1), 0, update)
    assert (len(first), len(second), budget.num_bytes) == (0, 1, update.num_bytes)


def test_the_ledger_forgets_the_ranks_that_have_been_silent_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_MAX_LEDGER_ENTRIES", 3)
    ledger = AppliedLedger(None)
    for group in ("a", "b", "c"):
        ledger.add(_step(1, group), (0,))
    ledger.add(_step(2, "a"), (1,))
    ledger.add(_step(1, "d"), (0,))
    assert [ledger.has(_step(1, group)) for group in "abcd"] == [True, False, True, True]
    assert list(ledger.snapshot().entries) == [("c", 0), ("a", 0), ("d", 0)]  # in this order they move with pages
    assert (ledger.version, ledger.updates_applied) == (5, 5)
