"""Steps of several clients, tables and owners: one order, whatever is lost, late or silent."""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mempool import kernels
from mempool.errors import DataLoss, DeadlineExceeded, Overloaded, StalePlacement, StepConflict
from mempool.shard.hosted import HostedTable
from mempool.types import (
    CommitPart,
    CommitRequest,
    DiscardPart,
    DiscardRequest,
    HeartbeatRequest,
    OptimizerSpec,
    PreparePart,
    PrepareRequest,
    ReadRowsRequest,
)
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema, same

from .conftest import MakeDriver

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
ADAM = OptimizerSpec(algorithm="adam", lr=0.1, eps=1e-8)


class Clock:
    """Runs, and can be set forward."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def _push(driver: Driver, group: str, step: int = 1, *, seed: int = 1) -> None:
    """A client's step, as far as Prepare."""
    how: dict[str, Any] = {"step_id": driver.step_id(step, group), "want_weight_grad": False}  # reads no values
    for shard in driver.owners:
        request = driver.update_request(shard, step, 0, GRADS * seed, bags=make_bags(seed), **how)
        driver.call(driver.host(shard).update(request))
    assert all(not reply.missing for reply in driver.prepare(step, [0], group=group).values())


def _decided(driver: Driver, shard: int, group: str, version: int, step: int = 1) -> CommitRequest:
    return driver.commit_request(shard, step, [0], decided=True, version=version, group=group)


def _versions(driver: Driver) -> list[int]:
    return [driver.status(shard).version for shard in driver.owners]


def _reader(driver: Driver, shard: int, table_version: int = 0) -> ReadRowsRequest:
    ids = torch.arange(driver.schema.num_slots)
    envelope = driver.envelope(shard, table_version=table_version)
    return ReadRowsRequest(envelope=envelope, array="values", ids=ids)


def _wait_for(what: Callable[[], bool], bound_s: float = 20.0) -> None:
    end_s = time.monotonic() + bound_s
    while not what():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.01)


@pytest.mark.parametrize("arrivals", list(itertools.permutations(range(3))))
def test_any_order_of_arrival_is_the_order_of_the_gate(make_driver: MakeDriver, arrivals: tuple[int, ...]) -> None:
    """To the bit what one shard makes of the same steps in that order."""
    schema = make_schema(optimizer=ADAM, dtype="bfloat16", rounding="stochastic")
    groups = ("b", "c", "a")
    one = make_driver().create(schema)
    for number, group in enumerate(groups):
        _push(one, group, seed=number + 1)
        one.commit(1, [0], group=group)
    driver = make_driver(3).create(schema, "mixed")
    for number, group in enumerate(groups):
        _push(driver, group, seed=number + 1)
    for number, group in enumerate(groups):
        assert driver.decide(1, [0], group=group).version == number + 1
    waiting = []
    for shard, order in ((1, arrivals), (2, arrivals[::-1])):
        for number in order:
            request = _decided(driver, shard, groups[number], number + 1)
            waiting.append(driver.submit(driver.host(shard).commit(request)))
            driver.status(shard)
    for commit in waiting:
        commit.result(timeout=20)
    assert _versions(driver) == [3, 3, 3]
    arrays = ("values", "values.exp_avg", "values.exp_avg_sq")
    assert same({name: driver.read(name) for name in arrays}, {name: one.read(name) for name in arrays})


def test_an_early_commit_waits_for_what_was_decided_before(make_driver: MakeDriver) -> None:
    clock = Clock()
    driver = make_driver(2, clock=clock, peers=_nobody).create(make_schema(), "columns")
    for number, group in enumerate(("a", "b")):
        _push(driver, group, seed=number + 1)
        driver.decide(1, [0], group=group)
    early = driver.submit(driver.host(1).commit(_decided(driver, 1, "b", 2)))
    assert _versions(driver) == [2, 0]
    assert not early.done()
    driver.call(driver.host(1).commit(_decided(driver, 1, "a", 1)))
    assert early.result(timeout=20).parts[0].version == 2
    assert _versions(driver) == [2, 2]


def _nobody(_: Any) -> Any:
    raise Overloaded("nobody is reached")


def test_a_commit_that_was_lost_is_asked_for(make_driver: MakeDriver) -> None:
    """By whoever waits for it: a later step, a reader, a freeze."""
    for waits in ("step", "reader", "freeze"):
        driver = make_driver(2).create(make_schema(), "columns")
        for number, group in enumerate(("a", "b")):
            _push(driver, group, seed=number + 1)
            driver.decide(1, [0], group=group, lr=0.3)
        if waits == "step":
            request = driver.commit_request(1, 1, [0], decided=True, version=2, group="b", lr=0.3)
            driver.call(driver.host(1).commit(request))
        elif waits == "reader":
            driver.call(driver.host(1).read_rows(_reader(driver, 1)))
        else:
            assert driver.freeze(1) == 2
        assert _versions(driver) == [2, 2]
        assert [driver.status(shard).updates_applied for shard in (0, 1)] == [2, 2]
        one = make_driver().create(make_schema())
        for number, group in enumerate(("a", "b")):
            _push(one, group, seed=number + 1)
            one.decide(1, [0], group=group, lr=0.3)
        assert torch.equal(driver.read(), one.read())


def test_a_step_of_a_silent_rank_is_dropped_at_its_decider_and_then_everywhere(make_driver: MakeDriver) -> None:
    clock = Clock()
    driver = make_driver(3, clock=clock).create(make_schema(), "mixed")
    before = driver.read()
    _push(driver, "silent")
    clock.ahead_s = 11.0
    assert [driver.freeze(shard, 20.0) for shard in (2, 1, 0)] == [0, 0, 0]
    with pytest.raises(StepConflict, match="step 1 of rank 0 of group 'silent' was dropped"):
        driver.decide(1, [0], group="silent")
    for shard in driver.owners:
        driver.thaw(shard)
        assert driver.status(shard).updates_held == 0
    assert torch.equal(driver.read(), before)
    _push(driver, "silent", step=2)
    driver.commit(2, [0], group="silent")
    assert _versions(driver) == [1, 1, 1]


def test_a_step_that_hangs_is_given_up_for_a_freeze_though_its_trainer_lives(make_driver: MakeDriver) -> None:
    """It reaches these shards, and another not: it would hold off a rescale for as long as it likes."""
    clock = Clock()
    driver = make_driver(3, clock=clock).create(make_schema(), "mixed")
    before = driver.read()
    _push(driver, "hangs")
    clock.ahead_s = 9.0
    _beat(driver, "hangs")
    with pytest.raises(DeadlineExceeded, match="prepared and not decided"):
        driver.freeze(0, 0.6, token="in vain")
    clock.ahead_s = 11.0
    _beat(driver, "hangs")
    assert all(driver.status(shard).updates_held for shard in driver.owners)
    assert [driver.freeze(shard, 4.0) for shard in (2, 1, 0)] == [0, 0, 0]
    with pytest.raises(StepConflict, match="was dropped"):
        driver.decide(1, [0], group="hangs")
    for shard in driver.owners:
        driver.thaw(shard)
    assert torch.equal(driver.read(), before)
    _push(driver, "hangs", step=2)
    driver.commit(2, [0], group="hangs")
    assert _versions(driver) == [1, 1, 1]


def _beat(driver: Driver, group: str) -> None:
    for shard in driver.owners:
        request = HeartbeatRequest(incarnation=driver.host(shard).info.incarnation, group=group, rank=0)
        driver.call(driver.host(shard).heartbeat(request))


def test_a_decided_step_is_never_dropped(make_driver: MakeDriver) -> None:
    clock = Clock()
    driver = make_driver(2, clock=clock).create(make_schema(), "columns")
    _push(driver, "silent")
    driver.decide(1, [0], group="silent")
    driver.discard(1, group="silent")  # by a client that does not know
    clock.ahead_s = 1000.0
    assert driver.freeze(1, 20.0) == 1
    assert _versions(driver) == [1, 1]


def test_a_reader_waits_for_what_may_be_acknowledged(make_driver: MakeDriver) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    old = driver.call(driver.host(1).read_rows(_reader(driver, 1)))
    _push(driver, "a")
    undecided = driver.call(driver.host(1).read_rows(_reader(driver, 1)))
    assert torch.equal(undecided.rows, old.rows)
    assert undecided.stamp.table_version == 0
    driver.decide(1, [0], group="a")
    decided = driver.call(driver.host(1).read_rows(_reader(driver, 1)))
    assert decided.stamp.table_version == 1
    assert not torch.equal(decided.rows, old.rows)


def test_at_the_decider_no_reader_waits(make_driver: MakeDriver) -> None:
    """It knows that nothing is decided: nobody has to be asked."""
    driver = make_driver().create(make_schema())
    _push(driver, "a")
    engine: Any = driver.host(0)
    table = engine._tenancy.table(1)
    driver.read()
    assert table.step_doubt.since_s is None
    assert engine._resolver._task is None


def test_a_reader_that_has_seen_more_waits_until_it_is_here(make_driver: MakeDriver) -> None:
    driver = make_driver(2, peers=_nobody).create(make_schema(), "columns")
    _push(driver, "a")
    driver.decide(1, [0], group="a")
    reading = driver.submit(driver.host(1).read_rows(_reader(driver, 1, 1)))
    driver.status(1)
    assert not reading.done()
    driver.call(driver.host(1).commit(_decided(driver, 1, "a", 1)))
    assert reading.result(timeout=20).stamp.table_version == 1


def test_a_version_that_was_never_given_was_lost(make_driver: MakeDriver) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    for shard in (0, 1):
        with pytest.raises(DataLoss, match="this client has seen version 5 acknowledged: commits were lost here"):
            driver.call(driver.host(shard).read_rows(_reader(driver, shard, 5)))


def _of_two(first: Driver, second: Driver, shard: int) -> PrepareRequest:
    """The parts at a shard of a step over two tables."""
    parts = tuple(
        PreparePart(envelope=table.envelope(shard), step_id=table.step_id(1), sequences=(0,))
        for table in (first, second)
        if shard in table.owners
    )
    return PrepareRequest(parts=parts, want_norm=False, decider_table=first.table_id, decider_step=1)


def two_tables(make_driver: MakeDriver, **options: Any) -> tuple[Driver, Driver]:
    """A step over two tables that is prepared; their gates are 0 and 1."""
    first = make_driver(3, **options).create(make_schema(), "columns")
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"), [[1, 2, 1]] * 7)
    for table in (first, second):
        table.update(1, 0, GRADS, bags=make_bags(1))
    for shard in range(3):
        reply = first.call(first.host(shard).prepare(_of_two(first, second, shard)))
        assert all(not part.missing and not part.held_off for part in reply.parts)
    return first, second


def commit_of_two(first: Driver, second: Driver) -> CommitRequest:
    parts = tuple(
        CommitPart(envelope=table.envelope(0), step_id=table.step_id(1), lr=0.1, grad_scale=1.0, sequences=(0,))
        for table in (first, second)
    )
    return CommitRequest(parts=parts)


@pytest.mark.parametrize("lost", [False, True])
def test_a_step_oftwo_tables_with_different_gates_is_decided_once(make_driver: MakeDriver, lost: bool) -> None:
    first, second = two_tables(make_driver)
    reply = first.call(first.host(0).commit(commit_of_two(first, second)))
    assert [part.version for part in reply.parts] == [1, 0]
    if lost:  # a reader at an owner that is no gate: it asks the decider, and its table's gate does the same
        second.call(second.host(2).read_rows(_reader(second, 2)))
    else:
        second.call(second.host(1).commit(second.commit_request(1, 1, [0], decided=True)))
        second.call(second.host(2).commit(second.commit_request(2, 1, [0], decided=True, version=1)))
    first.call(first.host(1).commit(first.commit_request(1, 1, [0], decided=True, version=1)))
    assert (_versions(first), _versions(second)) == ([1, 1], [1, 1])
    assert {table.status(1).updates_applied for table in (first, second)} == {1}
    reply = first.call(first.host(0).commit(commit_of_two(first, second)))  # a repeat
    assert reply.parts[0].version == 1


def test_a_step_of_a_table_that_was_dropped_lives_on_at_the_others(make_driver: MakeDriver) -> None:
    first, second = two_tables(make_driver)
    first.call(first.host(0).commit(commit_of_two(first, second)))
    first.drop()
    second.call(second.host(2).read_rows(_reader(second, 2)))
    assert _versions(second) == [1, 1]
    second.drop()


def test_a_step_that_is_prepared_oftwo_tables_is_prepared_of_both_or_none(make_driver: MakeDriver) -> None:
    first = make_driver().create(make_schema())
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"))
    first.update(1, 0, GRADS, bags=make_bags(1))
    reply = first.call(first.host(0).prepare(_of_two(first, second, 0)))
    assert [part.missing for part in reply.parts] == [(), (0,)]
    assert first.freeze(0) == 0  # nothing is prepared
    first.thaw(0)
    second.update(1, 0, GRADS, bags=make_bags(1))
    second.freeze(0)
    reply = first.call(first.host(0).prepare(_of_two(first, second, 0)))
    assert [part.held_off for part in reply.parts] == [False, True]
    assert first.freeze(0, token="again") == 0
    first.thaw(0, token="again")
    second.thaw(0)
    request = replace(commit_of_two(first, second), one_phase=True)
    reply = first.call(first.host(0).commit(request))
    assert [part.version for part in reply.parts] == [1, 1]
    assert [table.status(0).updates_applied for table in (first, second)] == [1, 1]
    second.drop()


def test_a_decided_step_that_has_no_memory_is_tried_again(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(commit_memory_bytes=10_000).create(make_schema())
    _push(driver, "a")
    other = Driver(driver.hosted, table_id=2).create(make_schema(name="other"))
    real = kernels.segment_sum

    def fail(*_: Any) -> Any:
        raise MemoryError("none")

    with monkeypatch.context() as patch:
        engine: Any = driver.host(0)
        engine._tenancy.table(1).updates._prepared["a", 0, 0] = replace(
            engine._tenancy.table(1).updates._prepared["a", 0, 0], sorted=None, reductions=None
        )
        patch.setattr(kernels, "segment_sum", fail)
        patch.setattr(kernels, "sort_pairs", fail)
        assert driver.decide(1, [0], group="a").version == 1
        with pytest.raises(Overloaded, match="no memory for read_rows"):
            driver.read()
        other.read()
        assert driver.status(0).version == 0
    assert kernels.segment_sum is real
    driver.read()
    assert driver.status(0).version == 1
    other.drop()


def test_a_freeze_ends_by_itself_unless_its_controller_lives(make_driver: MakeDriver) -> None:
    clock = Clock()
    driver = make_driver(clock=clock).create(make_schema())
    driver.freeze(0, lease_s=10.0)
    clock.ahead_s = 8.0
    driver.freeze(0, lease_s=10.0)
    clock.ahead_s = 16.0
    driver.update(1, 0, GRADS, bags=make_bags(1))
    assert driver.prepare(1, [0])[0].held_off
    waiting = driver.submit(driver.host(0).prepare(driver.prepare_request(0, 1, [0], wait=True)))
    driver.status(0)
    clock.ahead_s = 19.0
    driver.gather(make_bags(1))  # the next use finds that it is over
    assert not waiting.result(timeout=20).parts[0].held_off
    with pytest.raises(StalePlacement, match="round 'round' of a move is over"):
        driver.freeze(0)
    driver.discard(1)
    driver.freeze(0, lease_s=0.0, token="endless")
    clock.ahead_s = 10**6
    driver.gather(make_bags(1))
    assert driver.status(0).frozen
    driver.thaw(0, token="endless")


@pytest.mark.parametrize("told", ["stale", "missing"])
def test_a_step_that_a_move_has_set_back_goes_before_the_next_freeze(make_driver: MakeDriver, told: str) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    driver.update(1, 0, GRADS, bags=make_bags(1))
    late = driver.prepare_request(0, 1, [0])
    driver.move("rows")
    if told == "stale":
        with pytest.raises(StalePlacement):
            driver.call(driver.host(0).prepare(late))
    else:
        assert all(reply.missing for reply in driver.prepare(1, [0]).values())
    freezing = driver.submit(driver.host(0).freeze(driver.table_id, 5.0, token="next", lease_s=60.0))
    driver.status(0)
    driver.update(1, 0, GRADS, bags=make_bags(1))
    assert not any(reply.held_off or reply.missing for reply in driver.prepare(1, [0]).values())
    driver.commit(1, [0])
    assert freezing.result(timeout=20) == 1
    driver.thaw(0, token="next")


def test_a_view_is_answered_before_memory_is_given_back(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, shrink = threading.Event(), HostedTable.shrink

    def later(table: HostedTable) -> None:
        assert told.wait(20)
        shrink(table)

    driver = make_driver(2).create(make_schema(), "columns")
    monkeypatch.setattr(HostedTable, "shrink", later)
    driver.move("rows")
    told.set()
    assert sum(driver.status(shard).pages for shard in driver.owners) == 21


def test_pages_that_come_for_a_round_that_nobody_ends_are_dropped(make_driver: MakeDriver) -> None:
    clock = Clock()
    driver = make_driver(2, clock=clock).create(make_schema())
    driver.freeze(0)
    target = driver.make_view(driver.schema, [[1, 1, 1]] * 7, epoch=2)
    ((dest, pull),) = driver.pulls(target)
    driver.call(driver.host(dest).pull_pages(replace(pull, token="round")))
    assert driver.status(dest).num_bytes > 0
    clock.ahead_s = 61.0
    with pytest.raises(StalePlacement, match="round 'round' of a move is over"):
        driver.call(driver.host(dest).pull_pages(replace(pull, token="round")))
    clock.ahead_s = 130.0  # a minute after the last that was asked for
    _wait_for(lambda: driver.status(dest).num_bytes == 0)  # once the gate was asked
    assert not driver.status(dest).frozen


def test_a_version_of_another_step_is_refused(make_driver: MakeDriver) -> None:
    driver = make_driver(2, peers=_nobody).create(make_schema(), "columns")
    for number, group in enumerate(("a", "b")):
        _push(driver, group, seed=number + 1)
        driver.decide(1, [0], group=group)
    driver.call(driver.host(1).commit(_decided(driver, 1, "a", 1)))
    with pytest.raises(StepConflict, match=r"said to make version 1 .* which another step has made"):
        driver.call(driver.host(1).commit(_decided(driver, 1, "b", 1)))
    driver.call(driver.host(1).commit(_decided(driver, 1, "b", 2)))


def test_nobody_asks_for_nobody(make_driver: MakeDriver) -> None:
    """A reader that has left is asked for no more; one that waits, no more than four times a second."""
    asked = []

    def peer(info: Any) -> Any:
        asked.append(info.shard)
        raise Overloaded("not now")

    driver = make_driver(2, peers=peer).create(make_schema(), "columns")
    _push(driver, "a")
    engine: Any = driver.host(1)
    reading = driver.submit(engine.read_rows(_reader(driver, 1)))
    _wait_for(lambda: len(asked) >= 2)
    reading.cancel()
    _wait_for(lambda: engine._resolver._task is None)
    assert engine._tenancy.table(1).step_doubt.since_s is None
    driver.call(engine.close())


@pytest.mark.parametrize("prepared_at", [(0, 1), (1,)])
def test_a_discard_is_done_once_its_decider_says_so(make_driver: MakeDriver, prepared_at: tuple[int, ...]) -> None:
    """The Commit of a client that discards may be on its way still: an owner that has prepared the step asks, and the
    decider, which has not decided it, drops it with that."""
    driver = make_driver(2).create(make_schema(), "columns")
    for shard in prepared_at:
        request = driver.update_request(shard, 1, 0, GRADS, bags=make_bags(1), want_weight_grad=False)
        driver.call(driver.host(shard).update(request))
        driver.call(driver.host(shard).prepare(driver.prepare_request(shard, 1, [0])))
    (part,) = (DiscardPart(envelope=driver.envelope(1), step_id=driver.step_id(1)),)
    discarding = driver.submit(driver.host(1).discard(DiscardRequest(parts=(part,))))
    discarding.result(timeout=10)
    assert [driver.status(shard).updates_held for shard in (0, 1)] == [0, 0]
    with pytest.raises(StepConflict, match="was dropped"):
        driver.decide(1, [0])
