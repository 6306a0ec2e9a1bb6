"""Steps of tables as a user takes them: on any thread, and told of what a process cannot see by itself."""

import warnings
from collections.abc import Iterator

import pytest

from mempool.client import Pool, Table
from mempool.client.training.tables import TableCommit, commit_tables, discard_tables, prepare_tables
from mempool.errors import InvalidRequest

from .scripted import THREE, ScriptedPool, push


@pytest.fixture
def opened() -> Iterator[tuple[ScriptedPool, list[Table]]]:
    fake = ScriptedPool({1: THREE, 2: THREE})
    with Pool(fake, fake.dial, name="run-7", timeout_s=10.0) as pool:  # type: ignore[arg-type]
        yield fake, [pool.table("table-1"), pool.table("table-2")]


def pushed(table: Table) -> None:
    async def arrive() -> None:
        await push(table.link.session)
        await table.link.session.pushes.settled()

    table.link.run(arrive())


def test_tables_of_one_pool_are_one_step(opened) -> None:  # type: ignore[no-untyped-def]
    fake, tables = opened
    links = [table.link for table in tables]
    assert discard_tables(links) == [0, 0]
    assert prepare_tables(links) == [None, None]
    pushed(tables[1])
    assert [each is not None for each in prepare_tables(links)] == [False, True]
    pushed(tables[0])
    assert commit_tables([TableCommit(link, lr=0.1) for link in links]) == [1, 1]
    assert len(fake.shards[0].requests("commit")) == 1
    pushed(tables[0])
    assert discard_tables(links) == [1, 0]


def test_all_numbers_are_checked_before_anything_is_sent(opened) -> None:  # type: ignore[no-untyped-def]
    fake, tables = opened
    for table in tables:
        pushed(table)
    fake.clear()
    with pytest.raises(InvalidRequest, match="lr = nan"):
        commit_tables([TableCommit(tables[0].link, lr=0.1), TableCommit(tables[1].link, lr=float("nan"))])
    assert not any(fake.names())


def test_what_shards_dropped_is_a_warning_of_the_step_that_sent_it_again(opened) -> None:  # type: ignore[no-untyped-def]
    fake, tables = opened
    pushed(tables[0])
    for shard in fake.shards:
        shard.forget()
    with pytest.warns(UserWarning, match=r"updates of table 'table-1' were dropped by shards \[0, 1, 2\].*sent again"):
        assert tables[0].commit() == 1
    pushed(tables[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables[0].commit() == 1


def test_closing_a_pool_lets_what_is_committed_reach_all_owners() -> None:
    fake = ScriptedPool({1: THREE})
    with Pool(fake, fake.dial, name="run-7", timeout_s=10.0) as pool:  # type: ignore[arg-type]
        table = pool.table("table-1")
        pushed(table)
        assert table.commit() == 1
    assert [len(shard.applied[1]) for shard in fake.shards] == [1, 1, 1, 0]
