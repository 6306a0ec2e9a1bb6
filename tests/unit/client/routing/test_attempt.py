"""One try on one plan: which shards are asked what. (That answers are right, and what retries heal: test_router.)"""

import pytest
import torch

from mempool.client.routing.attempt import Attempt
from mempool.client.routing.fanout import Fanout, Traffic, Versions
from mempool.client.routing.plan import make_plan
from mempool.client.routing.router import Router
from mempool.client.training.session import Session
from mempool.errors import StalePlacement
from mempool.types import StepId
from mempool.types.bags import Bags
from tests.support.faulty import COLUMNS, GRID, LAYOUTS, ROWS, Fault, FaultyPool

STEP = StepId(group="g", rank=0, step=1)
BAGS = Bags(ids=torch.tensor([0, 7, 9]), weights=torch.ones(3), offsets=torch.tensor([0, 1, 3]))  # row pages 0 and 1


def make_attempt(pool: FaultyPool, *, released: tuple[int, ...] = ()) -> Attempt:
    fanout = Fanout(make_plan(pool.view), dial=pool.dial, traffic=Traffic(), versions=Versions())
    return Attempt(fanout, take_released=lambda shard: released if shard == 0 else ())


async def committed(pool: FaultyPool) -> int:
    """Somebody else commits a step everywhere; answers the version it makes."""
    router = Router(pool, dial=pool.dial, pool="run-7")
    session = Session(router, table_id=1, group="another")
    _, record = await session.gather(BAGS, remember=False)
    await session.update(record, torch.ones(2, 12), hold=True, want_weight_grad=False)
    await session.commit(lr=0.1)
    await session.coordinator.close(timeout_s=10.0)
    return 1


def names(pool: FaultyPool) -> list[list[str]]:
    return [shard.names() for shard in pool.shards]


def test_a_stale_plan_is_not_healed_here(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    attempt = make_attempt(pool)
    pool.move(GRID.clip(max=2))
    with pytest.raises(StalePlacement):
        wait(attempt.gather(BAGS, lookup_id=1, remember=False, reply_dtype="float32"))


def test_rows_ask_those_who_have_them_and_tell_all(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(ROWS)  # row pages 0, 1, 2 on shards 0, 1, 2

    async def main() -> None:
        attempt = make_attempt(pool, released=(5, 6))
        _, record = await attempt.gather(BAGS, lookup_id=1, remember=True, reply_dtype="float32")
        assert record.remembered_by == {(0, 1), (1, 1)}
        await attempt.update(record, torch.ones(2, 12), step_id=STEP, sequence=1, hold=True, want_weight_grad=False)

    wait(main())
    assert names(pool) == [["gather", "update"], ["gather", "update"], ["update"]]
    gathers = [pool.shards[shard].requests("gather")[0] for shard in (0, 1)]
    assert [gather.ids.tolist() for gather in gathers] == [[0, 7], [9]]
    assert [gather.offsets.tolist() for gather in gathers] == [[0, 1, 2], [0, 1]]  # of the bags there
    assert [gather.release for gather in gathers] == [(5, 6), ()]
    assert [shard.held for shard in pool.shards] == [1, 1, 1]


def test_columns_get_their_columns_of_the_gradient(wait) -> None:  # type: ignore[no-untyped-def]
    pool, grads = FaultyPool(COLUMNS), torch.arange(24.0).reshape(2, 12)

    async def main() -> None:
        attempt = make_attempt(pool)
        _, record = await attempt.gather(BAGS, lookup_id=1, remember=False, reply_dtype="float32")
        await attempt.update(record, grads, step_id=STEP, sequence=1, hold=True, want_weight_grad=False, only=[0, 2])

    wait(main())
    assert names(pool) == [["gather", "update"], ["gather"], ["gather", "update"]]
    for shard, columns in ((0, slice(0, 4)), (2, slice(8, 12))):
        (update,) = pool.shards[shard].requests("update")
        assert torch.equal(update.grads, grads[:, columns])
        assert torch.equal(update.ids, BAGS.ids)  # not remembered there, so it is sent along


def test_the_newest_version_that_was_seen_is_what_later_calls_ask_for(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    versions = Versions()

    async def main() -> None:
        fanout = Fanout(make_plan(pool.view), dial=pool.dial, traffic=Traffic(), versions=versions)
        attempt = Attempt(fanout, take_released=lambda _: ())
        await attempt.gather(BAGS, lookup_id=1, remember=False, reply_dtype="float32")
        assert not versions.get(1)
        step = await committed(pool)
        await attempt.gather(BAGS, lookup_id=2, remember=False, reply_dtype="float32")
        assert versions.get(1) == step
        await attempt.read_rows("values", BAGS.ids)

    wait(main())
    assert all(shard.requests("read_rows")[0].envelope.table_version == 1 for shard in pool.shards)


def test_a_context_that_is_gone_is_sent_within_the_try(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(LAYOUTS["one"])

    async def main() -> None:
        attempt = make_attempt(pool)
        _, record = await attempt.gather(BAGS, lookup_id=1, remember=True, reply_dtype="float32")
        pool.shards[0].faults["update"] = [Fault.FORGET]
        found = await attempt.update(
            record, torch.ones(2, 12), step_id=STEP, sequence=1, hold=True, want_weight_grad=True
        )
        assert found is not None
        torch.testing.assert_close(found.double(), pool.values[BAGS.ids].sum(1), rtol=1e-5, atol=1e-5)

    wait(main())
    assert [request.ids is not None for request in pool.shards[0].requests("update")] == [False, True]
