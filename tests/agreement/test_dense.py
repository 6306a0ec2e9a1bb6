"""A table with a dense AdamW is torch.optim.AdamW on the whole table: every slot decays and coasts at every step."""

from contextlib import ExitStack

import pytest
import torch

from mempool.nn import PoolOptimizer
from mempool.optim import AdamW

from .conftest import Pools
from .reference import all_rows, relative_error

NUM_SLOTS, VALUE_DIM, STEPS = 300, 28, 16
TABLE = {"num_slots": NUM_SLOTS, "value_dim": VALUE_DIM, "block_dim": 8, "page_slots": 32}
HYPER = {"betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(("shards", "layout", "rescaled"), [(2, "rows", 0), (2, "columns", 0), (1, "auto", 3)])
@pytest.mark.parametrize("master", [False, True])
def test_gathers_and_rows_equal_torchs_adamw_on_the_whole_table(
    pools: Pools, shards: int, layout: str, rescaled: int, master: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    with ExitStack() as stack:
        pool = stack.enter_context(pools.fresh(shards)) if rescaled else pools.pool(shards)
        config = TABLE | ({"dtype": "bfloat16", "master": True} if master else {})
        optimizer = AdamW(lr=0.05, dense=True, **HYPER)
        table = pools.table(
            pool=pool if rescaled else None, shards=shards, layout=layout, optimizer=optimizer, **config
        )
        everything = torch.arange(NUM_SLOTS)
        whole = torch.nn.Parameter(table.state(everything)["values.master"] if master else all_rows(table))
        steps = [PoolOptimizer(table), torch.optim.AdamW([whole], lr=0.05, **HYPER)]
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(step, STEPS) for step in steps]
        for number in range(STEPS):
            # Few slots a step: most coast, some for all of the run, the first hundred never.
            ids = torch.randint(NUM_SLOTS - 100, (6, 5), generator=generator) + 100
            weights = torch.rand(6, 5, generator=generator) + 0.1
            target = torch.randn(6, VALUE_DIM, generator=generator)
            pooled = table.gather(ids, weights)
            expected = torch.einsum("bl,blv->bv", weights, whole[ids])
            assert relative_error(pooled, expected) < (4e-3 if master else 1e-5)
            # With a master, look-ups read rounded values: both train on one gradient all the same.
            gradient = (expected - target).detach()
            pooled.backward(gradient)
            expected.backward(gradient)
            if number == STEPS // 2 and rescaled:
                pool.rescale(rescaled)
            for step, schedule in zip(steps, schedules, strict=True):
                step.step()
                step.zero_grad()
                schedule.step()
        rows = table.state(everything)["values.master"] if master else all_rows(table)
        assert relative_error(rows, whole) < 1e-5
        assert relative_error(table.state(everything)["values.exp_avg"], steps[1].state[whole]["exp_avg"]) < 1e-5
        assert relative_error(table.state(everything)["values.exp_avg_sq"], steps[1].state[whole]["exp_avg_sq"]) < 1e-5
        assert table.state(everything, ["values.last_step"])["values.last_step"].unique().tolist() == [STEPS]
        if master:
            assert torch.equal(all_rows(table), rows.to(torch.bfloat16))
