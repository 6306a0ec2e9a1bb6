"""Two controllers have made one epoch: what the late one says of it is refused, and changes nothing."""

from dataclasses import replace

import numpy as np
import pytest

from mempool.errors import StalePlacement
from tests.contract.driver import make_schema

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
