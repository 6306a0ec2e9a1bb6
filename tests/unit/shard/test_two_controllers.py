"""Two controllers have made one epoch: what the late one says of it is refused, and changes nothing."""

from dataclasses import replace

import numpy as np
import pytest

from mempool.errors import NotFound, StalePlacement
from mempool.types import AttachTable
from tests.contract.driver import make_schema, same

from .conftest import MakeDriver


def test_a_view_of_the_present_epoch_with_another_placement_is_refused(make_driver: MakeDriver) -> None:
    driver = make_driver(2).create(make_schema(), "columns")
    host = driver.host(0)
    (view,) = driver.call(host.views())
    driver.call(host.set_view(view))  # said again, it changes nothing
    owners = np.full_like(view.placement.owners, 1)
    other = replace(view, placement=replace(view.placement, owners=owners))
    with pytest.raises(StalePlacement, match="one of two controllers is late"):
        driver.call(host.set_view(other))
    with pytest.raises(StalePlacement, match="one of two controllers is late"):
        driver.call(host.set_view(other, token="late"))
    older = replace(view, placement=replace(view.placement, epoch=0))
    with pytest.raises(StalePlacement, match="the view of epoch 0 is late"):
        driver.call(host.set_view(older, token="late"))
    (kept,) = driver.call(host.views())
    assert np.array_equal(kept.placement.owners, view.placement.owners)


def test_a_table_that_was_confirmed_is_not_dropped_as_one_that_nobody_has_made(make_driver: MakeDriver) -> None:
    driver = make_driver(1)
    driver.view = driver.make_view(make_schema(), [[0, 0, 0]] * 7, epoch=1)
    host = driver.host(0)
    confirm = AttachTable(view=driver.view, mode="confirm")
    driver.call(host.attach_table(AttachTable(view=driver.view, mode="initialise", pending=True)))
    driver.call(host.attach_table(confirm))
    before = driver.contents()
    with pytest.raises(StalePlacement, match=r"table 'facts' \(1\) was confirmed on shard 0: who says that nobody has"):
        driver.call(host.drop_table(1, unmade=True))
    assert same(driver.contents(), before)
    driver.call(host.drop_table(1))
    driver.call(host.drop_table(2, unmade=True))
    late = replace(driver.view, schema=replace(driver.view.schema, table_id=2))
    with pytest.raises(NotFound, match="the request is late"):
        driver.call(host.attach_table(AttachTable(view=late, mode="initialise", pending=True)))
