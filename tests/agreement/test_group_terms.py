"""What ranks must agree on, what they are told where they do not, and groups whose ranks do not wait for each other."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mempool
from mempool.agreement.groups.home import Groups
from mempool.client import Pool
from mempool.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, StepConflict
from tests.agreement.ranks import Ranks, push, together
from tests.unit.client.grpc_pool import GrpcPoolHere

LEASE_S = 1.5
# On a machine that stands still for most of that lease too: all is sent again, and checked.
pytestmark = pytest.mark.filterwarnings("ignore:.*this process was silent")


@pytest.fixture(scope="module")
def here() -> Iterator[GrpcPoolHere]:
    pool = GrpcPoolHere(shards=2, lease_s=LEASE_S)
    yield pool
    pool.close()


def config(name: str) -> mempool.TableConfig:
    return mempool.TableConfig(name=name, num_slots=96, value_dim=24, seed=5, optimizer=mempool.optim.SGD(lr=0.2))


def test_ranks_that_commit_with_different_numbers_are_told_both(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("lr"), config("other")], world_size=2, group="lr") as ranks:

        def differ(rank: int, pool: Pool) -> str:
            push(pool.table("lr"), 0, rank=rank, world_size=2)
            with pytest.raises(InvalidRequest) as caught:
                pool.table("lr").commit(lr=0.5 - rank / 4)
            return str(caught.value)

        for message in ranks.each(differ):
            assert "rank 0" in message
            assert "table 'lr' with lr = 0.5" in message
            assert "with lr = 0.25" in message

        def other_table(rank: int, pool: Pool) -> str:
            with pytest.raises(InvalidRequest) as caught:
                pool.table("lr" if rank else "other").commit()
            return str(caught.value)

        for message in ranks.each(other_table):
            assert "commits table 'other'" in message
            assert "commits table 'lr'" in message

        def phase(rank: int, pool: Pool) -> str:
            with pytest.raises(InvalidRequest) as caught:
                pool.table("lr").prepare() if rank else pool.table("lr").commit()
            return str(caught.value)

        for message in ranks.each(phase):
            assert "asks for the norm of its gradient" in message
        assert ranks.pools[0].table("lr").link.version() == 0
        assert ranks.each(lambda _, pool: pool.table("lr").commit()) == [1, 1]


def test_what_is_sent_is_sent_again_where_pages_have_moved(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("moved")], world_size=3, group="moved") as ranks:
        before = ranks.pools[0].table("moved").rows(range(96))
        ranks.each(lambda rank, pool: push(pool.table("moved"), 0, rank=rank, world_size=3))
        ranks.pools[0].rescale(3)
        assert ranks.each(lambda _, pool: pool.table("moved").commit()) == [1, 1, 1]
        assert [pool.table("moved").pending for pool in ranks.pools] == [0, 0, 0]
        with mempool.local() as alone:
            table = alone.create_table(config("moved"))
            push(table, 0, rank=0, world_size=1)
            table.commit(grad_scale=1 / 3)
            rows = table.rows(range(96))
        moved = ranks.pools[1].table("moved").rows(range(96))
        assert not torch.equal(before, moved)
        assert (moved - rows).norm() <= 1e-6 * rows.norm()


def test_discarding_is_each_ranks_own(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("own")], world_size=2, group="own", reduction="sum") as ranks:

        def train(rank: int, pool: Pool) -> list[int]:
            table = pool.table("own")
            push(table, 0, rank=rank, world_size=2)
            if rank == 1:
                table.discard()
                push(table, 1, rank=1, world_size=2)
            counts = [table.commit()]
            push(table, 2, rank=rank, world_size=2)
            table.prepare()
            table.discard()
            push(table, 3, rank=rank, world_size=2)
            return [*counts, table.commit()]

        assert ranks.each(train) == [[1, 1], [1, 1]]
        with mempool.local() as alone:
            table = alone.create_table(config("own"))
            for step, rank in ((0, 0), (1, 1)):
                push(table, step, rank=rank, world_size=2)
            table.commit()
            push(table, 3, rank=0, world_size=1)
            table.commit()
            rows = table.rows(range(96))
        assert (ranks.pools[0].table("own").rows(range(96)) - rows).norm() <= 1e-6 * rows.norm()


def test_a_home_that_forgets_is_told_again(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("home")], world_size=2, group="home") as ranks:
        meetings: Any = here._engines[0].meet.__self__  # type: ignore[attr-defined]

        def train(rank: int, pool: Pool) -> None:
            for step in range(12):
                push(pool.table("home"), step, rank=rank, world_size=2)
                if rank == step % 2:
                    meetings._groups = Groups(lease_s=LEASE_S)
                assert pool.table("home").commit() == 1

        ranks.each(train)
        assert ranks.pools[0].table("home").link.version() == 12


def test_who_does_not_come_is_named(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("late")], world_size=2, group="late", timeout_s=0.5) as ranks:
        ranks.each(lambda _, pool: pool.table("late").commit())
        with pytest.raises(DeadlineExceeded, match=r"rank 1 is at step 2 .*rank 0 \(.*pid \d+\) is at step 2"):
            ranks.pools[1].table("late").commit()
        assert ranks.each(lambda _, pool: pool.table("late").commit()) == [0, 0]


def test_two_jobs_of_one_name_are_told_of_each_other(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("two")], world_size=2, group="two"), mempool.connect(here.address) as other:
        with pytest.raises(AlreadyExists, match=r"rank 1 of group 'two' is .*pid \d+, which lives: .*pid \d+ cannot"):
            other.join("two", 1, 2)
        with pytest.raises(InvalidRequest, match=r"rank 1 .* with 3 ranks.*, and rank [01] .* is in it with 2 ranks"):
            other.join("two", 1, 3)
        with pytest.raises(InvalidRequest, match=r"with 2 ranks, consistency='async', and rank"):
            other.join("two", 1, 2, consistency="async")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"group": ""}, "group = ''"),
        ({"group": "x" * 300}, "1 to 256 bytes"),
        ({"rank": 2}, "rank = 2: must be 0 to 1"),
        ({"rank": True}, "rank = True"),
        ({"world_size": 0}, "world_size = 0"),
        ({"consistency": "eventual"}, "consistency = 'eventual'"),
        ({"reduction": "max"}, "reduction = 'max'"),
        ({"staleness": 2}, "goes with consistency='bounded'"),
        ({"staleness": -1}, "staleness = -1"),
        ({"step": -1}, "step = -1"),
        ({"timeout_s": 0}, "timeout_s = 0"),
    ],
)
def test_what_makes_no_sense_is_refused(here: GrpcPoolHere, given: dict[str, Any], why: str) -> None:
    with mempool.connect(here.address) as pool, pytest.raises(InvalidRequest, match=why):
        pool.join(**{"group": "bad", "rank": 0, "world_size": 2, **given})


def test_joining_comes_before_training_and_once(here: GrpcPoolHere) -> None:
    with mempool.connect(here.address) as pool:
        table = pool.create_table(config("once"))
        push(table, 0, rank=0, world_size=1)
        with pytest.raises(InvalidRequest, match="'once' has 1 updates pending"):
            pool.join("once", 0, 2)
        table.commit()
        pool.join("once", 0, 2)
        with pytest.raises(InvalidRequest, match="has joined a group already"):
            pool.join("another", 0, 2)
    with mempool.local() as pool, pytest.raises(InvalidRequest, match="no other rank reaches it"):
        pool.join("here", 0, 2)


def test_a_model_of_another_step_is_told_so(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("step")], world_size=2, group="step") as ranks:
        ranks.each(lambda _, pool: pool.table("step").commit())
        ranks.kill(1)
        with pytest.warns(UserWarning, match="model is at step 7, and the group is at step 1"):
            assert ranks.come_back(1, step=7).step == 1


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_bounded_rank_runs_no_further_ahead(here: GrpcPoolHere, staleness: int) -> None:
    name = f"bounded-{staleness}"
    how: dict[str, Any] = {"consistency": "bounded", "staleness": staleness}
    with Ranks(here, [config(name)], world_size=2, group=name, **how) as ranks:
        done, ahead, lock = [0, 0], [0], threading.Lock()

        def train(rank: int, pool: Pool) -> None:
            for step in range(8):
                push(pool.table(name), step, rank=rank, world_size=2)
                while rank and done[0] < min(8, step + staleness):
                    time.sleep(0.001)  # rank 0 goes as far as it may
                assert pool.table(name).commit() == 1
                with lock:
                    done[rank] += 1
                    ahead.append(done[0] - done[1])

        ranks.each(train)
        assert ranks.pools[0].table(name).link.version() == 16
        assert staleness <= max(ahead) <= staleness + 1  # rank 1 may be at its commit


def test_async_ranks_commit_as_they_come_and_see_how_stale_they_are(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("async")], world_size=2, group="async", consistency="async") as ranks:
        first, second = (pool.table("async") for pool in ranks.pools)
        push(first, 0, rank=0, world_size=2)
        for step in range(3):
            push(second, step, rank=1, world_size=2)
            assert second.commit() == 1
        assert first.staleness == 0
        assert first.commit() == 1
        assert first.staleness == 4
        assert second.staleness == 1
        push(first, 1, rank=0, world_size=2)
        assert first.staleness == 0
        ranks.kill(1)
        ranks.come_back(1, consistency="async")
        back = ranks.pools[1].table("async")
        push(back, 5, rank=1, world_size=2)
        assert together([first.commit, back.commit]) == [1, 1]
        assert first.link.version() == 6


def _weighted(table: mempool.Table) -> torch.Tensor:
    """A loss whose backward pass waits for the shards, as it wants gradients of weights."""
    return table.gather(torch.arange(12).view(3, 4), torch.ones(3, 4, requires_grad=True)).sum()


def test_a_rank_goes_past_what_another_has_dropped_in_few_calls(here: GrpcPoolHere) -> None:
    with Ranks(here, [config("dropped")], world_size=2, group="dropped") as ranks:
        first, second = (pool.table("dropped") for pool in ranks.pools)
        for step in range(40):
            push(first, step, rank=0, world_size=2)
            first.discard()
        group = second.link.session.coordinator.group
        assert group is not None
        asked, refresh = [0], group.refresh

        async def counted() -> None:
            asked[0] += 1
            await refresh()

        group.refresh = counted  # type: ignore[method-assign]
        _weighted(second).backward()
        assert 1 <= asked[0] <= 7
        assert together([first.commit, second.commit]) == [0, 1]
        assert first.link.version() == 1


def test_a_rank_of_a_generation_that_is_over_is_told_so(here: GrpcPoolHere) -> None:
    """Its home's clock was set back, say: it knows of no newer one."""
    with mempool.connect(here.address, timeout_s=1.0) as pool:
        table = pool.create_table(config("over"))
        pool.join("over", 0, 1, elastic=True)
        push(table, 0, rank=0, world_size=1)
        table.commit()
        session = table.link.session
        session.rejoin(group="over", rank=0, generation=session.book.generation - 1)
        with pytest.raises(StepConflict, match="this trainer was replaced by one that came later"):
            _weighted(table).backward()
