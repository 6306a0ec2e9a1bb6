"""Experts on their shard: what is refused, what is answered and held of what is asked, and the bits of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.shard import Engine
from mempool.types import GatherRequest
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema

from .conftest import MakeDriver

LENGTHS = (3, 0, 5, 1)
INPUT_DIM = 3
SCHEMA = make_schema(layout="rows")
BOTH = torch.randn(len(LENGTHS), 10, generator=torch.Generator().manual_seed(4))


def asked(driver: Driver, **changes: Any) -> GatherRequest:
    bags = make_bags(1, lengths=LENGTHS)
    request = GatherRequest(
        envelope=driver.envelope(0),
        lookup_id=1,
        ids=bags.ids,
        weights=bags.weights,
        offsets=bags.offsets,
        remember=True,
        act="gelu",
        inputs=BOTH[:, :INPUT_DIM].contiguous(),
    )
    return replace(request, **changes)


def update_of(driver: Driver, sequence: int = 1, **changes: Any) -> Any:
    of_experts = {"act": "gelu", "input_dim": INPUT_DIM} | changes
    return driver.update_request(0, 1, sequence, BOTH, bags=make_bags(1, lengths=LENGTHS), **of_experts)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8])
def test_inputs_of_other_dtypes_are_refused(make_driver: MakeDriver, dtype: torch.dtype) -> None:
    driver = make_driver().create(SCHEMA)
    with pytest.raises(InvalidRequest, match=r"inputs of experts must be \[4, I\] float32 or bfloat16.*torch\."):
        driver.call(driver.host(0).gather(asked(driver, inputs=torch.ones(4, INPUT_DIM, dtype=dtype))))
    assert driver.call(driver.host(0).status()).context_bytes == 0


def test_experts_that_are_asked_for_at_once_are_no_values(make_driver: MakeDriver) -> None:
    driver = make_driver().create(SCHEMA)
    engine = driver.host(0)
    assert isinstance(engine, Engine)
    plain = asked(driver, private=True)
    usual = replace(plain, ids=plain.ids.to(torch.uint32))
    found = engine.at_once.begin_gather(usual, alone=True)()
    expected = driver.call(engine.gather(plain)).values
    assert expected.shape == (4, 7)
    assert found is not None
    assert torch.equal(found.values, expected)


@pytest.mark.parametrize("owners", ["columns", "mixed"])
def test_slots_that_are_cut_are_no_experts_whatever_the_layout_says(make_driver: MakeDriver, owners: str) -> None:
    """As those of a table are that became, by a fork, what one of another layout is."""
    driver = make_driver(3).create(SCHEMA, owners)
    shard = next(shard for shard in driver.owners if driver.blocks(shard))
    with pytest.raises(InvalidRequest, match=f"slots of table 'facts' are cut on shard {shard}"):
        driver.call(driver.host(shard).gather(asked(driver, envelope=driver.envelope(shard))))
    request = replace(
        update_of(driver),
        envelope=driver.envelope(shard),
        blocks=driver.blocks(shard),
        grads=BOTH[:, driver.columns(driver.blocks(shard))].contiguous(),
    )
    with pytest.raises(InvalidRequest, match=f"slots of table 'facts' are cut on shard {shard}"):
        driver.call(driver.host(shard).update(request))
    assert driver.status(shard).updates_held == 0
