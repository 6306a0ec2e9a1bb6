"""Who waits for what, for how long, and what they are told then: which of two parties is late."""

import time
from typing import Any

import pytest
import torch

from mempool.errors import MempoolError, Overloaded, ShardUnavailable
from mempool.shard.parking import LONGEST_WAIT_S, Waiting
from mempool.types import DiscardPart, DiscardRequest, Envelope, ReadRowsRequest, WriteRowsRequest
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema, same

from .conftest import MakeDriver

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
BOUND_S = 20.0


class Clock:
    """Runs, and can be set forward."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def test_those_who_left_do_not_pile_up() -> None:
    waiting = Waiting()
    assert not waiting
    stays = waiting.park()
    for most in (513, 1025):
        for _ in range(1000):
            waiting.park().woken.cancel()
        assert len(waiting._parked) <= most
    assert waiting
    assert stays in waiting._parked
    waiting.wake()
    assert stays.woken.done()
    assert not waiting


def test_who_has_waited_for_long_looks_again_and_others_wait_on() -> None:
    waiting = Waiting()
    early, late = waiting.park(since_s=10.0), waiting.park(since_s=11.0)
    waiting.wake_late(10.0 + LONGEST_WAIT_S)
    assert not early.woken.done()
    waiting.wake_late(10.5 + LONGEST_WAIT_S)
    assert early.woken.done()
    assert not late.woken.done()
    assert waiting._parked == [late]


def _nobody(_: Any) -> Any:
    raise Overloaded("nobody is reached")


def _push(driver: Driver, step: int, group: str = "trainer") -> None:
    for shard in driver.owners:
        request = driver.update_request(
            shard, step, 0, GRADS, bags=make_bags(1), want_weight_grad=False, step_id=driver.step_id(step, group)
        )
        driver.call(driver.host(shard).update(request))


def _in_doubt(make_driver: MakeDriver, clock: Clock) -> Driver:
    """Shard 1 has prepared steps of "a", decided, and of "b", not decided; nobody is reached from there."""
    driver = make_driver(2, clock=clock, peers=_nobody).create(make_schema(), "columns")
    for group in "ab":
        _push(driver, 1, group)
        driver.prepare(1, [0], group=group)
    driver.decide(1, [0], group="a")
    return driver


def _of_shard_1(driver: Driver, what: str) -> Any:
    host = driver.host(1)
    ids = torch.arange(3)

    def envelope(version: int) -> Envelope:
        return driver.envelope(1, table_version=version)

    discard = DiscardPart(envelope=envelope(0), step_id=driver.step_id(1, "b"))
    return {
        "reader": lambda: host.read_rows(ReadRowsRequest(envelope=envelope(0), array="values", ids=ids)),
        "reader of a version": lambda: host.read_rows(ReadRowsRequest(envelope=envelope(1), array="values", ids=ids)),
        "prepare": lambda: host.prepare(driver.prepare_request(1, 2, [], group="b")),
        "new generation": lambda: host.prepare(driver.prepare_request(1, 1, [], group="b", generation=1)),
        "discard": lambda: host.discard(DiscardRequest(parts=(discard,))),
        "early commit": lambda: host.commit(driver.commit_request(1, 1, [0], decided=True, version=2, group="b")),
    }[what]()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("reader", r"whether step 1 of rank 0 of group 'a', prepared here, is decided: shard 0 knows"),
        ("reader of a version", r"what its version 1 is: shard 0 knows"),
        ("prepare", r"whether step 1 of rank 0 of group 'b', prepared here, is decided: shard 0 knows"),
        ("new generation", r"whether step 1 of rank 0 of group 'b', prepared here, is decided: shard 0 knows"),
        ("discard", r"whether step 1 of rank 0 of group 'b', prepared here, is decided: shard 0 knows"),
        ("early commit", r"what its version 1 is: shard 0 knows"),
    ],
)
def test_where_another_shard_is_silent_the_caller_is_told_which(make_driver: MakeDriver, what: str, words: str) -> None:
    clock = Clock()
    driver = _in_doubt(make_driver, clock)
    before = driver.contents()
    waiting = driver.submit(_of_shard_1(driver, what))
    driver.status(1)
    assert not waiting.done()
    clock.ahead_s = LONGEST_WAIT_S + 0.1
    with pytest.raises(ShardUnavailable, match=f"shard 1 has waited 3 s to hear of table 'facts' {words}") as told:
        waiting.result(timeout=BOUND_S)
    assert told.value.shard == 0
    assert same(driver.contents(), before)


def test_a_call_that_a_move_holds_off_for_long_is_told_so(make_driver: MakeDriver) -> None:
    """A Prepare is answered: its client looks whether the table has moved."""
    clock = Clock()
    driver = make_driver(clock=clock).create(make_schema())
    _push(driver, 1)
    driver.freeze(0, token="slow", lease_s=600.0)
    host = driver.host(0)
    write = WriteRowsRequest(
        envelope=driver.envelope(0), array="values", ids=torch.arange(3), blocks=(0, 1, 2), rows=torch.zeros(3, 10)
    )
    reader_of_the_next_epoch = ReadRowsRequest(
        envelope=driver.envelope(0, epoch=2), array="values", ids=torch.arange(3)
    )
    preparing = driver.submit(host.prepare(driver.prepare_request(0, 1, [0], wait=True)))
    others: list[Any] = [
        driver.submit(host.commit(driver.commit_request(0, 1, [0], one_phase=True))),
        driver.submit(host.write_rows(write)),
        driver.submit(host.read_rows(reader_of_the_next_epoch)),
    ]
    driver.status(0)
    assert not any(call.done() for call in (preparing, *others))
    clock.ahead_s = LONGEST_WAIT_S + 0.1
    assert preparing.result(timeout=BOUND_S).parts[0].held_off
    for call in others:
        with pytest.raises(ShardUnavailable, match=r"are moving, or .* \(round 'slow'\), which has held this call off"):
            call.result(timeout=BOUND_S)
    driver.thaw(0, token="slow")
    assert driver.commit(1, [0], one_phase=True)[0].version == 1


def test_of_two_tables_one_that_cannot_apply_does_not_keep_the_other_in_doubt(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    other = Driver(driver.hosted, table_id=2).create(make_schema(name="other"), "columns")
    for table in (driver, other):
        _push(table, 1)
        table.prepare(1, [0])
    gate: Any = driver.host(0)
    engine: Any = driver.host(1)
    broken = engine._tenancy.table(1)
    for table in (driver, other):
        table.decide(1, [0])

    def fail() -> None:
        raise MempoolError("cannot be applied")

    monkeypatch.setattr(broken, "apply_decided", fail)
    monkeypatch.setattr(broken, "gate", 1)  # so that it asks itself
    broken.order.add(gate._tenancy.table(1).order.after(0)[0])
    broken.step_doubt.wait(0.0)
    broken._waiting_for_rest.park()
    reading = other.submit(
        other.host(1).read_rows(ReadRowsRequest(envelope=other.envelope(1), array="values", ids=torch.arange(3)))
    )
    assert reading.result(timeout=BOUND_S).stamp.table_version == 1
    other.drop()
