"""Between two rounds of a move: what a freeze held off goes first, and who knows the next view already waits for it."""

import pytest

from mempool.errors import StalePlacement
from mempool.types import HeartbeatRequest, StepCountRequest

from .bags import make_bags
from .driver import Driver, make_schema
from .test_moves import GRADS


def _held_off(driver: Driver) -> None:
    """A step of an owner's only rank meets a freeze, which ends."""
    driver.create(make_schema(), "one")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.freeze(0, token="first")
    assert driver.prepare(1, [0])[0].held_off
    driver.thaw(0, token="first")


def _settle(driver: Driver) -> None:
    """What was sent before has come to its turn at shard 0."""
    for _ in range(3):
        incarnation = driver.hosted[0].info.incarnation
        driver.call(driver.host(0).heartbeat(HeartbeatRequest(incarnation=incarnation, group="trainer", rank=0)))


@pytest.mark.parametrize("how", ["commit", "one phase", "discard"])
def test_the_next_freeze_waits_for_a_step_that_the_last_one_held_off(driver: Driver, how: str) -> None:
    _held_off(driver)
    freezing = driver.submit(driver.host(0).freeze(driver.table_id, 20.0, token="second", lease_s=60.0))
    _settle(driver)
    assert not driver.status(0).frozen
    if how == "commit":
        assert not driver.prepare(1, [0])[0].held_off
        driver.commit(1, [0])
    elif how == "one phase":
        driver.call(driver.host(0).commit(driver.commit_request(0, 1, [0], one_phase=True)))
    else:
        driver.discard(1)
    assert freezing.result(timeout=20) == (how != "discard")
    assert driver.status(0).frozen
    driver.thaw(0, token="second")


def test_it_does_not_wait_for_one_that_never_comes(driver: Driver) -> None:
    _held_off(driver)
    assert driver.freeze(0, 20.0, token="second") == 0
    driver.thaw(0, token="second")
    assert driver.freeze(0, 20.0, token="third") == 0
    driver.thaw(0, token="third")


def test_a_round_that_is_undone_while_it_waits_never_begins(driver: Driver) -> None:
    _held_off(driver)
    freezing = driver.submit(driver.host(0).freeze(driver.table_id, 20.0, token="second", lease_s=60.0))
    _settle(driver)
    driver.thaw(0, token="second")
    with pytest.raises(StalePlacement, match="round 'second' of a move is over"):
        freezing.result(timeout=20)
    assert not driver.status(0).frozen


def test_who_knows_the_next_view_waits_for_it_where_a_round_is_under_way(driver: Driver) -> None:
    """The gate's answer is out before the others have their view: a new plan made of it is not refused for that."""
    driver.create(make_schema(), "one")
    ahead = StepCountRequest(envelope=driver.envelope(0, epoch=2))
    with pytest.raises(StalePlacement, match="planned for epoch 2"):
        driver.call(driver.host(0).step_count(ahead))
    driver.freeze(0)
    waiting = driver.submit(driver.host(0).step_count(ahead))
    with pytest.raises(StalePlacement, match="planned for epoch 3"):
        driver.call(driver.host(0).step_count(StepCountRequest(envelope=driver.envelope(0, epoch=3))))
    assert not waiting.done()
    driver.move("columns", token="round")
    assert waiting.result(timeout=20).stamp.epoch == 2


def test_who_knows_a_view_that_never_comes_is_told(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    driver.freeze(0)
    waiting = driver.submit(driver.host(0).step_count(StepCountRequest(envelope=driver.envelope(0, epoch=2))))
    _settle(driver)
    driver.thaw(0)
    with pytest.raises(StalePlacement, match="planned for epoch 2"):
        waiting.result(timeout=20)
