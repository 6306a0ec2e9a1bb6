"""Gathers of arrays at a pin: bit for bit what they are of that version, or none, and then ``pinned`` answers."""

from typing import Any

import numpy as np
import pytest

from mempool import kernels
from mempool.shard import Engine
from mempool.types.messages import ArrayGather, ArrayGathered
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema
from tests.contract.pins import pin_all
from tests.unit.shard.conftest import MakeDriver

from .test_pinned import KINDS, train, write

pytestmark = pytest.mark.skipif(kernels.array_sums() is None, reason="needs Numba")


def asked(driver: Driver, pin: str, seed: int, **changes: Any) -> ArrayGather:
    bags = make_bags(seed)
    ids = (bags.ids.numpy() % driver.schema.num_slots).astype(np.uint32)
    weights = None if bags.weights is None else bags.weights.float().numpy()
    plain = ArrayGather(driver.envelope(0), 1, ids, weights, bags.offsets.numpy(), False, (), False, pin)
    return plain._replace(**changes)


def gathered(driver: Driver, request: ArrayGather) -> ArrayGathered | None:
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    with engine._thread._at_work:  # what it was asked before has ended
        pass
    cost = request.ids.nbytes + 1
    return engine.at_once.gather_arrays(
        request, cost=cost, caller="me", space=lambda b, w: np.empty((b, w), np.float32)
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_sums_at_a_pin_are_those_of_its_version(make_driver: MakeDriver, kind: str) -> None:
    driver = make_one(make_driver, kind)
    wanted = {}
    for step in (1, 2, 3):  # three moments, so that copies of several serve the first
        train(driver, step)
        version = pin_all(driver, f"at {step}")
        for seed in range(1, 5):
            newest = gathered(driver, asked(driver, "", seed))
            assert newest is not None
            wanted[step, seed] = version, newest.values.copy()
        write(driver, step)
    for (step, seed), (version, values) in wanted.items():
        for private in (False, True):
            found = gathered(driver, asked(driver, f"at {step}", seed, private=private))
            assert found is not None
            assert found.stamp.table_version == version
            assert np.array_equal(found.values, values), (step, seed)


def make_one(make_driver: MakeDriver, kind: str) -> Driver:
    schema = make_schema(**KINDS[kind])
    return make_driver(1).create(schema, "one", [0, 0, 0] if schema.num_key_pages else ())


def test_what_is_not_so_plain_is_none(make_driver: MakeDriver) -> None:
    driver = make_one(make_driver, "adagrad")
    pin_all(driver)
    train(driver, 1)
    good = asked(driver, "reader", 1)
    wrong = good.ids.copy()
    wrong[0] = driver.schema.num_slots
    assert gathered(driver, good) is not None
    assert gathered(driver, good._replace(ids=wrong)) is None
    assert gathered(driver, good._replace(remember=True)) is None
    assert gathered(driver, good._replace(ids=wrong[:0], weights=None, offsets=np.array([0, 0]))) is None
    assert gathered(driver, good._replace(pin="never")) is None
    dense = make_one(make_driver, "dense")
    pin_all(dense)
    assert gathered(dense, asked(dense, "reader", 1)) is None
