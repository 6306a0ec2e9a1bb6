"""Steps are applied by their versions, whatever the order they are heard of in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.agreement import order as orders
from mempool.agreement.order import NOBODY, Order
from mempool.errors import Overloaded, StepConflict
from mempool.types import DecidedStep, StepId


def _step(number: int, version: int = 0, sequences: tuple[int, ...] = ()) -> DecidedStep:
    step_id = StepId(group=f"group {number}", rank=0, step=1)
    return DecidedStep(table_id=1, version=version, step_id=step_id, lr=number / 8, grad_scale=1.0, sequences=sequences)


def _apply(order: Order) -> list[DecidedStep]:
    applied = []
    while (step := order.next()) is not None:
        applied.append(step)
        order.did()
    return applied


def test_a_gate_gives_each_step_one_number() -> None:
    gate = Order(4)
    first, second = gate.number(_step(1)), gate.number(_step(2))
    assert [first.version, second.version, gate.number(_step(1)).version] == [5, 6, 5]
    assert (gate.numbered, gate.applied) == (6, 4)
    assert gate.find(first.step_id) == first
    assert [step.version for step in _apply(gate)] == [5, 6]
    assert gate.find(first.step_id) is None
    assert (gate.numbered, gate.applied, gate.any_waiting) == (6, 6, False)
    assert gate.after(4) == (first, second)
    assert gate.after(5) == (second,)


@given(st.permutations(range(1, 9)), st.lists(st.integers(1, 8), max_size=8))
def test_any_order_of_arrival_is_applied_in_the_order_of_versions(arrivals: list[int], repeats: list[int]) -> None:
    order, applied = Order(0), []
    for version in (*arrivals, *repeats):
        order.add(_step(version, version))
        assert order.lacks == (order.any_waiting and order.next() is None)
        applied += [step.version for step in _apply(order)]
        assert order.applied == len(applied)
    assert applied == list(range(1, 9))


@given(st.sets(st.integers(1, 12)), st.integers(0, 12), st.integers(1, 12))
def test_an_owner_that_missed_some_learns_them_of_the_gate(heard: set[int], most: int, at_once: int) -> None:
    """Some at a time; what it has heard already stays."""
    gate, owner = Order(0), Order(0)
    for number in range(1, 13):
        gate.number(_step(number))
        if number <= most:
            gate.did()
    for version in heard:
        owner.add(_step(version, version))
    applied = _apply(owner)
    for _ in range(12):
        owner.learn(gate.numbered, gate.after(owner.applied)[:at_once])
        applied += _apply(owner)
    assert [(step.version, step.step_id) for step in applied] == [
        (version, _step(version).step_id) for version in range(1, 13)
    ]


def test_what_the_gate_has_forgotten_counts_as_steps_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "MAX_KEPT", 3)
    gate = Order(0)
    for number in range(1, 8):
        gate.number(_step(number))
        gate.did()
    owner = Order(4 - 1)
    owner.learn(gate.numbered, gate.after(3))
    assert [step.step_id == NOBODY for step in _apply(owner)] == [True, False, False]  # and no further than it may wait
    owner = Order(5)
    owner.learn(7, ())
    assert [step.step_id for step in _apply(owner)] == [NOBODY, NOBODY]


def test_a_step_of_nobody_gives_way_to_the_one_it_stood_for() -> None:
    order = Order(0)
    order.learn(2, ())
    order.add(_step(2, 2))
    assert [step.step_id for step in _apply(order)] == [NOBODY, _step(2).step_id]


@given(st.sets(st.integers(1, 6)), st.permutations(range(1, 7)))
def test_what_is_not_prepared_is_not_learned_and_holds_up_what_comes_after(gone: set[int], again: list[int]) -> None:
    """Until its trainer comes with it; each is applied once, in order, and none that was not prepared."""
    gate, owner = Order(0), Order(0)
    for number in range(1, 7):
        gate.number(_step(number))
    prepared = {_step(number).step_id for number in range(1, 7) if number not in gone}
    refused = owner.learn(gate.numbered, gate.after(0), prepared=lambda step_id: step_id in prepared)
    assert (refused.version if refused else None) == min(gone, default=None)
    applied = _apply(owner)
    assert len(applied) == min(gone, default=7) - 1
    for number in again:
        if number in gone:
            prepared.add(_step(number).step_id)
            owner.add(_step(number, number))
            applied += _apply(owner)
    assert [(step.version, step.step_id) for step in applied] == [(n, _step(n).step_id) for n in range(1, 7)]


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "MAX_KEPT", 4)
    monkeypatch.setattr(orders, "MAX_WAITING", 3)
    order = Order(0)
    with pytest.raises(Overloaded, match="version 5 of table 1 cannot wait: the shard is at version 0"):
        order.add(_step(5, 5))
    for version in (2, 3, 4):
        order.add(_step(version, version))
    for refused in (lambda: order.add(_step(1, 1)), lambda: order.number(_step(9)), lambda: order.require_room(1)):
        with pytest.raises(Overloaded, match="3 steps wait already"):
            refused()
    assert [step.version for step in order.waiting()] == [2, 3, 4]
    gate = Order(0)
    for number in range(10):
        gate.number(_step(number))
        gate.did()
    assert [step.version for step in gate.after(0)] == [7, 8, 9, 10]


def test_sequences_are_not_kept() -> None:
    """Thousands of steps of thousands of updates each would be much to keep, and nobody needs them."""
    order = Order(0)
    order.number(_step(1, sequences=tuple(range(1000))))
    order.did()
    order.add(_step(2, 2, sequences=tuple(range(1000))))
    assert [step.sequences for step in order.after(0)] == [(), ()]


def test_a_version_is_of_one_step() -> None:
    order = Order(0)
    order.add(_step(1, 2))
    with pytest.raises(StepConflict, match="version 2 of table 1 is of step 1 of rank 0 of group 'group 1'"):
        order.add(_step(7, 2))
    assert order.waiting() == (_step(1, 2),)


def test_pages_that_come_bring_their_version() -> None:
    order = Order(0)
    for version in (2, 5):
        order.add(_step(version, version))
    order.moved_to(4)
    assert (order.applied, order.numbered, order.after(0)) == (4, 5, (_step(5, 5),))
    assert order.find(_step(2).step_id) is None
    assert [step.version for step in _apply(order)] == [5]
