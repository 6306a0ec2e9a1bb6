"""The optimizer's step count on every kind of shard: read, set, moved with the pages; training goes on from it."""

import asyncio

import pytest
import torch

from mempool.errors import DeadlineExceeded, InvalidRequest, StepConflict
from mempool.types import OptimizerSpec, StepCountRequest

from .bags import make_bags
from .driver import Driver, make_schema, same

ADAM = OptimizerSpec(algorithm="adam", lr=0.1, eps=1e-8)
DENSE = OptimizerSpec(algorithm="adamw", lr=0.1, eps=1e-8, weight_decay=0.1, dense=True)


def count(driver: Driver, shard: int, **changes: int) -> int:
    request = StepCountRequest(envelope=driver.envelope(shard), **changes)
    return driver.call(driver.host(shard).step_count(request)).count


def set_step(driver: Driver, step: int, *, at_version: int) -> None:
    for shard in driver.owners:
        assert count(driver, shard, set=step, at_version=at_version) == step


def train(driver: Driver, step: int) -> None:
    bags, grads = make_bags(step), torch.randn(4, 10, generator=torch.Generator().manual_seed(step))
    driver.train(step, {step: (bags, grads)})


@pytest.mark.parametrize("optimizer", [ADAM, DENSE], ids=["adam", "dense adamw"])
def test_training_goes_on_from_a_state_and_its_step(driver: Driver, optimizer: OptimizerSpec) -> None:
    driver.create(make_schema(optimizer=optimizer), "mixed")
    for step in (1, 2, 3):
        train(driver, step)
    arrays = ("values", "values.exp_avg", "values.exp_avg_sq")
    saved = {name: driver.read(name) for name in arrays}
    train(driver, 4)
    expected = {name: driver.read(name) for name in arrays}
    driver.drop()
    driver.create(make_schema(optimizer=optimizer), "mixed")
    for name, rows in saved.items():
        driver.write(name, torch.arange(50), rows)
    set_step(driver, 3, at_version=0)
    train(driver, 4)
    assert all(same(driver.read(name), expected[name]) for name in arrays)
    assert {count(driver, shard) for shard in driver.owners} == {4}
    assert {driver.status(shard).version for shard in driver.owners} == {1}


def test_it_is_set_at_the_version_that_was_seen_and_counts_on(driver: Driver) -> None:
    driver.create(make_schema(optimizer=ADAM), "rows")
    train(driver, 1)
    assert [count(driver, shard) for shard in driver.owners] == [1, 1]
    with pytest.raises(StepConflict, match=r"at table version 0, and the table is at 1.* Nothing was changed"):
        count(driver, 0, set=9, at_version=0)
    assert count(driver, 0) == 1
    set_step(driver, 9, at_version=1)
    set_step(driver, 9, at_version=1)
    train(driver, 2)
    assert [count(driver, shard) for shard in driver.owners] == [10, 10]


def test_it_moves_with_the_pages_also_before_any_commit(driver: Driver) -> None:
    driver.create(make_schema(optimizer=ADAM), "one")
    set_step(driver, 5, at_version=0)
    driver.move("mixed")
    assert {count(driver, shard) for shard in driver.owners} == {5}
    train(driver, 1)
    assert {count(driver, shard) for shard in driver.owners} == {6}


def test_a_frozen_table_lets_it_wait(driver: Driver) -> None:
    driver.create(make_schema(optimizer=ADAM), "one")
    driver.freeze(0)
    request = StepCountRequest(envelope=driver.envelope(0), set=3, at_version=0)

    async def impatient() -> None:
        async with asyncio.timeout(0.3):
            await driver.host(0).step_count(request)

    with pytest.raises((TimeoutError, DeadlineExceeded)):
        driver.call(impatient())
    assert count(driver, 0) == 0
    driver.thaw(0)
    assert count(driver, 0, set=4, at_version=0) == 4


def test_a_step_out_of_range_is_refused(driver: Driver) -> None:
    driver.create(make_schema(optimizer=ADAM), "one")
    with pytest.raises(InvalidRequest, match="must not be negative, nor above"):
        count(driver, 0, set=2**60, at_version=0)
    assert count(driver, 0) == 0
