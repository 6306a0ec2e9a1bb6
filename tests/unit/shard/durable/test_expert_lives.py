"""Updates of experts that are prepared when the power goes: answered as before, and committed to the bit."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from shard_lives import Lives, step

from mempool.types import OptimizerSpec, TableSchema
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema, same

DENSE = OptimizerSpec(algorithm="adamw", lr=0.1, eps=1e-8, weight_decay=0.1, dense=True)
SCHEMAS = [
    make_schema(layout="rows", dtype="int8", rounding="stochastic"),
    make_schema(layout="rows", optimizer=DENSE, dtype="bfloat16", master=True, rounding="nearest"),
]
INPUT_DIM = 3


def held(driver: Driver, number: int, sequence: int) -> torch.Tensor:
    """d_weights and d_inputs of an update of the step, which is held."""
    both = torch.randn(4, 10, generator=torch.Generator().manual_seed(number + sequence))
    request = driver.update_request(0, number, sequence, both, bags=make_bags(number + sequence))
    reply = driver.call(driver.host(0).update(replace(request, act="silu", input_dim=INPUT_DIM)))
    assert reply.weight_grad is not None
    return reply.weight_grad


@pytest.mark.parametrize("schema", SCHEMAS, ids=["int8", "dense adamw"])
def test_what_is_prepared_of_experts_outlives_a_power_cut(
    make_lives: Callable[..., Lives], schema: TableSchema
) -> None:
    lives = make_lives()
    driver = lives.begin().create(schema, "one")
    for number in range(1, 4):
        step(driver, number)
    answers = [held(driver, 4, sequence) for sequence in (1, 2)]
    driver.prepare(4, (1, 2), want_norm=False)
    again = make_lives(lives.after_power_cut(5)).begin(driver)
    assert again.status(0).updates_held == 2
    for one in (again, driver):
        assert all(torch.equal(held(one, 4, sequence), answer) for sequence, answer in enumerate(answers, 1))
        one.commit(4, (1, 2))
    assert same(again.contents(), driver.contents())
