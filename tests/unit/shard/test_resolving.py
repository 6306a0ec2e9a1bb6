"""Steps of several tables, and shards in doubt of them: none is half applied, none stands in the way for ever."""

import time
from typing import Any

import pytest
import torch

from mempool.agreement import ledger
from mempool.errors import StepConflict
from mempool.types import (
    CommitPart,
    CommitRequest,
    DiscardPart,
    DiscardRequest,
    HeartbeatRequest,
    PreparePart,
    PrepareRequest,
    ReadRowsRequest,
    ResolveRequest,
)
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
BOUND_S = 10.0


class Clock:
    """Runs, and can be set forward."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def _prepare(tables: tuple[Driver, ...], shard: int, step: int, *, decider: tuple[int, int]) -> None:
    """The parts of these tables at a shard."""
    parts = tuple(
        PreparePart(envelope=table.envelope(shard), step_id=table.step_id(step), sequences=(0,))
        for table in tables
        if shard in table.owners
    )
    request = PrepareRequest(parts=parts, want_norm=False, decider_table=decider[0], decider_step=decider[1])
    reply = tables[0].call(tables[0].host(shard).prepare(request))
    assert not any(part.missing or part.held_off for part in reply.parts)


def _commit(tables: tuple[Driver, ...], shard: int, step: int) -> CommitRequest:
    """The Commit of these tables at the decider, which is the gate of the first alone."""
    return CommitRequest(
        parts=tuple(
            CommitPart(
                envelope=table.envelope(shard),
                step_id=table.step_id(step),
                lr=0.1,
                grad_scale=1.0,
                sequences=(0,) if table.gate == shard else (),
            )
            for table in tables
        )
    )


def _push(table: Driver, step: int) -> None:
    for shard in table.owners:
        request = table.update_request(shard, step, 0, GRADS, bags=make_bags(1), want_weight_grad=False)
        table.call(table.host(shard).update(request))


def _versions(table: Driver) -> list[int]:
    return [table.status(shard).version for shard in table.owners]


def _reader(table: Driver, shard: int) -> ReadRowsRequest:
    return ReadRowsRequest(envelope=table.envelope(shard), array="values", ids=torch.arange(table.schema.num_slots))


def _of_two(make_driver: MakeDriver, **options: Any) -> tuple[Driver, Driver]:
    """A step of two tables, prepared: shard 1 decides it, owns a part of the second, and shard 0 numbers that."""
    first = make_driver(3, **options).create(make_schema(), [[1, 2, 1]] * 7)
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"), "columns")
    for table in (first, second):
        _push(table, 1)
    for shard in range(3):
        _prepare((first, second), shard, 1, decider=(1, 1))
    return first, second


def test_a_reader_at_the_decider_sees_what_is_acknowledged_of_a_table_that_another_shard_numbers(
    make_driver: MakeDriver,
) -> None:
    first, second = _of_two(make_driver)
    before = second.call(second.host(1).read_rows(_reader(second, 1)))
    assert before.stamp.table_version == 0
    first.call(first.host(1).commit(_commit((first, second), 1, 1)))
    after = second.call(second.host(1).read_rows(_reader(second, 1)))
    assert after.stamp.table_version == 1
    assert not torch.equal(after.rows, before.rows)
    second.drop()


@pytest.mark.parametrize("keep_updates", [False, True])
def test_a_discard_that_comes_late_takes_no_part_from_a_decided_step(
    make_driver: MakeDriver, keep_updates: bool
) -> None:
    first, second = _of_two(make_driver)
    first.call(first.host(1).commit(_commit((first, second), 1, 1)))
    part = DiscardPart(envelope=second.envelope(1), step_id=second.step_id(1))
    second.call(second.host(1).discard(DiscardRequest(parts=(part,), keep_updates=keep_updates)))
    second.call(second.host(0).commit(second.commit_request(0, 1, [0], decided=True)))
    second.call(second.host(1).commit(second.commit_request(1, 1, [0], decided=True, version=1)))
    assert _versions(second) == [1, 1]
    assert [second.status(shard).updates_applied for shard in second.owners] == [1, 1]
    one = make_driver().create(make_schema(name="other"))
    _push(one, 1)
    one.commit(1, [0], one_phase=True)
    assert torch.equal(second.read(), one.read())
    second.drop()


def test_a_step_that_was_decided_without_a_part_does_not_hold_that_table(make_driver: MakeDriver) -> None:
    """Its trainer names a decider that never heard of this part, and lives: a move would wait for it for ever."""
    clock = Clock()
    first = make_driver(3, clock=clock).create(make_schema(), [[1, 2, 1]] * 7)
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"), "columns")
    for table in (first, second):
        _push(table, 1)
    before = second.read()
    for shard in (1, 2):
        _prepare((first,), shard, 1, decider=(1, 1))
    for shard in (0, 1):
        _prepare((second,), shard, 1, decider=(1, 1))
    first.call(first.host(1).commit(_commit((first,), 1, 1)))
    for shard in (0, 1):
        request = HeartbeatRequest(incarnation=1, group="trainer", rank=0)
        second.call(second.host(shard).heartbeat(request))
        assert second.freeze(shard, BOUND_S) == 0
    assert torch.equal(second.read(), before)
    second.drop()


def test_a_part_that_was_prepared_for_another_decider_is_refused(make_driver: MakeDriver) -> None:
    first, second = _of_two(make_driver)
    _prepare((second,), 1, 1, decider=(2, 1))
    words = "was prepared as a part of step 1 of table 2, and is to be committed as one of step 1 of table 1"
    with pytest.raises(StepConflict, match=words):
        first.call(first.host(1).commit(_commit((first, second), 1, 1)))
    assert _versions(first) == _versions(second) == [0, 0]
    second.drop()


def test_a_part_that_the_decider_has_forgotten_is_not_taken_for_no_part(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MAX_OTHERS", 0)
    first, second = _of_two(make_driver)
    first.call(first.host(1).commit(_commit((first, second), 1, 1)))
    request = ResolveRequest(table_id=1, step_id=first.step_id(1))
    reply = first.call(first.host(1).resolve(request))
    assert reply.state == "decided"
    assert ledger.FORGOTTEN in reply.steps
    second.call(
        second.host(0).commit(second.commit_request(0, 1, [0], decided=True))
    )  # by the trainer: its word counts
    second.call(second.host(1).read_rows(_reader(second, 1)))
    assert _versions(second) == [1, 1]
    assert [second.status(shard).updates_applied for shard in second.owners] == [1, 1]
    second.drop()


def test_a_part_that_is_decided_already_is_not_decided_again(make_driver: MakeDriver) -> None:
    """The trainer's parts of one step contradict each other: nothing is decided."""
    first = make_driver().create(make_schema())
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"))
    for table in (first, second):
        _push(table, 1)
    second.commit(1, [0], one_phase=True)
    first.prepare(1, [0])
    for one_phase in (False, True):
        request = _commit((first, second), 0, 1)
        with pytest.raises(
            StepConflict, match=r"step 1 .* is decided on table 'other' already, and not on the first|was dropped"
        ):
            first.call(first.host(0).commit(CommitRequest(parts=request.parts, one_phase=one_phase)))
    assert (_versions(first), _versions(second)) == ([0], [1])
    second.drop()


def test_a_repeated_commit_is_answered_though_one_of_its_tables_has_dropped_a_later_step(
    make_driver: MakeDriver,
) -> None:
    """What is decided is answered as before: it cannot be refused any more."""
    first, second = _of_two(make_driver)
    commit = _commit((first, second), 1, 1)
    first.call(first.host(1).commit(commit))
    engine: Any = second.host(1)
    engine._tenancy.table(2).ledger.drop(second.step_id(1))
    reply = first.call(first.host(1).commit(commit))
    assert [part.version for part in reply.parts] == [1, 0]
    second.drop()


def test_the_lease_of_a_rank_does_not_keep_a_step_that_its_decider_has_not_prepared(make_driver: MakeDriver) -> None:
    """Cut off from one shard, alive at the decider: what only that shard has prepared ends with the lease."""
    clock = Clock()
    driver = make_driver(2, clock=clock).create(make_schema(), "columns")
    _push(driver, 1)
    driver.call(driver.host(1).prepare(driver.prepare_request(1, 1, [0])))
    beat = HeartbeatRequest(incarnation=1, group="trainer", rank=0)
    for clock.ahead_s in (6.0, 12.0):
        assert driver.call(driver.host(0).heartbeat(beat)).updates_held == 1
    assert driver.freeze(1, BOUND_S) == 0
    driver.thaw(1)
    with pytest.raises(StepConflict, match="was dropped"):
        driver.prepare(1, [0])
