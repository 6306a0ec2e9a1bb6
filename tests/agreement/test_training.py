"""Remote training is local training: 200 steps equal torch's own sparse optimizers, also while the pool is rescaled."""

from collections.abc import Callable

import pytest
import torch

from mempool.nn import PoolOptimizer
from mempool.optim import SGD, Adagrad, Adam

from .conftest import Pools
from .twin import Twin

# torch.optim.Adagrad makes sparse tensors in a way that torch itself warns of, once.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

TABLE = {"num_slots": 600, "value_dim": 28, "block_dim": 8, "page_slots": 32}

OPTIMIZERS: dict[str, tuple[SGD | Adagrad | Adam, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]] = {
    "SGD": (SGD(lr=0.2), lambda parameters: torch.optim.SGD(parameters, lr=0.2)),
    "Adagrad": (
        Adagrad(lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
    ),
    "Adam": (
        Adam(lr=0.01, betas=(0.8, 0.99)),
        lambda parameters: torch.optim.SparseAdam(parameters, lr=0.01, betas=(0.8, 0.99)),
    ),
}


def _steps(pools: Pools, optimizer: str) -> int:
    """How many: what a step computes is the same on all pools, and errors add up under each rule alike."""
    return 200 if (pools.kind, optimizer) == ("local", "Adam") else 50


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_many_steps_equal_torchs_sparse_training(pools: Pools, optimizer: str) -> None:
    ours, torchs = OPTIMIZERS[optimizer]
    table = pools.table(shards=3, layout="grid", optimizer=ours, **TABLE)
    twin = Twin([table], sparse=True)
    steps = [PoolOptimizer(table), torchs(twin.parameters())]
    count = _steps(pools, optimizer)
    for _ in range(count):
        twin.backward()
        for step in steps:
            step.step()
            step.zero_grad()
    assert max(twin.errors()) < 1e-5
    assert table.counters.updates_committed == count


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_many_steps_equal_torchs_while_the_pool_goes_from_one_to_three_to_two_shards(
    pools: Pools, optimizer: str
) -> None:
    ours, torchs = OPTIMIZERS[optimizer]
    count = _steps(pools, optimizer)
    grow_at, shrink_at = count // 3, 2 * count // 3
    with pools.fresh(1) as pool:
        table = pools.table(pool=pool, optimizer=ours, **TABLE)
        twin = Twin([table], sparse=True)
        steps = [PoolOptimizer(table), torchs(twin.parameters())]
        for number in range(count):
            twin.backward()
            if number in (grow_at, shrink_at):
                # Between backward and step: what is held does not move, the client sends it again.
                pool.rescale(shards=3 if number == grow_at else 2)
            for step in steps:
                step.step()
                step.zero_grad()
        assert max(twin.errors()) < 1e-5
        status = pool.status()
        assert len(status.shards) == 2
        assert {shard.tables[0].version for shard in status.shards} == {count}
        assert {shard.tables[0].updates_applied for shard in status.shards} == {count}
