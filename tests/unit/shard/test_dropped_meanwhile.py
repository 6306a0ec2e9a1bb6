"""A table is dropped at one shard after the other: who asks in between is not told that commits were lost."""

import time

import pytest
import torch

from mempool.errors import NotFound
from mempool.types import ReadRowsRequest, ResolveRequest
from tests.contract.bags import make_bags
from tests.contract.driver import make_schema

from .conftest import MakeDriver

BOUND_S = 20.0


def test_who_waits_for_a_version_hears_that_the_table_is_gone(make_driver: MakeDriver) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    step_id = driver.step_id(1)
    for shard in driver.owners:
        request = driver.update_request(
            shard, 1, 0, torch.ones(4, 10), bags=make_bags(1), step_id=step_id, want_weight_grad=False
        )
        driver.call(driver.host(shard).update(request))
    driver.prepare(1, [0])
    assert driver.decide(1, [0]).version == 1
    driver.call(driver.host(0).drop_table(driver.table_id))
    with pytest.raises(NotFound, match="has no table"):
        driver.call(driver.host(0).resolve(ResolveRequest(table_id=driver.table_id, after_version=0)))
    # Its own part was given up with the gate's: of the version it knows by the client alone.
    read = ReadRowsRequest(envelope=driver.envelope(1, table_version=1), array="values", ids=torch.arange(4))
    reading = driver.submit(driver.host(1).read_rows(read))
    time.sleep(0.3)
    assert not reading.done()
    driver.call(driver.host(1).drop_table(driver.table_id))
    with pytest.raises(NotFound):
        reading.result(timeout=BOUND_S)
