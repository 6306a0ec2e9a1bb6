"""What comes of a step after what its trainer has sent of it since: it changes nothing that came after."""

import itertools

import pytest
import torch

from mempool.errors import InvalidRequest, StepConflict
from mempool.types import DiscardPart, DiscardRequest

from .bags import make_bags
from .driver import Driver, make_schema, same

_rounds = itertools.count()
GRADS = torch.linspace(-1, 1, 40).view(4, 10)
LATE = r"Prepare {} of step 1 of rank 0 of group 'trainer' comes late: {}"


def pushed(driver: Driver) -> Driver:
    """A step of one update, on two shards, that nobody has prepared."""
    driver.create(make_schema(), "columns")
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    return driver


def end(driver: Driver, shard: int, attempt: int) -> None:
    part = DiscardPart(envelope=driver.envelope(shard), step_id=driver.step_id(1))
    driver.call(driver.host(shard).discard(DiscardRequest(parts=(part,), keep_updates=True, attempt=attempt)))


def prepare(driver: Driver, shard: int, attempt: int) -> None:
    reply = driver.call(driver.host(shard).prepare(driver.prepare_request(shard, 1, [0], attempt=attempt)))
    assert reply.parts[0].missing == ()


def freezes(driver: Driver, shard: int) -> bool:
    """Whether nothing is prepared there."""
    token = f"round {next(_rounds)}"
    freezing = driver.submit(driver.host(shard).freeze(driver.table_id, 0.2, token=token, lease_s=60.0))
    error = freezing.exception(timeout=20)
    driver.thaw(shard, token=token)
    return error is None


def test_an_end_of_an_earlier_prepare_leaves_a_later_one(driver: Driver) -> None:
    """Else a decided step would be lost where its trainer dies before its Commit comes: applied on one shard alone."""
    pushed(driver).prepare(1, [0], attempt=1)
    for shard in driver.owners:
        end(driver, shard, 1)
    driver.prepare(1, [0], attempt=3)
    version = driver.decide(1, [0]).version
    for attempt in (0, 1, 2):
        end(driver, 1, attempt)
    decided = driver.commit_request(1, 1, [0], decided=True, version=version)
    assert driver.call(driver.host(1).commit(decided)).parts[0].version == version


@pytest.mark.parametrize("again", [False, True])
def test_a_repeat_under_a_later_number_counts(driver: Driver, again: bool) -> None:
    """Whether the answer is the one that was found before, or another norm is asked for."""
    pushed(driver).prepare(1, [0], attempt=1)
    driver.prepare(1, [0], attempt=2, norm_order=float(again))
    end(driver, 1, 1)
    driver.decide(1, [0])
    assert driver.call(driver.host(1).commit(driver.commit_request(1, 1, [0], decided=True, version=1)))


def test_what_was_ended_is_not_prepared_again(driver: Driver) -> None:
    """It would hold off moves until its lease ends, and its trainer knows nothing of it."""
    pushed(driver)
    prepare(driver, 1, 1)
    prepare(driver, 1, 3)
    end(driver, 1, 3)
    before = driver.contents()
    for attempt in (1, 2, 3):
        with pytest.raises(StepConflict, match=LATE.format(attempt, "attempt 3 was ended")):
            prepare(driver, 1, attempt)
    assert same(driver.contents(), before)
    assert freezes(driver, 1)
    prepare(driver, 1, 4)
    assert not freezes(driver, 1)


def test_an_earlier_prepare_does_not_take_the_place_of_a_later_one(driver: Driver) -> None:
    pushed(driver)
    prepare(driver, 1, 2)
    with pytest.raises(StepConflict, match=LATE.format(1, "attempt 2 came before it")):
        prepare(driver, 1, 1)
    end(driver, 1, 1)
    assert not freezes(driver, 1)
    end(driver, 1, 2)
    assert freezes(driver, 1)


def test_an_end_that_is_there_before_its_prepare_ends_it(driver: Driver) -> None:
    pushed(driver)
    end(driver, 1, 1)
    with pytest.raises(StepConflict, match=LATE.format(1, "attempt 1 was ended")):
        prepare(driver, 1, 1)
    assert freezes(driver, 1)


def test_an_owner_without_updates_remembers_what_was_ended(driver: Driver) -> None:
    """Of keys alone, say."""
    driver.create(make_schema(), "columns")
    ask = driver.prepare_request(1, 1, [], attempt=1)
    driver.call(driver.host(1).prepare(ask))
    end(driver, 1, 1)
    with pytest.raises(StepConflict, match=LATE.format(1, "attempt 1 was ended")):
        driver.call(driver.host(1).prepare(ask))
    assert freezes(driver, 1)


def test_the_next_step_counts_anew(driver: Driver) -> None:
    pushed(driver).prepare(1, [0], attempt=7)
    for shard in driver.owners:
        end(driver, shard, 7)
    driver.discard(1)
    driver.update(2, 1, GRADS)
    driver.prepare(2, [1], attempt=1)
    assert {reply.version for reply in driver.commit(2, [1]).values()} == {1}


def test_who_does_not_count_is_served_as_before(driver: Driver) -> None:
    pushed(driver).prepare(1, [0])
    for shard in driver.owners:
        end(driver, shard, 0)
    assert freezes(driver, 1)
    driver.prepare(1, [0])
    assert {reply.version for reply in driver.commit(1, [0]).values()} == {1}


def test_a_number_that_nobody_counts_to(driver: Driver) -> None:
    pushed(driver)
    before = driver.contents()
    with pytest.raises(InvalidRequest, match="attempt = "):
        driver.call(driver.host(1).prepare(driver.prepare_request(1, 1, [0], attempt=2**53)))
    with pytest.raises(InvalidRequest, match="attempt = "):
        end(driver, 1, 2**53)
    assert same(driver.contents(), before)
