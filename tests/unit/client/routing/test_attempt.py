"""One try on one plan: which shards are asked what. (That answers are right, and what retries heal: test_router.)"""

import pytest
import torch

from mempool.client.routing.attempt import Attempt
from mempool.client.routing.fanout import Fanout, Traffic
from mempool.client.routing.plan import make_plan
from mempool.errors import StalePlacement
from mempool.types import ProductKeySpec, StepId
from mempool.types.bags import Bags
from tests.support.faulty import COLUMNS, GRID, LAYOUTS, ROWS, Fault, FaultyPool, make_schema

STEP = StepId(group="g", rank=0, step=1)
BAGS = Bags(ids=torch.tensor([0, 7, 9]), weights=torch.ones(3), offsets=torch.tensor([0, 1, 3]))  # row pages 0 and 1


def make_attempt(pool: FaultyPool, *, released: tuple[int, ...] = ()) -> Attempt:
    fanout = Fanout(make_plan(pool.view), dial=pool.dial, traffic=Traffic(), acknowledged={})
    return Attempt(fanout, take_released=lambda shard: released if shard == 0 else ())


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
    assert [gather.offsets.tolist() for gather in gathers] == [[0, 1, 2], [0, 0, 1]]
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


def test_the_lowest_owner_is_prepared_first_and_alone_where_it_misses_updates(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    replies = wait(make_attempt(pool).prepare(STEP, sequences=(1,), want_norm=False))
    assert {shard: reply.missing for shard, reply in replies.items()} == {0: (1,)}
    assert names(pool) == [["prepare"], [], []]


def test_owners_of_keys_alone_are_asked_for_no_updates(wait) -> None:  # type: ignore[no-untyped-def]
    schema = make_schema(keys=ProductKeySpec(heads=1, key_dim=4), stride=8)
    pool = FaultyPool(LAYOUTS["one"], schema=schema, key_owners=(1,))

    async def main() -> None:
        attempt = make_attempt(pool)
        _, record = await attempt.gather(BAGS, lookup_id=1, remember=True, reply_dtype="float32")
        await attempt.update(record, torch.ones(2, 12), step_id=STEP, sequence=1, hold=True, want_weight_grad=False)
        assert set(await attempt.prepare(STEP, sequences=(1,), want_norm=False)) == {0, 1}
        replies = await attempt.commit(STEP, lr=0.1, grad_scale=1.0, sequences=(1,), one_phase=False)
        assert all(reply.applied for reply in replies.values())

    wait(main())
    sent = [[request.sequences for request in shard.requests("commit")] for shard in pool.shards]
    assert sent == [[(1,)], [()]]


def test_a_commit_that_all_owners_have_is_what_later_calls_ask_for(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    acknowledged: dict[int, int] = {}

    async def main() -> None:
        fanout = Fanout(make_plan(pool.view), dial=pool.dial, traffic=Traffic(), acknowledged=acknowledged)
        attempt = Attempt(fanout, take_released=lambda _: ())
        _, record = await attempt.gather(BAGS, lookup_id=1, remember=True, reply_dtype="float32")
        await attempt.update(record, torch.ones(2, 12), step_id=STEP, sequence=1, hold=True, want_weight_grad=False)
        await attempt.prepare(STEP, sequences=(1,), want_norm=False)
        await attempt.commit(STEP, lr=0.1, grad_scale=1.0, sequences=(1,), one_phase=False)
        await attempt.discard(STEP)

    wait(main())
    assert acknowledged == {1: 1}
    assert all(shard.requests("discard")[0].envelope.table_version == 1 for shard in pool.shards)


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
