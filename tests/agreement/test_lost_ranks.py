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
from mempool.agreement.groups.home import Groups
from mempool.client import Pool
from mempool.client.training.session import Session
from mempool.errors import MempoolError, RankLost, ShardUnavailable
from tests.agreement.ranks import Ranks, push, together
from tests.unit.client.grpc_pool import GrpcPoolHere

SLOTS, DIM, LEASE_S = 96, 24, 1.0
# On a machine that stands still for most of that lease too: all is sent again, and checked.
pytestmark = pytest.mark.filterwarnings("ignore:.*this process was silent")


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


def cut_off(ranks: Ranks, *, decided: bool) -> threading.Event:
    """The leader's next commit goes no further than this event. decided: Once it is, and nobody else knows."""
    coordinator = ranks.pools[0].table("facts").link.session.coordinator
    commit_own, cut = coordinator.commit_own, threading.Event()

    async def commit_and_die(*args: Any, **how: Any) -> Any:
        if decided:
            await commit_own(*args, **how)
        cut.set()
        await asyncio.Event().wait()

    coordinator.commit_own = commit_and_die
    return cut


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_leader_that_dies_at_its_commit(here: GrpcPoolHere, decided: bool, prepared: bool) -> None:
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        cut = cut_off(ranks, decided=decided)

        def push_share(rank: int) -> Pool:
            table = ranks.pools[rank].table("facts")
            push(table, 1, rank=rank, world_size=2)
            if prepared:  # as for clipping
                table.prepare()
            return ranks.pools[rank]

        dying = threading.Thread(target=lambda: _until_the_end(push_share(0)), daemon=True)
        dying.start()

        def survive() -> int:
            return commit(push_share(1))

        def come_back() -> int:
            assert cut.wait(30.0)
            ranks.kill(0)
            group = ranks.come_back(0)
            assert group.step == (2 if decided else 1)
            if decided:
                return 1
            return step(ranks.pools[0], 1, rank=0, world_size=2)

        assert together([survive, come_back]) == [1, 1]
        assert ranks.pools[1].table("facts").link.session.commits == 2, "what was read before counts no more"
        ranks.each(lambda rank, pool: step(pool, 2, rank=rank, world_size=2))
        check(ranks, 3)


def test_a_step_of_which_one_table_answers_late_counts_once(here: GrpcPoolHere) -> None:
    other = mempool.TableConfig(name="other", num_slots=SLOTS, value_dim=DIM)
    with Ranks(here, [config(), other], world_size=2) as ranks:
        optimizers = [mempool.optim.PoolOptimizer(ranks.tables(rank)) for rank in (0, 1)]
        cut = cut_off(ranks, decided=True)
        for rank in (0, 1):
            push(ranks.pools[rank].table("facts"), 0, rank=rank, world_size=2)
            push(ranks.pools[rank].table("other"), 0, rank=rank, world_size=2)

        def lead() -> None:
            with suppress(MempoolError, RuntimeError, asyncio.CancelledError):
                optimizers[0].step()

        def follow() -> None:
            for _ in range(100):
                with suppress(RankLost, ShardUnavailable):
                    optimizers[1].step()
                    break

        group = ranks.pools[1].table("facts").link.session.coordinator.group
        asked, is_decided = [0], group._is_decided  # type: ignore[union-attr]

        async def is_decided_later(session: Session) -> bool:
            asked[0] += 1
            if asked[0] == 2:
                raise ShardUnavailable("its gate starts again")
            return bool(await is_decided(session))

        group._is_decided = is_decided_later  # type: ignore[union-attr]
        threading.Thread(target=lead, daemon=True).start()

        def come_back() -> int:
            assert cut.wait(30.0)
            ranks.kill(0)
            return ranks.come_back(0).step

        assert together([follow, come_back]) == [None, 1]
        assert asked[0] >= 4
        assert ranks.groups[1].step == 1
        assert [table.pending for table in ranks.tables(1)] == [0, 0]


def test_a_rank_without_updates_learns_as_the_others_that_a_dead_leader_has_committed(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=3) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=3))
        cut = cut_off(ranks, decided=True)
        push(ranks.pools[0].table("facts"), 1, rank=0, world_size=3)
        dying = threading.Thread(target=_until_the_end, args=(ranks.pools[0],), daemon=True)
        dying.start()

        def survive(rank: int) -> list[int]:
            if rank == 1:
                push(ranks.pools[1].table("facts"), 1, rank=1, world_size=3)
            counts = [commit(ranks.pools[rank])]
            return [*counts, step(ranks.pools[rank], 2, rank=rank, world_size=3)]

        def come_back() -> list[int]:
            assert cut.wait(30.0)
            ranks.kill(0)
            assert ranks.come_back(0).step == 2
            return [step(ranks.pools[0], 2, rank=0, world_size=3)]

        assert together([lambda: survive(1), lambda: survive(2), come_back]) == [[1, 1], [0, 1], [1]]
        assert ranks.pools[0].table("facts").link.version() == 3


def test_a_rank_that_dies_together_with_the_home_is_missed(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        ranks.kill(1)
        meetings: Any = here._engines[0].meet.__self__  # type: ignore[attr-defined]
        meetings._groups = Groups(lease_s=LEASE_S)
        push(ranks.pools[0].table("facts"), 1, rank=0, world_size=2)
        with pytest.raises(RankLost, match=r"rank 1 has not come in the .* s since shard 0, where ranks meet, began"):
            ranks.pools[0].table("facts").commit()


def test_a_step_that_the_leader_has_given_up_fails_no_backward_pass_of_another_rank(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=2, reduction="sum") as ranks, mempool.local() as alone:
        first, second = (pool.table("facts") for pool in ranks.pools)
        push(first, 0, rank=0, world_size=2)
        first.discard()
        ids, weights = torch.arange(12).view(3, 4), torch.ones(3, 4, requires_grad=True)
        second.gather(ids, weights).sum().backward()
        assert weights.grad is not None
        assert together([first.commit, second.commit]) == [0, 1]
        table = alone.create_table(config())
        table.gather(ids, torch.ones(3, 4)).sum().backward()
        table.commit()
        assert torch.equal(first.rows(range(SLOTS)), table.rows(range(SLOTS)))


def clipped(pool: Pool, number: int, *, rank: int) -> mempool.optim.PoolOptimizer:
    """A step's gradient, and what clips and commits it."""
    optimizer = mempool.optim.PoolOptimizer(pool.table("facts"), max_norm=0.5)
    push(pool.table("facts"), number, rank=rank, world_size=2)
    return optimizer


def test_a_gradient_that_is_clipped_is_prepared_anew_with_a_rank_that_comes_back(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=2) as ranks, mempool.local() as alone:
        lost = threading.Event()

        def survive() -> None:
            optimizer = clipped(ranks.pools[0], 0, rank=0)
            grad = optimizer.param_groups[0]["params"][0].grad  # all are asked for it
            assert grad is not None
            grad.mul_(0.25)  # as a scaler unscales it
            while True:
                try:
                    return optimizer.step()
                except RankLost:
                    lost.set()
                    time.sleep(0.05)

        def come_back() -> None:
            push(ranks.pools[1].table("facts"), 0, rank=1, world_size=2)
            ranks.pools[1].table("facts").prepare()
            ranks.kill(1)
            assert lost.wait(30.0)
            ranks.come_back(1)
            optimizer = clipped(ranks.pools[1], 0, rank=1)
            grad = optimizer.param_groups[0]["params"][0].grad
            assert grad is not None
            grad.mul_(0.25)
            optimizer.step()

        together([survive, come_back])
        table = alone.create_table(config())
        push(table, 0, rank=0, world_size=1)
        optimizer = mempool.optim.PoolOptimizer(table, max_norm=0.5)
        grad = optimizer.param_groups[0]["params"][0].grad
        assert grad is not None
        grad.mul_(0.125)
        optimizer.step()
        rows = table.rows(range(SLOTS))
        assert (ranks.pools[0].table("facts").rows(range(SLOTS)) - rows).norm() <= 1e-5 * rows.norm()


def test_ranks_that_have_nothing_for_several_steps_clip_with_the_others(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=2) as ranks:

        def train(rank: int, pool: Pool) -> None:
            optimizer = mempool.optim.PoolOptimizer(pool.table("facts"), max_norm=0.5)
            for number in range(3):
                if rank == 0:
                    push(pool.table("facts"), number, rank=0, world_size=2)
                optimizer.step()

        ranks.each(train)
        assert ranks.pools[0].table("facts").link.version() == 3


def test_a_table_that_is_dropped_meanwhile_holds_up_no_rank_that_comes_back(here: GrpcPoolHere) -> None:
    other = mempool.TableConfig(name="other", num_slots=SLOTS, value_dim=DIM)
    with Ranks(here, [config(), other], world_size=2) as ranks:
        tables = ranks.tables(1)
        optimizer = mempool.optim.PoolOptimizer(tables)
        for table in tables:
            push(table, 0, rank=1, world_size=2)
        ranks.kill(0)
        with pytest.raises(RankLost):
            optimizer.step()
        with mempool.connect(here.address) as pool:
            pool.drop_table("other")
        assert ranks.come_back(0, timeout_s=10 * LEASE_S).step == 0
        push(ranks.pools[0].table("facts"), 0, rank=0, world_size=2)
        assert ranks.each(lambda _, pool: commit(pool)) == [1, 1]
        check(ranks, 1)


def test_a_group_that_goes_on_with_one_rank_goes_on_from_its_step(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=2, elastic=True) as ranks:
        for number in range(2):
            ranks.each(lambda rank, pool, number=number: step(pool, number, rank=rank, world_size=2))
        ranks.kill(0), ranks.kill(1)
        with mempool.connect(here.address) as pool:
            while True:
                try:
                    group = pool.join(ranks.group, 0, 1, elastic=True)
                    break
                except mempool.errors.AlreadyExists:
                    time.sleep(LEASE_S / 4)
            assert group.step == 2
            push(pool.table("facts"), 2, rank=0, world_size=1, scale=0.5)
            assert commit(pool) == 1
            assert group.step == 3
            alone = trained_alone(3, world_size=2)
            assert (pool.table("facts").rows(range(SLOTS)) - alone).norm() <= 1e-5 * alone.norm()


def test_a_rank_that_takes_an_earlier_norm_for_this_steps_asks_for_it_anew(here: GrpcPoolHere) -> None:
    """It has nothing pending, so that nobody can tell that its model was zeroed between two steps."""
    with Ranks(here, [config()], world_size=2) as ranks:

        def train(rank: int, pool: Pool) -> int:
            table = pool.table("facts")
            layer = mempool.nn.MemoryLayer(8, table=table, heads=1, topk=2, key_dim=4)
            optimizer, told = mempool.optim.PoolOptimizer(layer, max_norm=1e9), 0
            for number in range(2):
                if rank == 0:
                    push(table, number, rank=0, world_size=1)
                while told < 9:
                    try:
                        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e9)
                        if number:
                            optimizer.step()
                        else:
                            layer.zero_grad()
                        break
                    except RankLost:
                        told += 1
            return told

        assert ranks.each(train) == [1, 1]
        assert ranks.pools[0].table("facts").link.version() == 1
