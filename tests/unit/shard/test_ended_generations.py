"""A generation of a trainer that is ended at a table's gate: nothing of it is decided any more."""

from dataclasses import replace

import pytest

from mempool.errors import StepConflict
from mempool.types import CommitPart, CommitRequest
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema
from tests.unit.shard.test_committing import GRADS, commit_of_two, two_tables

from .conftest import MakeDriver


def _question(driver: Driver, shard: int, step: int, *, generation: int = 0) -> int:
    """The version that the step has made, as is answered to who asks with a Commit of it without updates; 0: none."""
    step_id = replace(driver.step_id(step), generation=generation)
    part = CommitPart(envelope=driver.envelope(shard), step_id=step_id, lr=0.0, grad_scale=1.0, sequences=())
    try:
        return driver.call(driver.host(shard).commit(CommitRequest(parts=(part,)))).parts[0].version
    except StepConflict:
        return 0


@pytest.mark.parametrize("generation", [0, 1])
def test_nothing_of_a_generation_that_was_ended_is_decided(make_driver: MakeDriver, generation: int) -> None:
    """Also what stands prepared under another number than the one that is asked for."""
    driver = make_driver(2).create(make_schema(), "columns")
    driver.update(1, 0, GRADS, bags=make_bags(1))
    driver.prepare(1, [0])
    assert driver.decide(1, [0]).version == 1
    driver.call(driver.host(1).commit(driver.commit_request(1, 1, [0], decided=True, version=1)))
    driver.update(5, 0, GRADS, bags=make_bags(1))
    driver.prepare(5, [0])
    assert _question(driver, 0, 2**53 - 1, generation=generation) == 0
    with pytest.raises(StepConflict):
        driver.decide(5, [0])
    with pytest.raises(StepConflict):
        driver.prepare(6, [])
    assert _question(driver, 0, 1) == 1
    assert _question(driver, 0, 2) == 0
    assert driver.status(0).version == 1


@pytest.mark.parametrize("decided", [False, True])
def test_a_generation_ends_at_a_gate_with_what_its_step_became_at_its_decider(
    make_driver: MakeDriver, decided: bool
) -> None:
    first, second = two_tables(make_driver)
    if decided:
        first.call(first.host(0).commit(commit_of_two(first, second)))
    assert _question(second, 1, 2**53 - 1) == 0
    assert (_question(second, 1, 1), _question(first, 0, 1)) == ((1, 1) if decided else (0, 0))
    if not decided:
        with pytest.raises(StepConflict):
            first.call(first.host(0).commit(commit_of_two(first, second)))
