"""Rows and keys over all their owners: read whole, written where they belong, scored and merged."""

import asyncio
from collections.abc import Awaitable

import pytest
import torch

from mempool.client.routing import router as routers
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec
from tests.support.faulty import COLUMNS, LAYOUTS, ROWS, Fault, FaultyPool, make_schema

from .test_router import assert_near, make_router

ROWWISE = OptimizerSpec(algorithm="rowwise_adagrad", lr=0.5)
ROW_STATE = "values.row_sum"
STATE = torch.arange(64)[:, None] * 10.0 + torch.arange(3)  # [N, blocks]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_states_come_back_whole(wait, layout: str) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(LAYOUTS[layout], schema=make_schema(optimizer=ROWWISE))
    ids = torch.tensor([63, 0, 17, 17, 40])

    async def main() -> None:
        router = make_router(pool)
        assert torch.equal(await router.read_rows(1, array="values", ids=ids), pool.values[ids].float())
        await router.write_rows(1, array=ROW_STATE, ids=torch.arange(64), rows=STATE)
        assert torch.equal(await router.read_rows(1, array=ROW_STATE, ids=ids), STATE[ids])
        assert torch.equal(pool.rows(ROW_STATE), STATE)
        none = await router.read_rows(1, array="values", ids=ids[:0])
        assert none.shape == (0, 12)
        with pytest.raises(InvalidRequest, match="moments"):
            await router.read_rows(1, array="moments", ids=ids)

    wait(main())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_written_where_they_belong(wait, layout: str) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(LAYOUTS[layout])
    expected = pool.values.clone()
    ids, rows = torch.tensor([63, 0, 17]), torch.randn(3, 12)
    expected[ids] = rows.double()

    async def main() -> None:
        await make_router(pool).write_rows(1, array="values", ids=ids, rows=rows)

    wait(main())
    assert torch.equal(pool.values, expected)


def test_a_write_keeps_its_number_and_says_which_are_under_way(wait) -> None:  # type: ignore[no-untyped-def]
    pool = FaultyPool(ROWS)
    first, second = pool.shards[:2]

    async def main() -> None:
        router = make_router(pool)

        async def write(slot: int, timeout_s: float | None = None) -> None:
            rows = torch.ones(1, 12)
            await router.write_rows(1, array="values", ids=torch.tensor([slot]), rows=rows, timeout_s=timeout_s)

        first.faults["write_rows"] = [Fault.ERROR_AFTER, Fault.FORGET]
        await write(5)
        second.faults["write_rows"] = [Fault.SILENT] * 1000
        long = asyncio.ensure_future(write(60, timeout_s=20.0))
        while not second.requests("write_rows"):
            await asyncio.sleep(0.01)
        await asyncio.gather(write(5), write(5))
        second.faults["step_count"] = [Fault.FORGET, Fault.ERROR_AFTER]  # as it is read, and as it is set
        assert await router.step_count(1, to=5) == 5
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        await write(5)

    wait(main())
    writes = [request.write_id for request in first.requests("write_rows")]
    assert [(write.number, write.open) for write in writes] == [(1, ()), (1, ()), (3, (2,)), (4, (2, 3)), (7, ())]
    assert {request.write_id.number for request in second.requests("write_rows")} == {2}
    counts = [request.write_id for request in first.requests("step_count") if request.set is not None]
    assert {write.number: write.open for write in counts} == {5: (2,), 6: (2,)}  # each try is a write of its own
    assert len({write.writer for write in writes + counts}) == 1
    assert all(request.write_id is None for request in first.requests("step_count") if request.set is None)


def test_no_more_writes_begin_than_a_message_may_name(wait, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(routers, "MAX_OPEN", 2)
    pool = FaultyPool(ROWS)
    first, second = pool.shards[:2]
    second.faults["write_rows"] = [Fault.SILENT] * 1000

    async def main() -> None:
        router = make_router(pool)

        def write(slot: int) -> Awaitable[None]:
            return router.write_rows(1, array="values", ids=torch.tensor([slot]), rows=torch.ones(1, 12))

        going = [asyncio.ensure_future(write(60)) for _ in range(2)]
        while len({request.write_id.number for request in second.requests("write_rows")}) < 2:
            await asyncio.sleep(0.01)
        waits = asyncio.ensure_future(write(5))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not first.requests("write_rows")
        going[0].cancel()
        await waits
        going[1].cancel()
        await asyncio.gather(*going, return_exceptions=True)

    wait(main())
    assert [request.write_id.open for request in first.requests("write_rows")] == [(2,)]


@pytest.mark.parametrize("layout", ["one", "rows", "columns"])
def test_a_late_copy_of_a_write_undoes_no_newer_one(wait, layout: str) -> None:  # type: ignore[no-untyped-def]
    """A connection breaks, the write is sent again and answered, another one follows, and then the first copy comes."""
    pool, ids = FaultyPool(LAYOUTS[layout]), torch.tensor([5, 60])

    async def main() -> None:
        router = make_router(pool)
        for shard in pool.shards:
            shard.faults["write_rows"] = [Fault.ERROR_AFTER]
        await router.write_rows(1, array="values", ids=ids, rows=torch.zeros(2, 12))
        assert await router.step_count(1, to=10) == 10
        await router.write_rows(1, array="values", ids=ids, rows=torch.ones(2, 12))
        assert await router.step_count(1, to=20) == 20
        for shard in (shard for shard in pool.shards if shard.requests("write_rows")):
            late, again = shard.requests("write_rows")[:2]
            assert (late.write_id, late.rows.sum()) == (again.write_id, 0)
            with pytest.raises(InvalidRequest, match=r"write 1 of writer \d+ is late: its client has said"):
                await shard.write_rows(late)
            late = next(request for request in shard.requests("step_count") if request.set == 10)
            with pytest.raises(InvalidRequest, match=r"write 2 of writer \d+ is late"):
                await shard.step_count(late)
        assert torch.equal(await router.read_rows(1, array="values", ids=ids), torch.ones(2, 12))
        assert await router.step_count(1) == 20

    wait(main())


@pytest.mark.parametrize("layout", ["one", "rows", "grid", "columns"])
def test_flat_keys_are_scored_by_all_merged_and_then_normalised(wait, layout: str) -> None:  # type: ignore[no-untyped-def]
    keys = torch.randint(-2, 3, (64, 5)).float()  # many exact ties
    pool = FaultyPool(LAYOUTS[layout], schema=make_schema(keys=FlatKeySpec(key_dim=5)), keys=keys)
    queries = torch.randint(-2, 3, (6, 1, 5)).float()

    async def main() -> None:
        lookup, seen = await make_router(pool).lookup(1, queries=queries, topk=9)
        scores = queries @ keys.t()
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :9]  # of equal scores the lowest id first
        assert torch.equal(lookup.ids, order)
        assert torch.equal(lookup.scores, scores.gather(-1, order))
        assert torch.equal(lookup.weights, lookup.scores.softmax(-1))
        expected = (pool.values[order] * lookup.weights.double()[..., None]).sum(dim=(1, 2))
        assert_near(lookup.values, expected)
        assert (seen.epoch, seen.oldest_version, seen.newest_version) == (1, 0, 0)

    wait(main())


def test_product_keys_are_scored_head_by_head_where_they_are(wait) -> None:  # type: ignore[no-untyped-def]
    keys = torch.randint(-2, 3, (3, 2, 8, 2)).float()
    schema = make_schema(keys=ProductKeySpec(heads=3, key_dim=4), stride=8)
    pool = FaultyPool(COLUMNS, schema=schema, key_owners=(1, 3, 1), keys=keys)
    queries = torch.randint(-2, 3, (6, 3, 4)).float()

    async def main() -> None:
        router = make_router(pool)
        lookup, _ = await router.lookup(1, queries=queries, topk=5)
        scores = (queries[:, :, None, :2] * keys[:, 0]).sum(-1)[..., :, None]
        scores = (scores + (queries[:, :, None, 2:] * keys[:, 1]).sum(-1)[..., None, :]).flatten(2)
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :5]
        assert torch.equal(lookup.ids, order)
        assert torch.equal(lookup.weights, scores.gather(-1, order).softmax(-1))
        expected = (pool.values[order] * lookup.weights.double()[..., None]).sum(dim=(1, 2))
        assert_near(lookup.values, expected)
        read = await router.read_rows(1, array="keys", ids=torch.tensor([2, 0]))
        assert torch.equal(read, keys[[2, 0]].flatten(1))
        await router.write_rows(1, array="keys", ids=torch.tensor([1]), rows=torch.full((1, 32), 7.0))

    wait(main())
    assert torch.equal(pool.keys[1], torch.full((2, 8, 2), 7.0))
    assert {shard.info.shard for shard in pool.shards if "score" in shard.names()} == {1, 3}


def test_state_per_block_is_told_from_values_where_the_lowest_shard_owns_a_narrow_block_alone(  # type: ignore[no-untyped-def]
    wait,
) -> None:
    pool = FaultyPool(
        [[1, 1, 0]] * 8, schema=make_schema(value_dim=9, optimizer=ROWWISE)
    )  # blocks of 4, 4 and 1 columns
    ids = torch.tensor([63, 0, 17])

    async def main() -> None:
        router = make_router(pool)
        await router.write_rows(1, array=ROW_STATE, ids=torch.arange(64), rows=STATE)
        assert torch.equal(await router.read_rows(1, array=ROW_STATE, ids=ids), STATE[ids])
        assert torch.equal(await router.read_rows(1, array="values", ids=ids), pool.values[ids].float())

    wait(main())
