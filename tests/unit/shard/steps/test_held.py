from contextlib import suppress

import pytest
import torch

from mempool.errors import Overloaded, RequestTooLarge
from mempool.shard.steps.budget import ENTRY_BYTES, Budget
from mempool.shard.steps.held import HeldUpdate, HeldUpdates, PreparedStep
from mempool.types import StepId
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


def _budget(updates: int, update: HeldUpdate) -> Budget:
    """With room for so many such updates, each of another rank, and no more."""
    return Budget((updates * (update.num_bytes + 2 * ENTRY_BYTES + 80)) * 8 // 7)


def _prepared(
    step: int, sequences: tuple[int, ...] = (), *, group: str = "a", decided_here: bool = False
) -> PreparedStep:
    return PreparedStep(
        step_id=_step(step, group),
        decider=(1, step),
        decided_here=decided_here,
        sequences=sequences,
        want_norm=False,
        squared_norm=0.0,
        finite=True,
        reductions=None,
    )


def test_the_budget_is_shared_refuses_and_is_given_back() -> None:
    update = _update([1, 2], [2])
    budget = _budget(2, update)
    first = HeldUpdates(budget=budget, lease_s=10.0, clock=Clock())
    second = HeldUpdates(budget=budget, lease_s=10.0, clock=Clock())
    first.hold(_step(1), 0, update)
    second.hold(_step(1, "b"), 0, update, caller="ipv4:10.0.0.3:5123")
    with pytest.raises(
        Overloaded,
        match=rf"hold {budget.held_bytes:,} bytes.*of {budget.limit_bytes:,}.*Most is held by .*ipv4:10.0.0.3:5123 \(",
    ):
        first.hold(_step(1, "c"), 1, update)
    assert (len(first), len(second)) == (1, 1)
    second.clear()
    first.hold(_step(1, "c"), 1, update)
    assert first.discard(_step(1)) == first.discard(_step(1, "c")) == 1
    assert budget.held_bytes == 0


def test_one_owner_leaves_room_for_another() -> None:
    update = _update([1, 2], [2])
    budget = Budget(100 * update.num_bytes)
    held = HeldUpdates(budget=budget, lease_s=10.0, clock=Clock())
    fitting = 0
    with suppress(RequestTooLarge):
        for fitting in range(100):
            held.hold(_step(1, f"group {fitting}"), fitting, update, caller="ipv4:1")  # names make no other owner
    most = budget.held_bytes
    assert 50 < fitting < 75
    assert budget.limit_bytes * 0.7 < most <= budget.share() < budget.held_limit
    held.hold(_step(1, "other"), 0, update, caller="ipv4:2")
    with pytest.raises(RequestTooLarge, match=r"ipv4:1 holds .* one trainer may hold .* commit more often"):
        held.hold(_step(1, "group 0"), 100, update, caller="ipv4:1")


def test_a_rank_that_holds_all_it_may_can_still_prepare() -> None:
    update = _update([1, 2], [2])
    held = HeldUpdates(budget=_budget(1, update), lease_s=10.0, clock=Clock())
    held.hold(_step(1), 0, update)
    with pytest.raises(Overloaded):
        held.set_prepared(_step(1, "b"), _prepared(1, sequences=(0,)))
    held.set_prepared(_step(1), _prepared(1, sequences=(0,)))
    assert held.prepared_step(_step(1)) is not None


def test_what_is_counted_is_given_back() -> None:
    budget, clock = Budget(2**20), Clock()
    held = HeldUpdates(budget=budget, lease_s=10.0, clock=clock)
    step = _step(2, "a" * 200)
    held.set_prepared(_step(1), _prepared(1))
    held.hold(step, 0, _update([1], [1]))
    held.hold(step, 1, _update([1], [1]))
    held.set_prepared(step, _prepared(2, sequences=tuple(range(100))))
    held.set_prepared(step, _prepared(2, sequences=(0, 1)))
    assert budget.held_bytes > 2 * _update([1], [1]).num_bytes + 3 * 512
    assert budget.kept_bytes == 0
    held.decided(step)
    held.discard(_step(1))
    assert (budget.held_bytes, len(held), held.any_prepared) == (0, 0, False)
    held.discard(_step(7))
    held.decided(_step(7))
    assert not held._ranks  # no empty entry stays


def test_the_time_of_a_discard_does_not_grow_with_what_else_is_held() -> None:
    """Only the steps named are walked: what they hold lies by step."""
    held = HeldUpdates(budget=Budget(2**30), lease_s=10.0, clock=Clock())
    update = _update([1], [1])
    for step in range(200):
        held.hold(_step(step), step, update)
    steps = held._ranks["a", 0, 0].updates
    assert sorted(steps) == list(range(200))
    assert held.discard(_step(3)) == 1
    held.decided(_step(100))
    assert sorted(steps) == list(range(101, 200))


def test_dead_ranks_make_room() -> None:
    clock, update = Clock(), _update([1, 2], [2])
    held = HeldUpdates(budget=_budget(1, update), lease_s=10.0, clock=clock)
    held.hold(_step(1, "dead"), 0, update)
    clock.now_s = 11.0
    held.hold(_step(1, "alive"), 0, update)
    assert held.get(_step(1, "dead"), 0) is None
    assert held.get(_step(1, "alive"), 0) is update


def test_what_dead_ranks_prepared_stays_and_is_told() -> None:
    """It may be decided: that is asked for, at its decider."""
    clock = Clock()
    held = HeldUpdates(budget=Budget(2**20), lease_s=10.0, clock=clock)
    held.hold(_step(1, "dead"), 0, _update([1], [1]))
    held.set_prepared(_step(1, "dead"), _prepared(1, (0,), group="dead"))
    clock.now_s = 5.0
    held.set_prepared(_step(1, "alive"), _prepared(1, group="alive"))
    assert held.silent() == ()
    clock.now_s = 11.0
    held.expire()
    assert [prepared.step_id.group for prepared in held.prepared()] == ["dead", "alive"]
    assert [prepared.step_id.group for prepared in held.silent()] == ["dead"]
    assert (held.lives(_step(1, "dead")), held.lives(_step(1, "alive")), held.lives(_step(1, "who"))) == (
        False,
        True,
        False,
    )
    assert held.get(_step(1, "dead"), 0) is not None
    assert held.discard(_step(1, "dead")) == 1
    held.discard(_step(1, "alive"))
    assert (held.budget.held_bytes, held.any_prepared) == (0, False)


def test_a_heartbeat_is_of_the_newest_generation() -> None:
    clock = Clock()
    held = HeldUpdates(budget=Budget(2**20), lease_s=10.0, clock=clock)
    old, new = _step(1), StepId(group="a", rank=0, step=1, generation=1)
    for step_id in (old, new):
        held.hold(step_id, 0, _update([1], [1]))
    held.hold(new, 1, _update([1], [1]))
    clock.now_s = 9.0
    assert held.heard_of("a", 0) == 2
    assert held.heard_of("b", 0) == 0
    clock.now_s = 12.0
    held.expire()
    assert (held.lives(old), held.lives(new), len(held)) == (False, True, 2)


def test_a_step_is_in_doubt_until_its_decider_was_asked() -> None:
    """Of what a reader waits for: steps prepared before it came that another shard decides."""
    clock = Clock()
    held = HeldUpdates(budget=Budget(2**20), lease_s=10.0, clock=clock)
    clock.now_s = 5.0
    held.set_prepared(_step(1, "here"), _prepared(1, group="here", decided_here=True))
    assert not held.doubtful(9.0)
    for group in ("b", "c"):
        held.set_prepared(_step(1, group), _prepared(1, group=group))
    assert [bool(held.doubtful(since_s)) for since_s in (4.0, 5.0, 6.0)] == [False, True, True]
    held.settle(_step(1, "b"), 6.0)
    assert held.doubtful(6.0)  # of the other one nobody has said anything
    held.settle(_step(1, "c"), 6.0)
    held.settle(_step(2, "c"), 9.0)  # another step
    assert [bool(held.doubtful(since_s)) for since_s in (6.0, 6.5)] == [False, True]
    clock.now_s = 7.0
    held.set_prepared(_step(1, "b"), _prepared(1, (1,), group="b"))  # sent again: it may have been decided before
    assert held.doubtful(6.5)
    for group in ("b", "c"):
        assert held.end_prepare(_step(1, group))
    assert not held.doubtful(9.0)
    assert not held.end_prepare(_step(1, "b"))
    assert not held._settled


def test_a_rank_that_speaks_is_alive() -> None:
    clock, update = Clock(), _update([1, 2], [2])
    held = HeldUpdates(budget=_budget(1, update), lease_s=10.0, clock=clock)
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


def test_dead_ranks_of_another_table_make_room_too() -> None:
    update, clock = _update([1, 2], [2]), Clock()
    budget = _budget(1, update)
    first = HeldUpdates(budget=budget, lease_s=10.0, clock=clock)
    second = HeldUpdates(budget=budget, lease_s=10.0, clock=clock)
    first.hold(_step(1), 0, update)
    clock.now_s = 10.0
    with pytest.raises(Overloaded):
        second.hold(_step(1, "b"), 0, update)
    clock.now_s = 10.1
    second.hold(_step(1, "b"), 0, update)
    assert (len(first), len(second)) == (0, 1)
