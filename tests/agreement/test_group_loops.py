"""Training loops of ranks that step together: mixed precision and accumulated gradients, as DDP has them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mempool
from mempool.client import Pool
from tests.agreement.ranks import Ranks, push
from tests.unit.client.grpc_pool import GrpcPoolHere

SLOTS, DIM = 96, 24


@pytest.fixture(scope="module")
def here() -> Iterator[GrpcPoolHere]:
    pool = GrpcPoolHere(shards=2)
    yield pool
    pool.close()


def config(name: str) -> mempool.TableConfig:
    return mempool.TableConfig(
        name=name, num_slots=SLOTS, value_dim=DIM, seed=5, optimizer=mempool.optim.Adagrad(lr=0.2)
    )


def close(table: mempool.Table, alone: mempool.Table) -> bool:
    rows, wanted = table.rows(range(SLOTS)), alone.rows(range(SLOTS))
    return bool((rows - wanted).norm() <= 1e-5 * wanted.norm())


def test_an_inf_of_one_rank_skips_the_step_on_all(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("scaled")], world_size=2, group="scaled") as ranks, mempool.local(shards=1) as alone:

        def train(rank: int, pool: Pool) -> list[float]:
            table, scales = pool.table("scaled"), []
            optimizer = mempool.optim.PoolOptimizer(table)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
            scaler.scale(torch.ones(()))  # begins it
            for step in range(4):
                overflows = step == 1 and rank == 1
                push(table, step, rank=rank, world_size=2, scale=float("inf") if overflows else scaler.get_scale())
                optimizer.step(grad_scaler=scaler)
                scaler.update()
                scales.append(scaler.get_scale())
            return scales

        assert ranks.each(train) == [[8.0, 4.0, 4.0, 4.0]] * 2
        table = alone.create_table(config("scaled"))
        for step in (0, 2, 3):
            push(table, step, rank=0, world_size=1)
            table.commit(grad_scale=1 / 2)
        assert ranks.pools[0].table("scaled").link.version() == 3
        assert close(ranks.pools[0].table("scaled"), table)


@pytest.mark.parametrize("clips", [False, True])
def test_gradients_accumulate_on_each_rank_until_all_step(here: GrpcPoolHere, clips: bool) -> None:
    """As under DDP's ``no_sync``: backward passes speak to no other rank, whatever number each has of them."""
    name = f"accumulated-{clips}"
    max_norm = 0.5 if clips else None
    with Ranks(here, [config(name)], world_size=2, group=name) as ranks, mempool.local(shards=1) as alone:

        def train(rank: int, pool: Pool) -> None:
            table = pool.table(name)
            optimizer = mempool.optim.PoolOptimizer(table, max_norm=max_norm)
            for step in range(3):
                for micro in range(2 + rank):
                    push(table, 3 * step + micro, rank=rank, world_size=2, scale=0.5)
                optimizer.step()
                optimizer.zero_grad()

        ranks.each(train)
        table = alone.create_table(config(name))
        optimizer = mempool.optim.PoolOptimizer(table, max_norm=max_norm)
        for step in range(3):
            for rank in range(2):
                for micro in range(2 + rank):
                    push(table, 3 * step + micro, rank=rank, world_size=2, scale=0.25)
            optimizer.step()
        assert ranks.pools[0].table(name).link.version() == 3
        assert close(ranks.pools[0].table(name), table)


def test_a_bounded_rank_that_skips_a_step_is_not_waited_for(here: GrpcPoolHere) -> None:
    how: dict[str, Any] = {"consistency": "bounded", "timeout_s": 10.0}
    with Ranks(here, [config("bounded")], world_size=2, group="bounded", **how) as ranks:

        def train(rank: int, pool: Pool) -> None:
            table = pool.table("bounded")
            optimizer = mempool.optim.PoolOptimizer(table)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
            scaler.scale(torch.ones(()))  # begins it
            for step in range(3):
                overflows = step == 1 and rank == 1
                push(table, step, rank=rank, world_size=2, scale=float("inf") if overflows else scaler.get_scale())
                optimizer.step(grad_scaler=scaler)
                scaler.update()

        ranks.each(train)
        assert ranks.pools[0].table("bounded").link.version() == 5
        assert [group.step for group in ranks.groups] == [3, 3]
