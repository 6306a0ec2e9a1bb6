"""Ranks that die, and come back: the others are told, the step is whole or not at all, and training goes on."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

import mempool
from mempool.client import Pool
from mempool.errors import MempoolError, RankLost
from tests.agreement.ranks import Ranks, push, together
from tests.unit.client.grpc_pool import GrpcPoolHere

SLOTS, DIM, LEASE_S = 96, 24, 1.0


@pytest.fixture
def here() -> Iterator[GrpcPoolHere]:
    pool = GrpcPoolHere(shards=2, lease_s=LEASE_S)
    yield pool
    pool.close()


def config() -> mempool.TableConfig:
    return mempool.TableConfig(
        name="facts", num_slots=SLOTS, value_dim=DIM, seed=5, optimizer=mempool.optim.Adagrad(lr=0.2)
    )


def trained_alone(steps: int, *, world_size: int) -> torch.Tensor:
    with mempool.local(shards=1) as pool:
        table = pool.create_table(config())
        for step in range(steps):
            push(table, step, rank=0, world_size=1)
            table.commit(grad_scale=1 / world_size)
        return table.rows(range(SLOTS))


def commit(pool: Pool) -> int:
    """As a loop does that waits for a rank to come back."""
    end_s = time.monotonic() + 30.0
    while True:
        try:
            return pool.table("facts").commit()
        except RankLost:
            assert time.monotonic() < end_s
            time.sleep(0.05)


def _until_the_end(pool: Pool) -> None:
    """The commit of a process that is to die in it."""
    with suppress(MempoolError, RuntimeError, asyncio.CancelledError):
        pool.table("facts").commit()


def step(pool: Pool, number: int, *, rank: int, world_size: int) -> int:
    push(pool.table("facts"), number, rank=rank, world_size=world_size)
    return commit(pool)


def check(ranks: Ranks, steps: int) -> None:
    world_size = len(ranks.pools)
    alone = trained_alone(steps, world_size=world_size)
    table = ranks.pools[0].table("facts")
    assert table.link.version() == steps
    rows = table.rows(range(SLOTS))
    assert (rows - alone).norm() <= 1e-5 * alone.norm()


def test_a_lost_rank_is_named_and_the_group_goes_on_when_it_is_back(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=3) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=3))
        push(ranks.pools[1].table("facts"), 1, rank=1, world_size=3)
        ranks.kill(1)
        errors: list[RankLost] = []

        def survive(rank: int) -> int:
            pool = ranks.pools[rank]
            push(pool.table("facts"), 1, rank=rank, world_size=3)
            with pytest.raises(RankLost) as caught:
                pool.table("facts").commit()
            errors.append(caught.value)
            return commit(pool)

        def come_back() -> int:
            while len(errors) < 2:
                time.sleep(0.01)
            group = ranks.come_back(1)
            assert group.step == 1
            assert group.versions == {"facts": 1}
            return step(ranks.pools[1], 1, rank=1, world_size=3)

        assert together([lambda: survive(0), come_back, lambda: survive(2)]) == [1, 1, 1]
        for error in errors:
            assert error.ranks == (1,)
            assert re.search(r"rank 1 \(.*pid \d+\) was not heard of for", str(error))
        ranks.each(lambda rank, pool: step(pool, 2, rank=rank, world_size=3))
        check(ranks, 3)


@pytest.mark.parametrize("decided", [False, True])
def test_a_leader_that_dies_at_its_commit(here: GrpcPoolHere, decided: bool) -> None:
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        coordinator = ranks.pools[0].table("facts").link.session.coordinator
        commit_own, cut = coordinator.commit_own, threading.Event()

        async def commit_and_die(*args: Any, **how: Any) -> Any:
            if decided:
                await commit_own(*args, **how)
            cut.set()
            await asyncio.Event().wait()

        coordinator.commit_own = commit_and_die
        push(ranks.pools[0].table("facts"), 1, rank=0, world_size=2)
        dying = threading.Thread(target=_until_the_end, args=(ranks.pools[0],), daemon=True)
        dying.start()

        def survive() -> int:
            return step(ranks.pools[1], 1, rank=1, world_size=2)

        def come_back() -> int:
            assert cut.wait(30.0)
            ranks.kill(0)
            group = ranks.come_back(0)
            assert group.step == (2 if decided else 1)
            if decided:
                return 1
            return step(ranks.pools[0], 1, rank=0, world_size=2)

        assert together([survive, come_back]) == [1, 1]
        ranks.each(lambda rank, pool: step(pool, 2, rank=rank, world_size=2))
        check(ranks, 3)
