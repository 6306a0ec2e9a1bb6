"""The oracle of the simulation is right: it is what torch's optimizers make in float64."""

from dataclasses import replace
from random import Random

import pytest
import torch

from mempool.types import OptimizerSpec
from tests.contract.bags import Bags
from tests.contract.oracle import Oracle as Float64
from tests.simulation.oracle import Content, Oracle
from tests.simulation.tables import ALGORITHMS, NUM_SLOTS, draw_bags, draw_grads, draw_schema


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_oracle_is_what_torch_makes_in_float64(algorithm: str) -> None:
    random = Random(algorithm)
    schema = replace(
        draw_schema(random, "facts"),
        dtype="float32",
        rounding="nearest",
        master=False,
        keys=None,
        optimizer=OptimizerSpec(algorithm=algorithm, lr=0.1, eps=1e-3 if algorithm != "sgd" else 1e-10),  # type: ignore[arg-type]
    )
    oracle = Oracle(schema)
    every = torch.arange(NUM_SLOTS)
    reference = Float64(schema, oracle.read("values", every))
    for number in range(8):
        contents = []
        for _ in range(random.randint(1, 3)):
            ids, weights, offsets = draw_bags(random)
            contents.append(Content(ids, weights, offsets, draw_grads(random, len(offsets) - 1)))
            reference.backward(Bags(ids, weights, offsets), contents[-1].grads)
        oracle.step(contents, lr=0.05 * (number + 1), grad_scale=0.5)
        reference.step(0.05 * (number + 1), 0.5)
        torch.testing.assert_close(
            oracle.read("values", every).double(), reference.values.detach(), rtol=1e-4, atol=1e-5
        )
    oracle.close()


def test_asked_for_many_at_once_it_answers_as_one_by_one() -> None:
    random = Random(7)
    oracle = Oracle(draw_schema(random, "facts"))
    asked = []
    for _ in range(9):
        ids, weights, offsets = draw_bags(random)
        asked.append((ids, torch.ones(len(ids)) if weights is None else weights, offsets))
    for bags, sums in zip(asked, oracle.gather_all(asked), strict=True):
        assert torch.equal(oracle.gather(*bags), sums)
    oracle.close()
