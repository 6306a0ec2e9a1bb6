"""A shard makes a table of another one that stands still, and says what is in the way where it cannot."""

from dataclasses import replace

import pytest
import torch

from mempool.errors import InvalidRequest, NotFound, ShardUnavailable, StalePlacement
from mempool.types import AttachTable, ForkPoint, Placement, TableView

from .bags import make_bags
from .driver import Driver, make_schema, same

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
TOKEN = "moment"


def forked_view(driver: Driver, **changes: int) -> TableView:
    table_id, placement = driver.table_id + 1000, driver.placed.placement
    return replace(
        driver.placed,
        schema=replace(driver.schema, table_id=table_id, name="trial", **changes),
        placement=Placement(table_id=table_id, epoch=1, owners=placement.owners, key_owners=placement.key_owners),
    )


def attach(driver: Driver, view: TableView, mode: str, point: ForkPoint | None) -> None:
    request = AttachTable(view=view, mode=mode, pending=True, fork=point)  # type: ignore[arg-type]
    driver.call(driver.host(0).attach_table(request))


def test_a_table_is_forked_where_it_stands_still_at_that_version_alone(driver: Driver) -> None:
    driver.create(make_schema())
    driver.train(1, {0: (make_bags(1), GRADS)})
    view, base = forked_view(driver), driver.table_id
    ready, version = ForkPoint(table_id=base), driver.freeze(0, token=TOKEN)
    moment = ForkPoint(table_id=base, token=TOKEN, version=version)
    with pytest.raises(NotFound):
        attach(driver, view, "forked", moment)  # nobody said that it is to be one
    attach(driver, view, "fork", ready)
    attach(driver, view, "fork", ready)
    wrong = (
        (None, InvalidRequest),
        (ready, InvalidRequest),
        (replace(moment, table_id=base + 1), InvalidRequest),
        (replace(moment, token="another"), StalePlacement),
        (replace(moment, version=version + 1), StalePlacement),
    )
    for point, kind in wrong:
        with pytest.raises(kind, match=r"hanged|round"):
            attach(driver, view, "forked", point)
    driver.thaw(0, token=TOKEN)
    with pytest.raises(StalePlacement):
        attach(driver, view, "forked", moment)
    driver.freeze(0, token="again")
    moment = replace(moment, token="again")
    attach(driver, view, "forked", moment)
    attach(driver, view, "forked", moment)  # a repeat
    driver.thaw(0, token="again")
    expected = {"values": driver.read()}
    driver.train(2, {0: (make_bags(2), GRADS)})
    later = driver.read()
    placed, driver.view, driver.table_id = driver.placed, view, view.schema.table_id
    with pytest.raises(ShardUnavailable):
        driver.read()  # it is pending
    attach(driver, view, "confirm", None)
    assert same({"values": driver.read()}, expected)
    assert driver.status(0).version == 1
    driver.train(1, {0: (make_bags(2), GRADS)})  # steps of the other table are no steps of this one
    assert same({"values": driver.read()}, {"values": later})
    driver.view, driver.table_id = placed, base


def test_other_pages_than_the_tables_are_refused(driver: Driver) -> None:
    driver.create(make_schema())
    base = driver.table_id
    with pytest.raises(InvalidRequest, match="other pages"):
        attach(driver, forked_view(driver, num_slots=driver.schema.num_slots + 1), "fork", ForkPoint(table_id=base))
    with pytest.raises(InvalidRequest, match="of which"):
        attach(driver, forked_view(driver), "fork", None)
    with pytest.raises(NotFound):
        attach(driver, forked_view(driver), "fork", ForkPoint(table_id=base + 7))
