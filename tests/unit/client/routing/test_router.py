"""Routing, following placement and retrying, against shards in memory that fail on demand."""

import asyncio

import pytest
import torch
from torch import Tensor

from mempool.client.routing.attempt import Attempt, LookupRecord
from mempool.client.routing.retry import Backoff
from mempool.client.routing.router import Router
from mempool.errors import (
    DataLoss,
    DeadlineExceeded,
    MempoolError,
    NotFound,
    PoolUnreachable,
    ShardUnavailable,
)
from mempool.types import GatherRequest, StepId, UpdateRequest
from mempool.types.bags import Bags
from tests.support.faulty import COLUMNS, GRID, HEALING, LAYOUTS, ROWS, Fault, FaultyPool

STEP = StepId(group="g", rank=0, step=1)


def make_router(pool: FaultyPool, **options: object) -> Router:
    options = {"pool": "run-7", "timeout_s": 20.0, "backoff": Backoff(first_s=0.001, longest_s=0.002), **options}
    return Router(pool, dial=pool.dial, **options)  # type: ignore[arg-type]


async def push(router: Router, record: LookupRecord, grads: Tensor) -> Tensor | None:
    """The first update of the first step."""
    return await router.call(
        record.table_id,
        lambda attempt: attempt.update(record, grads, step_id=STEP, sequence=1, hold=True, want_weight_grad=True),
    )


def make_bags(*, seed: int = 0, num_slots: int = 64, weights: bool = True) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    return Bags(
        ids=torch.randint(0, num_slots, (10,), generator=generator),
        weights=torch.randn(10, generator=generator) if weights else None,
        offsets=torch.tensor([0, 3, 3, 7, 10]),
    )


def pooled(values: Tensor, bags: Bags) -> Tensor:
    weights = torch.ones(bags.num_pairs) if bags.weights is None else bags.weights
    rows = values[bags.ids] * weights.double()[:, None]
    out = torch.zeros(bags.num_bags, values.shape[1], dtype=torch.float64)
    return out.index_add_(0, torch.repeat_interleave(bags.offsets.diff()), rows)


def assert_near(found: Tensor, expected: Tensor, *, within: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= within * expected.double().norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", [True, False])
def test_gather_is_the_weighted_sum(wait, layout: str, weights: bool) -> None:  # type: ignore[no-untyped-def]
    pool, bags = FaultyPool(LAYOUTS[layout]), make_bags(weights=weights)

    async def main() -> None:
        router = make_router(pool)
        await router.open("facts")
        values, record = await router.gather(1, bags=bags)
        assert values.dtype == torch.float32
        assert_near(values, pooled(pool.values, bags))
        assert record.remembered_by == frozenset()
        assert record.seen.epoch == 1

    wait(main())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_gives_the_weights_gradient(wait, layout: str) -> None:  # type: ignore[no-untyped-def]
    pool, bags = FaultyPool(LAYOUTS[layout]), make_bags()
    grads = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))

    async def main() -> None:
        router = make_router(pool)
        _, record = await router.gather(1, bags=bags, remember=True)
        found = await push(router, record, grads)
        bag = torch.repeat_interleave(bags.offsets.diff())
        assert found is not None
        assert_near(found, (pool.values[bags.ids] * grads.double()[bag]).sum(1))
        for shard in pool.shards:
            (request,) = shard.requests("update")
            assert isinstance(request, UpdateRequest)
            assert request.ids is None  # remembered there

    wait(main())


def test_shard_without_pairs_of_its_row_pages_is_not_asked_but_told(wait) -> None:  # type: ignore[no-untyped-def]
    """Nothing to gather there; but the step's sequence must be held there too."""
    pool = FaultyPool(ROWS)
    bags = Bags(ids=torch.tensor([0, 7]), weights=None, offsets=torch.tensor([0, 2]))  # row page 0: shard 0

    async def main() -> None:
        router = make_router(pool)
        values, record = await router.gather(1, bags=bags, remember=True)
        assert_near(values, pooled(pool.values, bags))
        await push(router, record, torch.ones(1, 12))

    wait(main())
    assert pool.shards[0].names() == ["gather", "update"]
    assert pool.shards[1].names() == ["update"]
    (request,) = pool.shards[1].requests("update")
    assert isinstance(request, UpdateRequest)
    assert request.grads.shape == (0, 12)
    assert pool.shards[1].held == 1


@pytest.mark.parametrize("layout", ["one", "columns", "grid"])
def test_reply_dtype_is_never_that_of_partial_sums(wait, layout: str) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(LAYOUTS[layout])

    async def main() -> Tensor:
        values, _ = await make_router(pool).gather(1, bags=make_bags(), reply_dtype="bfloat16")
        return values

    values = wait(main())
    assert values.dtype == torch.float32
    asked = {request.reply_dtype for shard in pool.shards for request in shard.requests("gather")}
    assert asked == ({"float32"} if layout == "grid" else {"bfloat16"})
    assert_near(values, pooled(pool.values, make_bags()), within=1e-6 if layout == "grid" else 5e-3)


@pytest.mark.parametrize("fault", HEALING)
@pytest.mark.parametrize("layout", ["one", "grid"])
def test_calls_heal(wait, fault: Fault, layout: str) -> None:  # type: ignore[no-untyped-def]
    pool, bags = FaultyPool(LAYOUTS[layout]), make_bags()
    grads = torch.randn(4, 12)

    async def main() -> None:
        router = make_router(pool)
        for name in ("gather", "update", "read_rows", "write_rows"):
            pool.shards[0].faults[name] = [fault, fault]
        values, record = await router.gather(1, bags=bags, remember=True)
        assert_near(values, pooled(pool.values, bags))
        found = await push(router, record, grads)
        assert found is not None
        bag = torch.repeat_interleave(bags.offsets.diff())
        assert_near(found, (pool.values[bags.ids] * grads.double()[bag]).sum(1))
        ids = torch.tensor([5, 60, 5])
        assert torch.equal(await router.read_rows(1, array="values", ids=ids), pool.values[ids].float())
        await router.write_rows(1, array="values", ids=ids[:2], rows=torch.ones(2, 12))
        assert torch.equal(pool.values[ids[:2]], torch.ones(2, 12, dtype=torch.float64))

    wait(main())
    for shard in pool.shards:
        assert shard.held <= 1  # repeats are held once


def test_forgotten_context_is_sent_again_to_that_shard_alone(wait) -> None:  # type: ignore[no-untyped-def]
    pool, bags = FaultyPool(COLUMNS), make_bags()

    async def main() -> None:
        router = make_router(pool)
        _, record = await router.gather(1, bags=bags, remember=True)
        pool.shards[1].forget()
        await push(router, record, torch.ones(4, 12))

    wait(main())
    sent = [[request.ids is not None for request in shard.requests("update")] for shard in pool.shards]
    assert sent == [[False], [False, True], [False]]


def test_not_remembered_means_sent_along_at_once(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool)
        _, record = await router.gather(1, bags=make_bags(), remember=False)
        await push(router, record, torch.ones(4, 12))

    wait(main())
    assert all(request.ids is not None for shard in pool.shards for request in shard.requests("update"))
    assert all(len(shard.requests("update")) == 1 for shard in pool.shards)


@pytest.mark.parametrize("after", LAYOUTS)
def test_moved_pages_are_followed_between_lookup_and_update(wait, after: str) -> None:  # type: ignore[no-untyped-def]
    pool, bags = FaultyPool(COLUMNS, num_shards=4), make_bags()
    grads = torch.randn(4, 12)

    async def main() -> None:
        router = make_router(pool)
        _, record = await router.gather(1, bags=bags, remember=True)
        pool.move(LAYOUTS[after])
        found = await push(router, record, grads)
        assert found is not None
        bag = torch.repeat_interleave(bags.offsets.diff())
        assert_near(found, (pool.values[bags.ids] * grads.double()[bag]).sum(1))
        values, record = await router.gather(1, bags=bags)
        assert_near(values, pooled(pool.values, bags))
        assert record.seen.epoch == 2

    wait(main())


def test_view_is_asked_for_once_by_all_who_need_it(wait) -> None:  # type: ignore[no-untyped-def]
    pool, bags = FaultyPool(COLUMNS), make_bags()

    async def main() -> None:
        router = make_router(pool)
        await router.open("facts")
        pool.asked = 0
        pool.move(GRID.clip(max=2))
        answers = await asyncio.gather(*(router.gather(1, bags=bags) for _ in range(20)))
        for values, _ in answers:
            assert_near(values, pooled(pool.values, bags))

    wait(main())
    assert pool.asked == 1


def test_controller_may_be_away(wait) -> None:  # type: ignore[no-untyped-def]
    pool, bags = FaultyPool(COLUMNS), make_bags()

    async def main() -> None:
        router = make_router(pool)
        await router.open("facts")
        pool.away = True
        pool.shards[0].faults["gather"] = [Fault.ERROR_BEFORE, Fault.ERROR_BEFORE]
        values, _ = await router.gather(1, bags=bags)
        assert_near(values, pooled(pool.values, bags))
        with pytest.raises(
            PoolUnreachable, match=r"pool 'run-7' did not answer within .* last: the controller is away"
        ):
            await router.open("other", timeout_s=0.05)

    wait(main())


@pytest.mark.parametrize("fault", [Fault.ERROR_BEFORE, Fault.SILENT])
def test_shard_that_stays_away_is_named(wait, fault: Fault) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    pool.shards[2].faults["gather"] = [fault] * 1000

    async def main() -> None:
        with pytest.raises(ShardUnavailable) as raised:
            await make_router(pool, timeout_s=0.2).gather(1, bags=make_bags())
        error = raised.value
        assert (error.shard, error.address) == (2, "host-2:1")
        assert "shard 2 of pool 'run-7' did not answer within 0." in str(error)
        assert "mempool status" in str(error)
        assert ("the connection was refused" if fault is Fault.ERROR_BEFORE else "no answer from host-2:1") in str(
            error
        )

    wait(main())


def test_an_error_of_looking_where_a_silent_shard_lives_now_is_raised(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def broken(_: str) -> None:
        raise RuntimeError("no view can be read")

    async def main() -> None:
        router = make_router(pool, patience_s=0.05, timeout_s=20.0)
        await router.open("facts")
        pool.table = broken  # type: ignore[assignment, method-assign]
        pool.shards[1].gather = lambda _: asyncio.Event().wait()  # type: ignore[assignment, method-assign]
        with pytest.raises(RuntimeError, match="no view can be read"):
            await router.gather(1, bags=make_bags())

    wait(main())


def test_silent_shard_that_lives_again_elsewhere_is_found_in_time(wait) -> None:  # type: ignore[no-untyped-def]
    pool, bags = FaultyPool(COLUMNS), make_bags()
    pool.shards[1].faults["gather"] = [Fault.SILENT]

    async def main() -> None:
        router = make_router(pool, patience_s=0.01)
        task = asyncio.create_task(router.gather(1, bags=bags))
        await asyncio.sleep(0.05)
        assert not task.done()
        pool.shards[1].restart()
        values, _ = await task
        assert_near(values, pooled(pool.values, bags))

    wait(main())
    assert [len(shard.requests("gather")) for shard in pool.shards] == [2, 2, 2]


def test_plan_that_stays_old_is_no_endless_loop(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    pool.shards[0].faults["gather"] = [Fault.STALE] * 1000

    async def main() -> None:
        with pytest.raises(DeadlineExceeded, match="could not be reached under one placement") as raised:
            await make_router(pool, timeout_s=0.1).gather(1, bags=make_bags())
        assert raised.value.shard == 0

    wait(main())


def test_lost_pages_pass_at_once_even_beside_a_shard_that_is_away(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    pool.shards[0].faults["gather"] = [Fault.ERROR_BEFORE]
    pool.shards[1].faults["gather"] = [Fault.DATA_LOSS] * 5

    async def main() -> None:
        with pytest.raises(DataLoss, match="restore checkpoint 7") as raised:
            await make_router(pool).gather(1, bags=make_bags())
        assert raised.value.shard == 1

    wait(main())
    assert len(pool.shards[1].calls) <= 2


def test_dropped_table_is_not_found(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool)
        await router.open("facts")
        pool.drop()
        for _ in range(2):
            with pytest.raises(NotFound, match="table 'facts' of pool 'run-7' was dropped"):
                await router.gather(1, bags=make_bags())
        with pytest.raises(NotFound, match="has no table with id 9"):
            await router.gather(9, bags=make_bags())

    wait(main())


def test_table_made_again_is_another_table(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool)
        await router.open("facts")
        pool.drop_and_remake()
        with pytest.raises(NotFound, match=r"dropped and made again \(id 1, now 2\).*pool.table\('facts'\)"):
            await router.gather(1, bags=make_bags())
        assert (await router.open("facts")).schema.table_id == 2
        values, _ = await router.gather(2, bags=make_bags())
        assert_near(values, pooled(pool.values, make_bags()))

    wait(main())


def test_table_is_found_by_its_id_alone(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool)
        values, _ = await router.gather(1, bags=make_bags())
        assert_near(values, pooled(pool.values, make_bags()))
        with pytest.raises(NotFound, match="no table with id 7"):
            await router.gather(7, bags=make_bags())

    wait(main())


def test_views_heard_elsewhere_are_followed(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool)
        await router.open("facts")
        pool.move(GRID.clip(max=2))
        assert router.adopt(pool.view).placement.epoch == 2
        pool.asked = 0
        await router.gather(1, bags=make_bags())
        assert pool.asked == 0

    wait(main())


def test_released_lookups_are_told_to_the_shards_that_remember_them_once(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool)
        _, record = await router.gather(1, bags=make_bags(), remember=True)
        assert all(shard.context_bytes > 0 for shard in pool.shards)
        router.release(record)()
        await router.gather(1, bags=make_bags())
        await router.gather(1, bags=make_bags())
        assert [shard.context_bytes for shard in pool.shards] == [0, 0, 0]

    wait(main())
    for shard in pool.shards:
        released = [request.release for request in shard.requests("gather") if isinstance(request, GatherRequest)]
        assert [len(ids) for ids in released] == [0, 1, 0]
        assert released[1] == (shard.requests("gather")[0].lookup_id,)


def test_nothing_is_kept_for_shards_that_have_left_the_table(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool)
        for layout in (COLUMNS, LAYOUTS["one"], COLUMNS, LAYOUTS["one"]):
            pool.move(layout)
            router.adopt(pool.view)
            for _ in range(3):
                _, record = await router.gather(1, bags=make_bags(), remember=True)
                router.release(record)()
        await router.gather(1, bags=make_bags())
        assert {shard for _, shard in router.remembered.waiting()} == {0}

    wait(main())


def test_lookup_ids_of_two_clients_do_not_meet(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        for router in (make_router(pool), make_router(pool)):
            for _ in range(3):
                await router.gather(1, bags=make_bags(), remember=True)

    wait(main())
    lookup_ids = {request.lookup_id for request in pool.shards[0].requests("gather")}
    assert len(lookup_ids) == 6
    assert all(0 <= lookup_id < 2**63 for lookup_id in lookup_ids)


def test_work_under_a_plan_is_cancelled_with_the_caller(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    pool.shards[1].faults["gather"] = [Fault.SILENT]

    async def main() -> None:
        task = asyncio.create_task(make_router(pool).gather(1, bags=make_bags()))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    wait(main())


def test_own_calls_have_the_same_plan_and_retries(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    plans = []

    async def once(attempt: Attempt) -> int:
        plans.append(attempt.plan)
        if len(plans) < 3:
            raise ShardUnavailable("not yet")
        return attempt.plan.epoch

    async def main() -> None:
        assert await make_router(pool).call(1, once) == 1

    wait(main())
    assert plans[0] is plans[1] is plans[2]  # nothing new was heard, so nothing is planned anew


def test_bugs_are_not_retried(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(COLUMNS)
    tries = 0

    async def once(_: Attempt) -> None:
        nonlocal tries
        tries += 1
        raise MempoolError("a bug")

    async def main() -> None:
        with pytest.raises(MempoolError, match="a bug"):
            await make_router(pool).call(1, once)

    wait(main())
    assert tries == 1
