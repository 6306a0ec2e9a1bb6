"""A round of a move whose controller has died: the gate's word decides what becomes of it on the other shards."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mempool.errors import Internal, ShardUnavailable, StalePlacement
from mempool.shard import parking
from mempool.types import Envelope, GatherReply, GatherRequest, PullPages, TableStatus, TableView
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver

LEASE_S = 0.3
BOUND_S = 20.0


def begun(make_driver: MakeDriver) -> tuple[Driver, TableView]:
    """Two shards in a round that moves row page 0 from the gate to shard 1; the view that would end it."""
    driver = make_driver(2, held_lease_s=0.5).create(make_schema(), "rows")
    (view,) = driver.call(driver.host(0).views())
    owners = view.placement.owners.copy()
    owners[0] = 1
    for shard in range(2):
        driver.call(driver.host(shard).freeze(driver.table_id, 5.0, token="r1", lease_s=LEASE_S))
    blocks = (0, 1, 2)
    pages = PullPages(
        table_id=driver.table_id, source=view.shards[0], row_pages=np.array([0]), blocks=blocks, token="r1"
    )
    driver.call(driver.host(1).pull_pages(pages))
    return driver, replace(view, placement=replace(view.placement, epoch=view.placement.epoch + 1, owners=owners))


def table(driver: Driver, shard: int) -> TableStatus:
    (found,) = driver.call(driver.host(shard).status()).tables
    return found


def until(check: Callable[[], bool]) -> None:
    end_s = time.monotonic() + BOUND_S
    while not check():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.01)


def test_a_round_that_nobody_renews_is_over_everywhere_and_refuses_what_is_late(make_driver: MakeDriver) -> None:
    driver, moved = begun(make_driver)
    until(lambda: not table(driver, 0).frozen and not table(driver, 1).frozen)
    for shard in range(2):
        with pytest.raises(StalePlacement, match="round 'r1' of a move is over"):
            driver.call(driver.host(shard).set_view(moved, token="r1"))
        with pytest.raises(StalePlacement, match="over"):
            driver.call(driver.host(shard).freeze(driver.table_id, 5.0, token="r1", lease_s=1.0))
    with pytest.raises(Internal):  # what was staged is dropped
        driver.call(driver.host(1).set_view(moved))
    assert {table(driver, shard).epoch for shard in range(2)} == {moved.placement.epoch - 1}


def test_a_round_that_the_gate_has_decided_is_followed_without_any_controller(make_driver: MakeDriver) -> None:
    driver, moved = begun(make_driver)
    driver.call(driver.host(0).set_view(moved, token="r1"))
    until(lambda: table(driver, 1).epoch == moved.placement.epoch and not table(driver, 1).frozen)
    assert table(driver, 0).pages + table(driver, 1).pages == moved.placement.owners.size
    assert table(driver, 0).lost_pages == table(driver, 1).lost_pages == 0


def test_a_shard_waits_for_a_gate_that_still_holds(make_driver: MakeDriver) -> None:
    driver, moved = begun(make_driver)
    driver.call(driver.host(0).freeze(driver.table_id, 5.0, token="r1", lease_s=60.0))
    time.sleep(4 * LEASE_S)  # its own lease has ended, and the gate was asked
    assert table(driver, 1).frozen
    driver.call(driver.host(0).set_view(moved, token="r1"))
    until(lambda: table(driver, 1).epoch == moved.placement.epoch)


def test_another_round_at_the_gate_does_not_keep_the_one_before_it_alive(make_driver: MakeDriver) -> None:
    driver, moved = begun(make_driver)
    driver.call(driver.host(0).thaw(driver.table_id, token="r1"))
    driver.call(driver.host(0).freeze(driver.table_id, 5.0, token="r2", lease_s=600.0))
    until(lambda: not table(driver, 1).frozen)
    assert table(driver, 0).round == "r2"
    driver.call(driver.host(1).freeze(driver.table_id, 5.0, token="r2", lease_s=600.0))
    with pytest.raises(StalePlacement, match="round 'r1' of a move is over"):
        driver.call(driver.host(1).set_view(moved, token="r1"))


def left(make_driver: MakeDriver) -> tuple[Driver, TableView]:
    """Two shards in a round that moves all that shard 1 has to the gate; the view that would end it."""
    driver = make_driver(2).create(make_schema(), "rows")
    (view,) = driver.call(driver.host(0).views())
    for shard in range(2):
        driver.call(driver.host(shard).freeze(driver.table_id, 5.0, token="r1", lease_s=600.0))
    row_pages = np.nonzero(view.placement.owners[:, 0] == 1)[0]
    pages = PullPages(
        table_id=driver.table_id, source=view.shards[1], row_pages=row_pages, blocks=(0, 1, 2), token="r1"
    )
    driver.call(driver.host(0).pull_pages(pages))
    owners = np.zeros_like(view.placement.owners)
    return driver, replace(view, placement=replace(view.placement, epoch=view.placement.epoch + 1, owners=owners))


def gather_at_1(driver: Driver) -> GatherReply:
    envelope = Envelope(table_id=driver.table_id, epoch=1, incarnation=1, table_version=0)
    ids, offsets = torch.tensor([driver.schema.num_slots - 1]), torch.tensor([0, 1])
    request = GatherRequest(envelope=envelope, lookup_id=1, ids=ids, weights=None, offsets=offsets, remember=False)
    reply: GatherReply = driver.call(driver.host(1).gather(request))
    return reply


def test_who_reads_where_pages_leave_hears_of_what_the_gate_has_decided(make_driver: MakeDriver) -> None:
    """Simulation, seed 6302: another trainer's step may have been acknowledged under the next view by then."""
    driver, moved = left(make_driver)
    driver.call(driver.host(0).set_view(moved, token="r1"))
    assert table(driver, 1).epoch == moved.placement.epoch - 1, "nobody has told it"
    with pytest.raises(StalePlacement, match="is at epoch 2"):
        gather_at_1(driver)
    assert table(driver, 1).pages == 0


def test_who_reads_where_pages_leave_is_answered_while_nothing_is_decided(make_driver: MakeDriver) -> None:
    driver, _ = left(make_driver)
    assert gather_at_1(driver).stamp.epoch == 1
    assert table(driver, 1).frozen


def test_who_reads_where_pages_leave_is_told_who_does_not_say_what_was_decided(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "LONGEST_WAIT_S", 0.3)
    driver, _ = left(make_driver)
    gate = driver.host(0)

    async def silent() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(gate, "views", silent)
    with pytest.raises(ShardUnavailable, match="whether round 'r1' of a move is decided: shard 0"):
        gather_at_1(driver)


def test_a_view_of_a_round_that_does_not_hold_the_table_is_refused(make_driver: MakeDriver) -> None:
    """As at a gate that was started anew: it cannot know that nothing has changed since."""
    driver = make_driver(1).create(make_schema())
    (view,) = driver.call(driver.host(0).views())
    later = replace(view, placement=replace(view.placement, epoch=view.placement.epoch + 1))
    with pytest.raises(StalePlacement, match="'r9' of a move does not hold the table"):
        driver.call(driver.host(0).set_view(later, token="r9"))
    driver.call(driver.host(0).set_view(later))
    driver.call(driver.host(0).set_view(later, token="r9"))  # it has that view already
    assert table(driver, 0).epoch == later.placement.epoch
