"""Which table of a name is meant, where whoever answers for the controller has not heard of all of them."""

from dataclasses import replace
from unittest.mock import AsyncMock

import pytest

from mempool.errors import NotFound
from tests.support.faulty import COLUMNS, Fault, FaultyPool

from .test_router import assert_near, make_bags, make_router, pooled


def test_an_earlier_table_of_that_name_is_no_news(wait) -> None:  # type: ignore[no-untyped-def]
    """A shard that has not heard that it was dropped, and not yet of the one after it, answers for the controller."""
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool, patience_s=0.05)
        pool.drop_and_remake()
        view = await router.open("facts")
        earlier = replace(view, schema=replace(view.schema, table_id=1))
        pool.table = AsyncMock(return_value=earlier)  # type: ignore[method-assign]
        pool.shards[1].faults["gather"] = [Fault.ERROR_BEFORE]
        values, _ = await router.gather(2, bags=make_bags())
        assert_near(values, pooled(pool.values, make_bags()))
        assert pool.table.called

    wait(main())


def test_a_list_without_a_table_is_not_believed_where_its_name_is_known(wait) -> None:  # type: ignore[no-untyped-def]
    """Simulation, seed 4320: it is of a shard that has not heard of it yet."""
    pool = FaultyPool(COLUMNS)

    async def main() -> None:
        router = make_router(pool)
        pool.drop_and_remake()
        view = await router.open("facts")
        router.forget(2)
        earlier = replace(view, schema=replace(view.schema, table_id=1))
        pool.tables = AsyncMock(return_value=())  # type: ignore[method-assign]
        pool.table = AsyncMock(side_effect=[earlier, view])  # type: ignore[method-assign]
        values, _ = await router.gather(2, bags=make_bags())
        assert_near(values, pooled(pool.values, make_bags()))
        router.forget(1)
        pool.table = AsyncMock(return_value=view)  # type: ignore[method-assign]
        with pytest.raises(NotFound, match=r"dropped and made again \(id 1, now 2\)"):
            await router.gather(1, bags=make_bags())
        router.forget(2)
        pool.table = AsyncMock(side_effect=NotFound("no such table"))  # type: ignore[method-assign]
        with pytest.raises(NotFound, match="table 'facts' of pool 'run-7' was dropped"):
            await router.gather(2, bags=make_bags())

    wait(main())
