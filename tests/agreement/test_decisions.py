"""One decision over several tables: clipping by global norm and GradScaler runs equal torch's."""

import math
from collections.abc import Callable

import pytest
import torch

from mempool.nn import PoolOptimizer
from mempool.optim import Adagrad

from .conftest import Pools
from .twin import Twin

STEPS = 16


def make_twin(pools: Pools, *, max_norm: float | None) -> tuple[Twin, PoolOptimizer, torch.optim.Optimizer]:
    """Two tables on 3 shards, cut in different ways."""
    twin = Twin(
        [
            pools.table(
                shards=3, layout="columns", num_slots=400, value_dim=24, block_dim=8, optimizer=Adagrad(lr=0.1)
            ),
            pools.table(shards=3, layout="rows", num_slots=300, value_dim=10, page_slots=16, optimizer=Adagrad(lr=0.1)),
        ],
        sparse=False,
    )
    return twin, PoolOptimizer(twin.tables, max_norm=max_norm), torch.optim.Adagrad(twin.parameters(), lr=0.1)


@pytest.mark.parametrize("max_norm", [3.0, 1e4])
def test_clipping_by_global_norm_equals_torchs(pools: Pools, max_norm: float) -> None:
    twin, ours, torchs = make_twin(pools, max_norm=max_norm)
    norms = []
    for _ in range(STEPS):
        twin.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm)))
        for optimizer in (ours, torchs):
            optimizer.step()
            optimizer.zero_grad()
        assert ours.last_norm == pytest.approx(norms[-1], rel=1e-5)
    assert max(norms) > 3.0, "nothing was clipped"
    assert max(twin.errors()) < 1e-5


@pytest.mark.parametrize("max_norm", [None, 3.0])
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda scaler, optimizer: optimizer.step(grad_scaler=scaler), id="step(grad_scaler)"),
        pytest.param(lambda scaler, optimizer: scaler.step(optimizer), id="scaler.step"),
    ],
)
def test_a_grad_scaler_run_with_overflows_equals_torchs(
    pools: Pools, step: Callable[[torch.amp.GradScaler, PoolOptimizer], object], max_norm: float | None
) -> None:
    twin, ours, torchs = make_twin(pools, max_norm=max_norm)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5) for _ in range(2)]
    scales = []
    for number in range(STEPS):
        scale = [float(scaler.scale(torch.ones(()))) for scaler in scalers]
        assert scale[0] == scale[1]
        scales.append(scale[0])
        twin.backward(scale=math.inf if number in (7, 12, 13) else scale[0])
        scalers[1].unscale_(torchs)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), math.inf if max_norm is None else max_norm)
        step(scalers[0], ours)
        scalers[1].step(torchs)
        for scaler in scalers:
            scaler.update()
        for optimizer in (ours, torchs):
            optimizer.zero_grad()
        assert all(table.pending == 0 for table in twin.tables)
    assert min(scales) < 2.0**12 < max(scales)
    assert max(twin.errors()) < 1e-5
    assert {table.counters.steps_committed for table in twin.tables} == {STEPS - 3}
