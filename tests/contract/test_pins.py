"""One version of a table, kept for a reader over all shards while training goes on."""

import pytest
import torch

from mempool.errors import AlreadyExists, InvalidRequest, VersionGone
from mempool.types import FlatKeySpec, ProductKeySpec

from .bags import make_bags
from .driver import Driver, make_schema
from .pins import pin, pin_all, same, seen

GRADS = torch.linspace(-1, 1, 40).view(4, 10)


@pytest.mark.parametrize("keys", ["flat", "product"])
def test_what_is_pinned_is_read_to_the_bit(driver: Driver, keys: str) -> None:
    if keys == "flat":
        driver.create(make_schema(keys=FlatKeySpec(key_dim=5)), "mixed")
    else:
        driver.create(make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=3, key_dim=4)), "mixed", [1, 0, 2])
    driver.train(1, {1: (make_bags(1, num_slots=49), GRADS)})
    assert pin_all(driver) == 1
    wanted = seen(driver)
    driver.train(2, {2: (make_bags(2, num_slots=49), GRADS)})
    driver.write("keys", torch.tensor([1]), torch.ones(1, driver.row_width("keys")))
    assert same(seen(driver, "reader"), wanted)
    assert not same(seen(driver), wanted)
    assert {pin(driver, shard, "renew") for shard in driver.owners} == {1}
    assert {table.version for table in driver.status(driver.owners[0]).pins} == {1}
    for shard in driver.owners:
        pin(driver, shard, "release")
    with pytest.raises(VersionGone, match="it was released"):
        seen(driver, "reader")


def test_a_snapshot_is_found_by_its_name(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    for shard in driver.owners:
        pin(driver, shard, "arm", name="before")
    for shard in driver.owners:
        pin(driver, shard, "settle", version=0)
    wanted = seen(driver)
    driver.train(1, {1: (make_bags(1), GRADS)})
    with pytest.raises(AlreadyExists, match="'before' already"):
        pin(driver, driver.gate, "arm", "another", name="before")
    assert {pin(driver, shard, "attach", "second", name="before") for shard in driver.owners} == {0}
    assert {(each.name, each.version) for each in driver.status(driver.gate).pins} == {("before", 0), ("", 0)}
    for shard in driver.owners:
        pin(driver, shard, "release", "", name="before")
    assert same(seen(driver, "second"), wanted)
    with pytest.raises(VersionGone, match="snapshot 'before'"):
        pin(driver, driver.gate, "attach", "third", name="before")


def test_pages_that_move_end_a_pin(driver: Driver) -> None:
    driver.create(make_schema(), "columns")
    pin_all(driver)
    driver.move("rows")
    with pytest.raises(VersionGone, match="moved"):
        seen(driver, "reader")


def test_a_bad_pin_is_refused(driver: Driver) -> None:
    driver.create(make_schema(), "one")
    for what in ({"token": ""}, {"lease_s": 1e9}, {"token": "x" * 200}):
        with pytest.raises(InvalidRequest, match="Nothing was changed"):
            pin(driver, 0, "arm", **what)
    pin(driver, 0, "arm")
    with pytest.raises(InvalidRequest, match="was not settled"):
        seen(driver, "reader")
