"""Rows and keys over all their owners: read whole, written where they belong, scored and merged."""

import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec
from tests.support.faulty import COLUMNS, LAYOUTS, FaultyPool, make_schema

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
