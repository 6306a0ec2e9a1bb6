"""Who a table keeps waiting, and what it says of itself."""

from typing import Any

import pytest

from mempool.errors import DataLoss, StalePlacement
from mempool.shard.hosted import HostedTable
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver


def _table(driver: Driver) -> HostedTable:
    engine: Any = driver.host(0)
    table: HostedTable = engine._tenancy.table(1)
    return table


def test_those_who_left_do_not_pile_up(make_driver: MakeDriver) -> None:
    table = _table(make_driver().create(make_schema()))
    stays = table.park_until_thaw()
    for _ in range(1000):
        table.park_until_thaw().woken.cancel()
    assert len(table._waiting_for_thaw) <= 513
    for _ in range(1000):
        table.park_until_thaw().woken.cancel()
    assert len(table._waiting_for_thaw) <= 1025
    assert stays in table._waiting_for_thaw
    table.thaw()
    assert stays.woken.done()
    assert not table._waiting_for_thaw


def test_lost_pages_are_told(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    table = _table(driver)
    table.check(driver.envelope(0))
    table.storage.lose_all()
    table.measure()
    with pytest.raises(DataLoss, match="lost 21 pages"):
        table.check(driver.envelope(0))
    assert (table.status().pages, table.status().lost_pages, table.status().num_bytes) == (0, 21, 0)


def test_another_epoch_is_another_plan(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    with pytest.raises(StalePlacement, match="planned for epoch 2 of table 'facts'; shard 0 is at epoch 1"):
        _table(driver).check(driver.envelope(0, epoch=2))
