"""A trainer discards its next step before an owner has heard that the one before is decided."""

from typing import Any

import pytest
import torch

from mempool.agreement.doubt import GRACE_S
from mempool.errors import StepConflict
from mempool.types import DiscardPart, DiscardRequest, StepId
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver


def push(driver: Driver, step_id: StepId) -> None:
    for shard in driver.owners:
        request = driver.update_request(
            shard, step_id.step, 0, torch.ones(4, 10), bags=make_bags(1), step_id=step_id, want_weight_grad=False
        )
        driver.call(driver.host(shard).update(request))


def test_what_is_decided_is_applied_whatever_is_discarded_after_it(make_driver: MakeDriver) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    push(driver, driver.step_id(1))
    driver.prepare(1, [0])
    assert driver.decide(1, [0]).version == 1
    push(driver, driver.step_id(2))
    part = DiscardPart(envelope=driver.envelope(1), step_id=driver.step_id(2))
    assert driver.call(driver.host(1).discard(DiscardRequest(parts=(part,)))).discarded == 1
    told = driver.commit_request(1, 1, [0], decided=True, version=1)
    assert driver.call(driver.host(1).commit(told)).parts[0].version == 1
    assert [driver.status(shard).version for shard in driver.owners] == [1, 1]
    assert [driver.status(shard).updates_held for shard in driver.owners] == [1, 0]


def test_a_discarded_step_is_over_for_what_comes_late(make_driver: MakeDriver) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    push(driver, driver.step_id(1))
    part = DiscardPart(envelope=driver.envelope(1), step_id=driver.step_id(1))
    driver.call(driver.host(1).discard(DiscardRequest(parts=(part,))))
    with pytest.raises(StepConflict, match="was dropped"):
        driver.call(driver.host(1).prepare(driver.prepare_request(1, 1, [0])))


@pytest.mark.parametrize("unwanted", [True, False])
def test_of_what_is_wanted_no_more_the_decider_is_asked_at_once(make_driver: MakeDriver, unwanted: bool) -> None:
    """Nothing is on its way that would have to be waited for."""
    driver = make_driver(2).create(make_schema(), "columns")
    push(driver, driver.step_id(1))
    driver.prepare(1, [0])
    engine: Any = driver.host(1)
    table = engine._tenancy.table(1)
    table._clock = lambda: 100.0
    prepared = table.updates.give_up(driver.step_id(1)) if unwanted else table.updates.prepared_step(driver.step_id(1))
    table.park_for_steps(prepared, 100.0)
    assert table.step_doubt.ask_at() == (100.0 if unwanted else 100.0 + GRACE_S)
