"""What a table refuses, and what it says of itself."""

from typing import Any

import pytest

from mempool.errors import DataLoss, StalePlacement
from mempool.shard.hosted import HostedTable
from mempool.shard.work.saying import table_status
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver


def _table(driver: Driver) -> HostedTable:
    engine: Any = driver.host(0)
    table: HostedTable = engine._tenancy.table(1)
    return table


def test_lost_pages_are_told(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    table = _table(driver)
    table.check(driver.envelope(0))
    table.storage.lose_all()
    table.measure()
    with pytest.raises(DataLoss, match="lost 21 pages"):
        table.check(driver.envelope(0))
    assert (table_status(table).pages, table_status(table).lost_pages, table_status(table).num_bytes) == (0, 21, 0)


def test_another_epoch_is_another_plan(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    with pytest.raises(StalePlacement, match="planned for epoch 2 of table 'facts'; shard 0 is at epoch 1"):
        _table(driver).check(driver.envelope(0, epoch=2))
