"""Held updates and the two phases of a commit: repeats, gaps, discards, conflicts, contexts."""

from dataclasses import replace

import pytest
import torch

from mempool.errors import ContextMissing, StalePlacement, StepConflict
from mempool.types import HeartbeatRequest, ResolveReply, ResolveRequest

from .bags import Bags, make_bags
from .driver import Driver, make_schema, same

GRADS = torch.linspace(-1, 1, 40).view(4, 10)


@pytest.mark.parametrize("layout", ["one", "columns", "mixed"])
def test_every_handler_twice(driver: Driver, layout: str) -> None:
    bags = make_bags(1)
    results = []
    for times in (1, 2):
        driver.create(make_schema(), layout)
        for _ in range(times):
            values = driver.gather(bags, lookup_id=77)
        for _ in range(times):
            weight_grad = driver.update(1, 5, GRADS)
        assert [driver.status(shard).updates_held for shard in driver.owners] == [1] * len(driver.owners)
        for _ in range(times):
            prepared = {shard: (r.missing, r.squared_norm, r.finite) for shard, r in driver.prepare(1, [5]).items()}
        for _ in range(times):
            assert all(reply.version == 1 for reply in driver.commit(1, [5]).values())
        for _ in range(times):
            assert set(driver.discard(2).values()) == {0}
        results.append({"values": values, "weight_grad": weight_grad, "prepared": prepared} | driver.contents())
        assert {driver.status(shard).version for shard in driver.owners} == {1}
        assert {driver.status(shard).updates_applied for shard in driver.owners} == {1}
        driver.drop()
    assert same(*results)


def test_an_update_of_an_applied_step_is_answered_and_not_held(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    bags = make_bags(1)
    driver.train(3, {0: (bags, GRADS)})
    before = driver.contents()
    weight_grad = driver.update(3, 0, GRADS)
    values = driver.read()
    expected = torch.stack(
        [
            GRADS[bag] @ values[bags.ids[pair]]
            for bag in range(4)
            for pair in range(int(bags.offsets[bag]), int(bags.offsets[bag + 1]))
        ]
    )
    torch.testing.assert_close(weight_grad, expected)
    driver.update(2, 9, GRADS)
    assert same(driver.contents(), before)
    assert driver.prepare(2, [9])[0].applied
    assert driver.prepare(3, [0])[0].applied
    assert driver.commit(3, [0])[0].version == 1
    assert same(driver.contents(), before)


def test_prepare_reports_what_is_missing(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    bags = make_bags(1)
    driver.gather(bags)
    driver.update(1, 4, GRADS)
    driver.call(driver.host(0).update(driver.update_request(0, 1, 2, GRADS)))
    assert {shard: reply.missing for shard, reply in driver.prepare(1, [2, 4, 9]).items()} == {0: (9,), 1: (2, 9)}
    before = driver.contents()
    with pytest.raises(StepConflict, match="not prepared"):
        driver.call(driver.host(1).commit(driver.commit_request(1, 1, [2, 4, 9], decided=True, version=1)))
    assert same(driver.contents(), before)
    driver.call(driver.host(1).update(driver.update_request(1, 1, 2, GRADS)))
    assert {shard: reply.missing for shard, reply in driver.prepare(1, [4, 2]).items()} == {0: (), 1: ()}
    driver.commit(1, [2, 4])
    assert [driver.status(shard).updates_applied for shard in (0, 1)] == [2, 2]


def test_a_commit_of_other_updates_than_prepared_is_refused(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.update(1, 1, GRADS)
    driver.prepare(1, [0])
    before = driver.read()
    with pytest.raises(StepConflict, match="prepared with updates"):
        driver.commit(1, [0, 1])
    assert torch.equal(driver.read(), before)
    for sequence in (0, 1):
        driver.update(2, sequence, GRADS)
    driver.prepare(2, [0, 1])
    driver.commit(2, [0, 1])
    assert driver.status(0).updates_applied == 2


@pytest.mark.parametrize("one_phase", [False, True])
def test_a_commit_that_its_decider_refuses_is_never_decided_late(driver: Driver, one_phase: bool) -> None:
    """A copy of it may be under way still, while its trainer goes on under the next number."""
    driver.create(make_schema(), "one" if one_phase else "columns")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    if one_phase:
        driver.update(2, 0, GRADS)
        driver.prepare(2, [0])
    refused = driver.commit_request(0, 1, [0], one_phase=one_phase)
    with pytest.raises(StepConflict, match=r"With that the step is over here, too|was dropped"):
        driver.call(driver.host(0).commit(refused))
    if not one_phase:
        driver.update(2, 0, GRADS)
        driver.prepare(2, [0])
    for late in (driver.host(0).prepare(driver.prepare_request(0, 1, [0])), driver.host(0).commit(refused)):
        with pytest.raises(StepConflict, match="was dropped"):
            driver.call(late)
    driver.commit(2, [0])
    assert [driver.status(shard).version for shard in driver.owners] == [1] * len(driver.owners)


def test_a_later_step_takes_the_place_of_one_given_up(driver: Driver) -> None:
    """A client whose Discard was lost goes on with the next step; the old one is over, whatever comes late of it."""
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    driver.update(2, 1, GRADS)
    driver.prepare(2, [1])
    for late in (driver.prepare, driver.commit):
        with pytest.raises(StepConflict, match="step 1 of rank 0 of group 'trainer' was dropped"):
            late(1, [0])
    driver.commit(2, [1])
    status = driver.status(0)
    assert (status.version, status.updates_applied, status.updates_held) == (1, 1, 0)
    assert driver.prepare(1, [0])[0].applied


def test_discard_drops_one_step(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    before = driver.read()
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.update(1, 1, GRADS)
    driver.update(2, 2, GRADS)
    driver.prepare(1, [0, 1])
    assert driver.discard(1)[0] == 2  # the other owner has dropped them when it was told of that
    assert [driver.status(shard).updates_held for shard in (0, 1)] == [1, 1]
    assert driver.discard(1) == {0: 0, 1: 0}
    with pytest.raises(StepConflict):
        driver.commit(1, [0, 1])
    with pytest.raises(StepConflict, match="was dropped: its trainer discarded it"):
        driver.prepare(1, [0])
    assert torch.equal(driver.read(), before)
    assert [driver.status(shard).updates_held for shard in (0, 1)] == [1, 1]


def test_one_phase(driver: Driver) -> None:
    bags = make_bags(1)
    driver.create(make_schema(), "one")
    driver.train(1, {0: (bags, GRADS)})
    expected = driver.contents()
    driver.drop()
    driver.create(make_schema(), "one")
    untouched = driver.contents()
    reply = driver.commit(1, [0], one_phase=True)[0]
    assert (reply.missing, reply.version) == ((0,), 0)
    assert same(driver.contents(), untouched)
    driver.gather(bags)
    driver.update(1, 0, GRADS)
    for _ in range(2):
        reply = driver.commit(1, [0], one_phase=True)[0]
        assert (reply.missing, reply.version) == ((), 1)
    assert same(driver.contents(), expected)


def test_groups_are_apart(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.update(1, 0, GRADS, step_id=driver.step_id(1, "other"))
    assert driver.status(0).updates_held == 2
    driver.prepare(1, [0])
    driver.commit(1, [0])
    status = driver.status(0)
    assert (status.updates_held, status.updates_applied, status.version) == (1, 1, 1)


def test_a_context_can_be_used_again_and_released(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    bags = make_bags(1)
    driver.gather(bags, lookup_id=500)
    first = driver.update(1, 0, GRADS)
    assert torch.equal(driver.update(1, 1, GRADS), first)
    other = make_bags(2, lengths=(2,))
    driver.gather(other, lookup_id=501, release=(500, 123456))
    before = driver.contents()
    driver.lookup_id = 500
    with pytest.raises(ContextMissing, match="500"):
        driver.update(1, 2, GRADS)
    assert same(driver.contents(), before)
    assert torch.equal(driver.update(1, 2, GRADS, bags=bags), first)


def test_a_repeated_update_needs_no_context(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1), lookup_id=510)
    first = driver.update(1, 0, GRADS)
    driver.gather(make_bags(2, lengths=(2,)), lookup_id=511, release=(510,))
    driver.lookup_id = 510
    assert torch.equal(driver.update(1, 0, GRADS), first)


def test_a_lookup_that_is_not_to_be_remembered_is_not(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    bags = make_bags(1)
    driver.gather(bags, remember=False, lookup_id=520)
    with pytest.raises(ContextMissing):
        driver.update(1, 0, GRADS)
    assert driver.status(0).updates_held == 0


def test_a_context_of_another_table_is_not_taken(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1), lookup_id=530)
    driver.drop()
    driver.create(make_schema(), "one")
    with pytest.raises(ContextMissing):
        driver.update(1, 0, GRADS)


def test_resent_bags_count_like_remembered_ones(driver: Driver) -> None:
    bags = make_bags(1)
    results = []
    for resend in (False, True):
        driver.create(make_schema(), "mixed")
        driver.gather(bags)
        weight_grad = driver.update(1, 0, GRADS, bags=bags if resend else None)
        driver.prepare(1, [0])
        driver.commit(1, [0])
        results.append({"weight_grad": weight_grad} | driver.contents())
        driver.drop()
    assert same(*results)


def test_a_frozen_table_answers_weight_gradients_and_holds_nothing(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    bags = make_bags(1)
    driver.gather(bags)
    held = driver.update(1, 0, GRADS)
    before = driver.contents()
    assert torch.equal(driver.update(1, 1, GRADS, hold=False), held)
    assert torch.equal(driver.update(1, 1, GRADS, hold=False, bags=bags), held)
    assert same(driver.contents(), before)
    assert driver.prepare(1, [0, 1])[0].missing == (1,)


def test_weight_gradients_only_when_asked_for(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    request = driver.update_request(0, 1, 0, GRADS, want_weight_grad=False)
    assert driver.call(driver.host(0).update(request)).weight_grad is None
    assert driver.prepare(1, [0])[0].missing == ()


def test_an_update_of_no_bags(driver: Driver) -> None:
    driver.create(make_schema(), "mixed")
    before = driver.read()
    none = Bags(torch.empty(0, dtype=torch.int64), None, torch.zeros(1, dtype=torch.int64))
    assert driver.update(1, 0, torch.empty(0, 10), bags=none).shape == (0,)
    assert all(reply.missing == () for reply in driver.prepare(1, [0]).values())
    driver.commit(1, [0])
    assert torch.equal(driver.read(), before)


def test_a_prepare_that_is_ended_leaves_the_updates(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    assert set(driver.discard(1, keep_updates=True).values()) == {0}
    with pytest.raises(StepConflict, match="not prepared"):
        driver.call(driver.host(1).commit(driver.commit_request(1, 1, [0], decided=True, version=1)))
    assert {reply.missing for reply in driver.prepare(1, [0]).values()} == {()}
    driver.commit(1, [0])
    assert {driver.status(shard).updates_applied for shard in (0, 1)} == {1}


def test_an_old_generation_is_refused_as_soon_as_the_new_one_prepares(driver: Driver) -> None:
    """What it has prepared is not decided any more, and nothing of it is held."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(8, 0, GRADS)
    driver.prepare(8, [0])
    driver.update(2, 0, GRADS, step_id=driver.step_id(2, generation=1))
    driver.prepare(2, [0], generation=1)
    before = driver.contents()
    over = r"of generation 0, and generation 1 has begun: this trainer was replaced by one that came later"
    for late in (
        lambda: driver.prepare(9, []),
        lambda: driver.prepare(8, [0]),
        lambda: driver.decide(8, [0]),
        lambda: driver.commit(9, [], one_phase=True),
        lambda: driver.update(9, 1, GRADS),
    ):
        with pytest.raises(StepConflict, match=f"{over}|was dropped"):
            late()
    assert same(driver.contents() | {"0 ledger": 0}, before | {"0 ledger": 0})  # but for what the decider has dropped
    driver.update(9, 1, GRADS, hold=False)  # nothing is trained by that
    driver.commit(2, [0], generation=1)
    assert {driver.status(shard).version for shard in driver.owners} == {1}
    with pytest.raises(StepConflict, match=over):
        driver.update(9, 1, GRADS)


def test_a_trainer_that_goes_back_begins_a_new_generation(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    driver.train(5, {0: (make_bags(1), GRADS)})
    driver.gather(make_bags(1))
    new = driver.step_id(2, generation=1)
    driver.update(2, 0, GRADS, step_id=new)
    assert not any(reply.applied for reply in driver.prepare(2, [0], generation=1).values())
    assert {reply.version for reply in driver.commit(2, [0], generation=1).values()} == {2}
    before = driver.contents()
    for late in (driver.prepare, driver.commit):
        with pytest.raises(StepConflict, match=r"step 6 .* is of generation 0, and generation 1 has begun"):
            late(6, [])
    driver.discard(9)
    assert same(driver.contents(), before)
    assert all(reply.applied for reply in driver.prepare(2, [0], generation=1).values())
    assert {reply.missing for reply in driver.prepare(3, [], generation=1).values()} == {()}
    driver.discard(3, generation=1)


def test_a_step_of_a_decided_order_is_applied_in_its_turn(driver: Driver) -> None:
    """What an owner hears early waits for what was decided before."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    for step, group in ((1, "a"), (2, "b")):
        driver.update(step, 0, GRADS * step, step_id=driver.step_id(step, group))
        driver.prepare(step, [0], group=group)
        assert driver.decide(step, [0], group=group).version == step
    late, early = (
        driver.commit_request(1, step, [0], decided=True, version=step, group=group)
        for step, group in ((1, "a"), (2, "b"))
    )
    waiting = driver.submit(driver.host(1).commit(early))
    driver.call(driver.host(1).commit(late))
    assert waiting.result(timeout=20).parts[0].version == 2
    for request in (early, late):
        driver.call(driver.host(1).commit(request))
    assert {driver.status(shard).version for shard in (0, 1)} == {2}
    assert {driver.status(shard).updates_applied for shard in (0, 1)} == {2}


def test_a_heartbeat_says_what_is_held(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS, step_id=driver.step_id(1, "beating"))
    driver.update(1, 1, GRADS, step_id=driver.step_id(1, "beating"))
    info = driver.hosted[0].info
    request = HeartbeatRequest(incarnation=info.incarnation, group="beating", rank=0)
    reply = driver.call(driver.host(0).heartbeat(request))
    assert (reply.lease_s, reply.updates_held) == (10.0, 2)
    assert driver.call(driver.host(0).heartbeat(replace(request, group="nobody"))).updates_held == 0
    with pytest.raises(StalePlacement, match="incarnation"):
        driver.call(driver.host(0).heartbeat(replace(request, incarnation=info.incarnation + 1)))


def test_what_became_of_a_step_can_be_asked(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    gate = driver.host(0)

    def ask(step: int, *, give_up: bool = False) -> ResolveReply:
        request = ResolveRequest(
            table_id=driver.table_id, after_version=0, step_id=driver.step_id(step), give_up=give_up
        )
        return driver.call(gate.resolve(request))

    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    assert (ask(1).state, ask(1, give_up=True).state) == ("pending", "pending")
    driver.commit(1, [0], lr=0.25, grad_scale=0.5)
    reply = ask(1)
    assert (reply.state, reply.version) == ("decided", 1)
    assert {(step.version, step.step_id, step.lr, step.grad_scale) for step in reply.steps} == {
        (1, driver.step_id(1), 0.25, 0.5)
    }
    assert ask(7, give_up=True).state == "dropped"
    with pytest.raises(StepConflict, match="step 7 of rank 0 of group 'trainer' was dropped"):
        driver.prepare(7, [])
    assert ask(8).state == "pending"
