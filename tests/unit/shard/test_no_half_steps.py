"""Whatever comes late, twice or from another time: a step is applied whole, or it is known what became of it."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mempool.errors import DeadlineExceeded, ShardUnavailable, StalePlacement, StepConflict
from mempool.types import (
    CommitPart,
    CommitRequest,
    DiscardPart,
    DiscardRequest,
    PreparePart,
    PrepareRequest,
    ReadRowsRequest,
    ResolveRequest,
    StepId,
)
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
BOUND_S = 20.0


class Clock:
    """Runs, and can be set forward."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def push(driver: Driver, step_id: StepId, *, seed: int = 1, prepare: bool = True) -> None:
    """A client's step with one update, as far as Prepare."""
    for shard in driver.owners:
        how: dict[str, Any] = {"step_id": step_id, "want_weight_grad": False}
        request = driver.update_request(shard, step_id.step, 0, GRADS * seed, bags=make_bags(seed), **how)
        driver.call(driver.host(shard).update(request))
    if prepare:
        replies = driver.prepare(step_id.step, [0], group=step_id.group, generation=step_id.generation)
        assert not any(reply.missing for reply in replies.values())


def end_prepare(driver: Driver, shard: int, step_id: StepId) -> None:
    """What a client sends that waits for pages to move; this copy of it comes late."""
    part = DiscardPart(envelope=driver.envelope(shard), step_id=step_id)
    driver.call(driver.host(shard).discard(DiscardRequest(parts=(part,), keep_updates=True)))


def versions(driver: Driver) -> list[int]:
    return [driver.status(shard).version for shard in driver.owners]


def until(check: Callable[[], bool]) -> None:
    end_s = time.monotonic() + BOUND_S
    while not check():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.01)


def reader(driver: Driver, shard: int, version: int) -> ReadRowsRequest:
    envelope = driver.envelope(shard, table_version=version)
    return ReadRowsRequest(envelope=envelope, array="values", ids=torch.arange(driver.schema.num_slots))


def decided(driver: Driver, shard: int, group: str, version: int) -> CommitRequest:
    return driver.commit_request(shard, 1, [0], decided=True, version=version, group=group)


def forgetful(make_driver: MakeDriver, **options: Any) -> Driver:
    """Two shards; "a" and "b" were decided in this order, and shard 1 was made to end the Prepare of "a"."""
    driver = make_driver(2, **options).create(make_schema(), "columns")
    for number, group in enumerate("ab"):
        push(driver, driver.step_id(1, group), seed=number + 1)
        assert driver.decide(1, [0], group=group).version == number + 1
    end_prepare(driver, 1, driver.step_id(1, "a"))
    return driver


def test_a_decided_step_whose_prepare_is_gone_is_not_applied_without_its_updates(make_driver: MakeDriver) -> None:
    driver = forgetful(make_driver)
    later = driver.submit(driver.host(1).commit(decided(driver, 1, "b", 2)))
    table = driver.host(1)._tenancy.table(1)  # type: ignore[attr-defined]
    until(lambda: table.unprepared is not None)
    assert not later.done()
    assert versions(driver) == [2, 0]
    with pytest.raises(StepConflict, match=r"step 1 .* of group 'a' is not prepared here"):
        driver.call(driver.host(1).commit(decided(driver, 1, "a", 1)))
    assert versions(driver) == [2, 0]
    driver.call(driver.host(1).prepare(driver.prepare_request(1, 1, [0], group="a")))
    driver.call(driver.host(1).commit(decided(driver, 1, "a", 1)))
    assert later.result(timeout=BOUND_S).parts[0].version == 2
    one = make_driver().create(make_schema())
    for number, group in enumerate("ab"):
        push(one, one.step_id(1, group), seed=number + 1)
        one.decide(1, [0], group=group)
    assert torch.equal(driver.read(), one.read())


def test_where_its_trainer_does_not_come_the_step_is_known_as_lost(make_driver: MakeDriver) -> None:
    clock = Clock()
    driver = forgetful(make_driver, clock=clock)
    reading = driver.submit(driver.host(1).read_rows(reader(driver, 1, 2)))
    table = driver.host(1)._tenancy.table(1)  # type: ignore[attr-defined]
    until(lambda: table.unprepared is not None)
    assert not reading.done()  # it may come
    clock.ahead_s = 11.0
    with pytest.raises(
        ShardUnavailable, match=r"version 1 .* step 1 .* group 'a', which is decided, and whose updates"
    ):
        driver.call(driver.host(1).read_rows(reader(driver, 1, 2)))
    reading.cancel()
    assert versions(driver) == [2, 0]


def test_a_freeze_says_what_it_has_waited_for(make_driver: MakeDriver) -> None:
    driver = forgetful(make_driver)
    with pytest.raises(DeadlineExceeded, match="its version 1 is decided and not applied here, as updates of it are"):
        driver.freeze(1, 0.5)
    push(driver, driver.step_id(1, "c"))
    with pytest.raises(DeadlineExceeded, match="group 'c' is prepared and not decided as far as shard 0 has said"):
        driver.freeze(1, 0.5, token="again")


def test_pages_of_an_owner_that_has_missed_a_step_do_not_move(make_driver: MakeDriver) -> None:
    driver = forgetful(make_driver)
    end_prepare(driver, 1, driver.step_id(1, "b"))
    target = driver.make_view(driver.schema, [[0, 0, 0]] * 7, epoch=2)
    for shard in driver.owners:
        driver.freeze(shard, token="r")
    for dest, pull in driver.pulls(target):
        with pytest.raises(StalePlacement, match=r"come at version 0, and shard 0 has it at 2"):
            driver.call(driver.host(dest).pull_pages(replace(pull, token="r")))


def test_a_decided_commit_that_names_what_is_not_prepared_is_refused(make_driver: MakeDriver) -> None:
    """At an owner, and at a shard that owns nothing: it is no step without updates."""
    driver = make_driver(3).create(make_schema(), "columns")
    assert driver.owners == (0, 1)
    before = driver.read()
    for shard in (1, 2):
        with pytest.raises(StepConflict, match="not prepared here"):
            driver.call(driver.host(shard).commit(decided(driver, shard, "a", 1)))
    assert versions(driver) == [0, 0]
    assert torch.equal(driver.read(), before)


def test_a_decider_that_owns_a_part_of_a_table_with_another_gate_decides(make_driver: MakeDriver) -> None:
    """Which updates of that table the step has is said to its own gate alone."""
    first = make_driver(3).create(make_schema(), [[1, 2, 1]] * 7)
    second = Driver(first.hosted, table_id=2).create(make_schema(name="other"), "columns")
    step_id = first.step_id(1)
    for table in (first, second):
        push(table, step_id, prepare=False)
    for shard in range(3):
        parts = tuple(
            PreparePart(envelope=table.envelope(shard), step_id=step_id, sequences=(0,))
            for table in (first, second)
            if shard in table.owners
        )
        prepare = PrepareRequest(parts=parts, want_norm=False, decider_table=1, decider_step=1)
        first.call(first.host(shard).prepare(prepare))
    commit = CommitRequest(
        parts=tuple(
            CommitPart(envelope=table.envelope(1), step_id=step_id, lr=0.1, grad_scale=1.0, sequences=sequences)
            for table, sequences in ((first, (0,)), (second, ()))
        )
    )
    assert [part.version for part in first.call(first.host(1).commit(commit)).parts] == [1, 0]
    second.call(second.host(0).commit(second.commit_request(0, 1, [0], decided=True)))
    second.call(second.host(1).commit(second.commit_request(1, 1, [0], decided=True, version=1)))
    first.call(first.host(2).commit(first.commit_request(2, 1, [0], decided=True, version=1)))
    assert versions(first) == versions(second) == [1, 1]
    second.drop()


def test_the_last_step_of_an_old_generation_is_not_taken_for_dropped(make_driver: MakeDriver) -> None:
    """A shard may be in doubt of it when the new generation, which does not ask it, has committed."""
    driver = make_driver(2).create(make_schema(), "columns")
    push(driver, driver.step_id(7, "a"))
    driver.decide(7, [0], group="a")
    one = make_driver().create(make_schema())
    push(one, one.step_id(7, "a"))
    one.decide(7, [0], group="a")
    ledger = driver.host(0)._tenancy.table(1).ledger  # type: ignore[attr-defined]
    ledger.drop(driver.step_id(1, "a", generation=1))
    for step, state in ((7, "decided"), (6, "dropped"), (8, "dropped")):
        request = ResolveRequest(table_id=1, step_id=driver.step_id(step, "a"), give_up=False)
        assert driver.call(driver.host(0).resolve(request)).state == state
    driver.call(driver.host(1).read_rows(reader(driver, 1, 0)))
    assert versions(driver) == [1, 1]
    assert torch.equal(driver.read(), one.read())


@pytest.mark.parametrize("seed", range(12))
def test_a_refused_commit_is_never_decided_whatever_comes_late(make_driver: MakeDriver, seed: int) -> None:
    """A trainer's messages in any order, any of them again: each step is decided once, or refused for good."""
    chance = random.Random(seed)
    driver = make_driver(2).create(make_schema(), "columns")
    host, sent = driver.host(0), []
    refused: set[int] = set()
    versions_of: dict[int, int] = {}
    for _ in range(60):
        step = chance.randint(1, 6)
        kind = chance.choice(["update", "prepare", "commit", "end"])
        if kind == "update":
            request: Any = driver.update_request(0, step, 0, GRADS, bags=make_bags(1), want_weight_grad=False)
        elif kind == "prepare":
            request = driver.prepare_request(0, step, [0])
        elif kind == "commit":
            request = driver.commit_request(0, step, [0])
        else:
            part = DiscardPart(envelope=driver.envelope(0), step_id=driver.step_id(step))
            request = DiscardRequest(parts=(part,), keep_updates=True)
        name = {"end": "discard"}.get(kind, kind)
        sent.append((name, step, request))
        name, step, request = chance.choice(sent[-12:])
        try:
            reply = driver.call(getattr(host, name)(request))
        except StepConflict:
            if name == "commit":
                assert step not in versions_of
                refused.add(step)
            continue
        if name == "commit" and step > max(versions_of, default=0):  # else a later one answers for it
            assert step not in refused
            versions_of[step] = reply.parts[0].version
    assert refused
    assert driver.status(0).version == len(versions_of)
    assert sorted(versions_of.values()) == list(range(1, len(versions_of) + 1))
