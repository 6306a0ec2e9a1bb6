"""Pools: tables by name, what a lost answer does, scaling, closing."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from mempool.client import Pool
from mempool.config import SGD, TableConfig, resolve
from mempool.errors import AlreadyExists, InvalidRequest, NotFound, PoolUnreachable
from mempool.types import RescaleProgress, TableSchema, TableView
from tests.support.faulty import COLUMNS, FaultyPool

CONFIG = TableConfig(name="other", num_slots=64, value_dim=12, block_dim=4, page_slots=8, optimizer=SGD(lr=0.5))


def test_tables_are_one_object_each(open_pool) -> None:  # type: ignore[no-untyped-def]
    pool = open_pool(FaultyPool(COLUMNS))
    table = pool.table("facts")
    assert pool.table("facts") is table
    assert pool.tables() == (table,)
    with pytest.raises(NotFound, match="no table 'nothing'"):
        pool.table("nothing")


def test_created_table_is_at_once_usable(open_pool) -> None:  # type: ignore[no-untyped-def]
    fake = FaultyPool(COLUMNS)
    pool = open_pool(fake)
    table = pool.create_table(CONFIG)
    assert table.schema == replace(resolve(CONFIG), table_id=table.schema.table_id)
    torch.testing.assert_close(table.gather(torch.tensor([[3]])).detach(), fake.values.float()[[3]])
    with pytest.raises(AlreadyExists):
        pool.create_table(CONFIG)


class ForgetfulPool(FaultyPool):
    """Does what it is told, and loses its first answer."""

    def __init__(self) -> None:
        super().__init__(COLUMNS)
        self.lost = 0

    async def create_table(self, schema: TableSchema) -> TableView:
        view = await super().create_table(schema)
        return self._lose(view)

    async def drop_table(self, name: str, *, table_id: int = 0) -> None:
        await super().drop_table(name, table_id=table_id)
        self._lose(self.view)

    def _lose(self, view: TableView) -> TableView:
        self.lost += 1
        if self.lost == 1:
            raise PoolUnreachable("the connection broke")
        return view


def test_table_whose_making_was_not_heard_of_is_made_once(open_pool) -> None:  # type: ignore[no-untyped-def]
    assert open_pool(ForgetfulPool()).create_table(CONFIG).name == "other"


def test_another_table_of_that_name_is_not_taken_for_ours(open_pool) -> None:  # type: ignore[no-untyped-def]
    fake = ForgetfulPool()
    create = FaultyPool.create_table

    async def different() -> TableView:
        fake.create_table = lambda schema: create(fake, schema)  # type: ignore[method-assign]
        fake.schema = resolve(CONFIG.model_copy(update={"seed": 7}))
        raise PoolUnreachable("the connection broke")

    fake.create_table = lambda _: different()  # type: ignore[method-assign]
    with pytest.raises(AlreadyExists):
        open_pool(fake).create_table(CONFIG)


def test_drop_that_was_not_heard_of_is_done_once(open_pool) -> None:  # type: ignore[no-untyped-def]
    fake = ForgetfulPool()
    pool = open_pool(fake)
    table = pool.table("facts")
    pool.drop_table("facts")
    assert fake.dropped
    with pytest.raises(NotFound, match="table 'facts' of pool 'run-7' was dropped"):
        table.gather(torch.tensor([[1]]))
    with pytest.raises(NotFound, match="no table 'facts'"):
        pool.drop_table("facts")


def test_rescale_reports_on_the_callers_thread(open_pool) -> None:  # type: ignore[no-untyped-def]
    pool = open_pool(FaultyPool(COLUMNS))
    reports: list[RescaleProgress] = []
    pool.rescale(5, progress=reports.append)
    assert [(report.pages_moved, report.done) for report in reports] == [(0, False), (7, True)]
    assert {report.shards_after for report in reports} == {5}
    pool.rescale(np.int64(5))
    for shards in (0, -1, True, np.bool_(True), 2.0):
        with pytest.raises(InvalidRequest, match="a pool has at least 1 shard"):
            pool.rescale(shards)

    def stop(_: RescaleProgress) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pool.rescale(5, progress=stop)


def test_status_goes_through(open_pool) -> None:  # type: ignore[no-untyped-def]
    status = open_pool(FaultyPool(COLUMNS)).status()
    assert [shard.info.shard for shard in status.shards] == [0, 1, 2]


def test_closed_pool_says_so() -> None:
    closed = []

    async def on_close() -> None:
        closed.append(True)

    fake = FaultyPool(COLUMNS)
    with Pool(fake, fake.dial, name="run-7", on_close=on_close) as pool:
        table = pool.table("facts")
    pool.close()
    assert closed == [True]
    assert fake.away
    for call in (pool.tables, lambda: table.gather(torch.tensor([[1]])), table.commit, lambda: pool.rescale(2)):
        with pytest.raises(InvalidRequest, match="pool 'run-7' is closed"):
            call()


def test_timeout_must_be_positive() -> None:
    fake = FaultyPool(COLUMNS)
    for timeout_s in (0.0, -1.0, float("nan"), float("inf"), True, "30", None):
        with pytest.raises(InvalidRequest, match="must be above 0 seconds"):
            Pool(fake, fake.dial, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("embedded", "advice"),
    [(False, r"connect to the pool \(mempool.connect\)"), (True, "in this process only: .* start")],
)
def test_pools_and_tables_are_shared_by_copies_and_not_pickled(embedded: bool, advice: str) -> None:
    fake = FaultyPool(COLUMNS)
    with Pool(fake, fake.dial, name="run-7", embedded=embedded) as pool:
        table = pool.table("facts")
        assert copy.copy(pool) is copy.deepcopy([pool])[0] is pool
        for thing, name in ((pool, "pool 'run-7'"), (table, "table 'facts'")):
            with pytest.raises(InvalidRequest, match=f"{name} is a connection and cannot be pickled. .*{advice}"):
                pickle.dumps(thing)


def test_what_is_no_config_is_refused_with_what_is(open_pool) -> None:  # type: ignore[no-untyped-def]
    pool = open_pool(FaultyPool(COLUMNS))
    for wrong in ("facts", {"name": "facts"}, None):
        with pytest.raises(InvalidRequest, match=r"it takes a mempool\.TableConfig"):
            pool.create_table(wrong)


def test_numbers_of_a_commit_are_checked(open_pool) -> None:  # type: ignore[no-untyped-def]
    table = open_pool(FaultyPool(COLUMNS)).table("facts")
    for name, wrong in (("lr", "x"), ("lr", float("nan")), ("grad_scale", None), ("grad_scale", True)):
        with pytest.raises(InvalidRequest, match=f"table 'facts': {name} = {wrong!r} must be a finite number"):
            table.commit(**{name: wrong})


def test_a_drop_names_the_table_that_its_caller_meant(open_pool) -> None:  # type: ignore[no-untyped-def]
    """Made anew by somebody else before the second try: that one stays."""
    fake = FaultyPool(COLUMNS)
    pool = open_pool(fake)
    asked = []

    async def drop(name: str, *, table_id: int = 0) -> None:
        asked.append((name, table_id))
        if len(asked) == 1:
            fake.schema = replace(fake.schema, table_id=fake.schema.table_id + 1)
            raise PoolUnreachable("the connection broke")
        if table_id != fake.schema.table_id:
            raise NotFound("it is gone already")

    fake.drop_table = drop  # type: ignore[method-assign]
    meant = fake.schema.table_id
    pool.drop_table("facts")
    assert asked == [("facts", meant), ("facts", meant)]
