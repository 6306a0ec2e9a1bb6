import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mempool.kernels import STATE_NAMES
from mempool.shard.steps.optimizers import optimizer_step, rounding, state_arrays
from mempool.types import OptimizerSpec
from tests.contract.driver import make_schema


@pytest.mark.parametrize("rule", STATE_NAMES)
def test_state_is_what_the_kernels_name(rule: str) -> None:
    algorithm: Any = rule.removesuffix("_momentum")
    momentum = 0.5 if algorithm != rule else 0.0
    spec = OptimizerSpec(algorithm=algorithm, lr=0.1, initial_accumulator_value=0.25, momentum=momentum)
    arrays = state_arrays(spec)
    assert tuple(array.name for array in arrays) == STATE_NAMES[rule]
    accumulates = rule in ("adagrad", "rowwise_adagrad")
    assert all(array.initial == (0.25 if accumulates else 0.0) for array in arrays)
    if momentum:
        assert math.copysign(1.0, arrays[0].initial) == -1.0  # that of a slot without a gradient


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"algorithm": "sgd"}, {"algorithm": "sgd", "plain": True}),
        ({"algorithm": "sgd", "momentum": 0.5, "nesterov": True}, {"algorithm": "sgd_momentum", "nesterov": True}),
        ({"algorithm": "sgd", "momentum": 0.5, "dampening": 0.25}, {"momentum": 0.5, "dampening": 0.25}),
        ({"algorithm": "adagrad", "weight_decay": 0.1}, {"gradient_decay": 0.1, "decay": 1.0}),
        (
            {"algorithm": "adagrad", "weight_decay": 0.1, "decoupled_weight_decay": True},
            {"gradient_decay": 0.0, "decay": 1.0 - 0.2 * 0.1},
        ),
        ({"algorithm": "adamw", "weight_decay": 0.1}, {"gradient_decay": 0.0, "decay": 1.0 - 0.2 * 0.1, "plain": True}),
        ({"algorithm": "adam", "corrected_eps": True}, {"root_correction": (1 - 0.999**7) ** 0.5, "plain": True}),
        ({"algorithm": "adam"}, {"root_correction": 1.0, "max_norm": math.inf}),
        ({"algorithm": "adam", "max_norm": 3.0}, {"max_norm": 3.0, "plain": False}),
    ],
    ids=str,
)
def test_options_are_those_of_the_step(options: dict[str, Any], expected: dict[str, Any]) -> None:
    schema = make_schema(optimizer=OptimizerSpec(lr=0.1, **options))
    step = optimizer_step(schema, lr=0.2, grad_scale=1.0, number=7)
    assert {name: getattr(step, name) for name in expected} == expected


def test_the_number_is_the_step() -> None:
    spec = OptimizerSpec(algorithm="adam", lr=9.0, eps=1e-3, beta1=0.5, beta2=0.75, lr_decay=0.1)
    step = optimizer_step(make_schema(optimizer=spec), lr=0.2, grad_scale=0.5, number=7)
    assert (step.step, step.lr, step.grad_scale, step.block_dim) == (7, 0.2, 0.5, 4)
    assert (step.eps, step.beta1, step.beta2, step.lr_decay) == (1e-3, 0.5, 0.75, 0.1)
    # torch.optim.SparseAdam: lr * sqrt(1 - beta2^t) / (1 - beta1^t)
    assert step.step_size == pytest.approx(0.2 * (1 - 0.75**7) ** 0.5 / (1 - 0.5**7))


def test_rounding_depends_on_seed_name_and_number_alone() -> None:
    schema = make_schema(dtype="int8", rounding="stochastic")

    def key(number: int = 1, **changes: object) -> int:
        made = rounding(replace(schema, **changes), (0, 2), number=number, device=torch.device("cpu"))  # type: ignore[arg-type]
        assert made is not None
        assert made.columns.tolist() == [0, 8]
        return made.key

    assert key(table_id=9) == key()
    assert len({key(), key(number=2), key(seed=8), key(name="other")}) == 4
    assert rounding(make_schema(), (0,), number=1, device=torch.device("cpu")) is None
