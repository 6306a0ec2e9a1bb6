from dataclasses import replace

import pytest
import torch

from mempool.kernels import STATE_NAMES
from mempool.shard.steps.optimizers import optimizer_step, rounding, state_arrays
from mempool.types import OptimizerSpec
from tests.contract.driver import make_schema


@pytest.mark.parametrize("algorithm", STATE_NAMES)
def test_state_is_what_the_kernels_name(algorithm: str) -> None:
    spec = OptimizerSpec(algorithm=algorithm, lr=0.1, initial_accumulator_value=0.25)  # type: ignore[arg-type]
    arrays = state_arrays(spec)
    assert tuple(array.name for array in arrays) == STATE_NAMES[algorithm]
    accumulates = algorithm in ("adagrad", "rowwise_adagrad")
    assert all(array.initial == (0.25 if accumulates else 0.0) for array in arrays)


def test_the_version_is_the_step() -> None:
    spec = OptimizerSpec(algorithm="adam", lr=9.0, eps=1e-3, beta1=0.5, beta2=0.75, lr_decay=0.1)
    step = optimizer_step(make_schema(optimizer=spec), lr=0.2, grad_scale=0.5, version=7)
    assert (step.step, step.lr, step.grad_scale, step.block_dim) == (7, 0.2, 0.5, 4)
    assert (step.eps, step.beta1, step.beta2, step.lr_decay) == (1e-3, 0.5, 0.75, 0.1)
    # torch.optim.SparseAdam: lr * sqrt(1 - beta2^t) / (1 - beta1^t)
    assert step.step_size == pytest.approx(0.2 * (1 - 0.75**7) ** 0.5 / (1 - 0.5**7))


def test_rounding_depends_on_seed_name_and_version_alone() -> None:
    schema = make_schema(dtype="int8", rounding="stochastic")

    def key(version: int = 1, **changes: object) -> int:
        made = rounding(replace(schema, **changes), (0, 2), version=version, device=torch.device("cpu"))  # type: ignore[arg-type]
        assert made is not None
        assert made.columns.tolist() == [0, 8]
        return made.key

    assert key(table_id=9) == key()
    assert len({key(), key(version=2), key(seed=8), key(name="other")}) == 4
    assert rounding(make_schema(), (0,), version=1, device=torch.device("cpu")) is None
