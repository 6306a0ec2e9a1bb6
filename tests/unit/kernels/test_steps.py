"""An optimizer's numbers, the keys of stochastic rounding, the schedule of a dense AdamW, and what is refused of it."""

import math

import pytest
import torch

from mempool import kernels
from mempool.kernels import DenseSchedule, OptimizerStep, Paged, RandomRounding


def test_step_sizes_are_those_of_torch():
    betas = {"beta1": 0.9, "beta2": 0.99}
    assert OptimizerStep("adagrad", lr=0.5, step=11, lr_decay=0.1).step_size == 0.25
    sparse = OptimizerStep("adam", lr=0.5, step=3, **betas)
    assert sparse.step_size == pytest.approx(0.5 * math.sqrt(1 - 0.99**3) / (1 - 0.9**3))
    assert (sparse.root_correction, sparse.decay) == (1.0, 1.0)
    dense = OptimizerStep("adamw", lr=0.5, step=3, weight_decay=0.1, **betas)
    assert dense.step_size == pytest.approx(0.5 / (1 - 0.9**3))
    assert dense.root_correction == pytest.approx(math.sqrt(1 - 0.99**3))
    assert dense.decay == pytest.approx(0.95)
    corrected = OptimizerStep("adam", lr=0.5, step=3, corrected_eps=True, **betas)
    assert (corrected.step_size, corrected.root_correction) == (dense.step_size, dense.root_correction)


def test_weight_decay_is_of_the_values_or_of_the_gradient():
    decoupled = OptimizerStep("adagrad", lr=0.5, step=11, lr_decay=0.1, weight_decay=0.1)
    assert (decoupled.decay, decoupled.gradient_decay, decoupled.plain) == (1 - 0.25 * 0.1, 0.0, False)
    l2 = OptimizerStep("sgd", lr=0.5, weight_decay=0.1, l2=True)
    assert (l2.decay, l2.gradient_decay, l2.plain) == (1.0, 0.1, False)
    assert OptimizerStep("sgd", lr=0.5, l2=True).plain


def test_keys_differ_in_every_part_and_repeat():
    keys = {
        RandomRounding.key_of(seed=seed, table=table, step=step)
        for seed in (0, 1, 2**63 - 1)
        for table in range(10)
        for step in range(100)
    }
    assert len(keys) == 3000
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert RandomRounding.key_of(seed=1, table=2, step=3) in keys


def test_a_schedule_grows_and_keeps_its_steps():
    schedule = DenseSchedule(first_step=5, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    assert schedule.last_step == 4
    rates = [0.1 / (1 + number) for number in range(200)]
    for rate in rates:
        schedule.append(rate)
    assert schedule.last_step == 204
    expected = [
        OptimizerStep("adamw", lr=rate, step=5 + number, beta1=0.9, beta2=0.99, weight_decay=0.1)
        for number, rate in enumerate(rates)
    ]
    for row, name in enumerate(("step_size", "root_correction", "decay")):
        assert torch.equal(schedule.steps[row], torch.tensor([getattr(step, name) for step in expected]))
    products = torch.tensor([step.decay for step in expected], dtype=torch.float64).log().cumsum(0)
    torch.testing.assert_close(schedule.log_decays[1:], products, rtol=1e-12, atol=1e-12)
    assert schedule.log_decays[0] == 0.0


def test_a_decay_without_a_logarithm_is_marked():
    schedule = DenseSchedule(first_step=1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=2.0)
    schedule.append(0.1)
    schedule.append(0.5)
    assert schedule.log_decays[:2].isfinite().all()
    assert schedule.log_decays[2].isnan()


@pytest.mark.parametrize(("beta1", "horizon"), [(0.0, 1), (0.5, 60), (0.9, 395)])
def test_momentum_beyond_the_horizon_is_negligible(beta1, horizon):
    schedule = DenseSchedule(first_step=1, beta1=beta1, beta2=0.99, eps=1e-8, weight_decay=0.0)
    assert schedule.horizon == horizon
    assert beta1**horizon <= 2.0**-60


def test_wrong_catch_ups_are_refused():
    table = torch.zeros(1, dtype=torch.int32)
    schedule = DenseSchedule(first_step=3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
    state = {"exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}
    rows, paged = torch.tensor([0]), Paged(torch.ones(2, 3), table, 1)
    with pytest.raises(ValueError, match="dense adamw needs the state 'last_step'"):
        kernels.catch_up(paged, state, rows, schedule, to=2, block_dim=64)
    state["last_step"] = torch.full((2, 1), 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot catch up to step 3: steps 3 to 2 are recorded"):
        kernels.catch_up(paged, state, rows, schedule, to=3, block_dim=64)
    narrow = Paged(torch.ones(2, 3, dtype=torch.bfloat16), table, 1)
    with pytest.raises(ValueError, match="needs float32 values or a master of them; the arena is bfloat16"):
        kernels.catch_up(narrow, state, rows, schedule, to=2, block_dim=64)
    kernels.catch_up(paged, state, rows, schedule, to=2, block_dim=64)
    assert torch.equal(paged.rows, torch.ones(2, 3))


@pytest.mark.parametrize("name", ["numba", "torch"])
def test_rows_older_than_the_schedule_do_what_is_recorded(name):
    schedule = DenseSchedule(first_step=7, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    schedule.append(0.1)
    results = []
    for last_step in (3, 6):
        paged = Paged(torch.ones(2, 3), torch.zeros(1, dtype=torch.int32), 1)
        state = {"exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}
        state["last_step"] = torch.full((2, 1), last_step, dtype=torch.int32)
        kernels.implementation(name).catch_up(paged, state, torch.tensor([0, 1]), schedule, 7, 64)
        results.append([paged.rows, *state.values()])
    assert all(map(torch.equal, *results))
    assert (results[0][0] < 1).all()
