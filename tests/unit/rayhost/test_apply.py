"""What `apply` compares an edited file with."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mempool.client
from mempool.client.opening import asking
from mempool.config import ClusterConfig, PoolConfig, ShardConfig, StorageConfig, TableConfig, resolve
from mempool.errors import InvalidRequest
from mempool.placement import plan
from mempool.rayhost import planned
from mempool.rayhost.apply import apply, still_to_create, unfinished
from mempool.rayhost.state.records import PoolRecord, write_record
from mempool.types import Placement, PoolStatus, ShardInfo, ShardStatus, TableStatus, TableView
from mempool.types.schema import Layout

TABLE = TableConfig(name="facts", num_slots=1024, value_dim=64)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def status(
    name: str = "local",
    shards: int = 2,
    *,
    placed_on: int | None = None,
    layout: Layout = "auto",
    rescaled_from: int | None = None,
) -> PoolStatus:
    """Of a pool whose table lies where ``placed_on`` shards have it, by default all of its own."""
    schema = replace(resolve(TABLE), layout=layout)
    sizes: dict[str, Any] = {"num_row_pages": schema.num_row_pages, "num_blocks": 1, "num_key_pages": 0}
    before = None if rescaled_from is None else plan(None, range(rescaled_from), **sizes, layout=layout)
    assignment = plan(before, range(placed_on or shards), **sizes, layout=layout)
    infos = tuple(ShardInfo(shard=shard, address="127.0.0.1:1", incarnation=1) for shard in range(shards))
    placement = Placement(table_id=1, epoch=1, owners=assignment.owners, key_owners=assignment.key_owners)
    return PoolStatus(
        name=name,
        shards=tuple(ShardStatus(info=info, state="ready") for info in infos),
        tables=(TableView(schema=schema, placement=placement, shards=infos),),
        rescaling=False,
    )


def test_shards_and_tables_are_compared_with_what_runs() -> None:
    more = TableConfig(name="more", num_slots=64, value_dim=8)
    changes = planned(ClusterConfig(pool=PoolConfig(name="local", shards=4), tables=[more]), status())
    assert (changes.shards_before, changes.shards_after) == (2, 4)
    assert [table.name for table in changes.create] == ["more"]
    assert changes.kept == ("facts",)
    assert changes.restart == ()


def test_settings_of_processes_are_compared_with_what_up_was_given() -> None:
    given = ClusterConfig(pool=PoolConfig(name="local", shards=2), tables=[TABLE])
    edited = given.model_copy(update={"shard": ShardConfig(threads=4)})
    assert planned(edited, status()).restart == ()
    write_record(
        PoolRecord(name="local", address="127.0.0.1:7077", ray_address="127.0.0.1:1", ray_pid=None, config=given)
    )
    assert [change.field for change in planned(edited, status()).restart] == ["shard.threads"]
    assert planned(edited, status()).nothing


FILE = ClusterConfig(pool=PoolConfig(name="local", shards=2), tables=[TABLE])


@pytest.mark.parametrize("layout", ["auto", "columns", "rows", "grid"])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_a_pool_that_is_where_it_should_be_has_nothing_unfinished(layout: Any, shards: int) -> None:
    assert unfinished(status(shards=shards, layout=layout)) == ""
    assert unfinished(status(shards=shards, layout=layout, rescaled_from=4)) == ""


def test_pages_that_a_stopped_rescale_left_behind_are_not_nothing_to_do() -> None:
    half = status(shards=2, placed_on=1)
    said = (
        "32 of 64 pages of table 'facts' are still to be moved for 2 shards: ask again with mempool scale --shards 2, "
        "or mempool apply"
    )
    assert unfinished(half) == said
    changes = planned(FILE, half)
    assert changes.rescale
    assert not changes.nothing
    assert changes.lines() == [f"finish the move to 2 shards: {said}"]


def test_pages_on_a_shard_that_is_not_there_are_not_nothing_to_do() -> None:
    missing = unfinished(status(shards=1, placed_on=3))
    assert missing.startswith("table 'facts' has pages on shard 1, which is not among the pool's shards: ask again")


def test_a_pool_that_was_asked_for_other_shards_than_it_has_is_unfinished() -> None:
    """Its placements may be as its shards have them all the same."""
    asked = replace(status(shards=2), wanted_shards=4)
    said = "the pool has 2 shards and was asked for 4: ask again with mempool scale --shards 4, or mempool apply"
    assert unfinished(asked) == said
    assert planned(FILE, asked).rescale, "the file says 2: that it wants 2 now is to be told"
    assert not planned(FILE, replace(asked, wanted_shards=2)).rescale
    assert not planned(FILE, replace(asked, wanted_shards=0)).rescale, "a shard answers for the controller"


def test_what_the_pool_says_of_a_rescale_that_stopped_counts() -> None:
    stopped = replace(status(), wanted_shards=1, unfinished="the rescale to 1 shards stopped (no room)")
    changes = planned(FILE, stopped)
    assert changes.unfinished == "the rescale to 1 shards stopped (no room)"
    assert not changes.nothing


def test_the_file_of_another_pool_is_refused() -> None:
    changes = planned(ClusterConfig(pool=PoolConfig(name="mine", shards=2), tables=[TABLE]), status("other"))
    assert [change.field for change in changes.refused] == ["pool.name"]


def test_a_table_that_will_not_fit_is_refused_before_pages_move(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Pool:
        def status(self) -> PoolStatus:
            now = status(shards=2)
            return replace(now, shards=tuple(replace(shard, page_limit_bytes=2**20) for shard in now.shards))

        def rescale(self, shards: int, **_: object) -> None:
            done.append(shards)

        def create_table(self, table: TableConfig) -> None:
            done.append(table.name)

    monkeypatch.setattr(mempool.client, "connect", lambda *_, **__: nullcontext(Pool()))

    def ask(num_slots: int) -> None:
        new = TableConfig(name="new", num_slots=num_slots, value_dim=64)
        apply(
            ClusterConfig(pool=PoolConfig(name="local", shards=4), tables=[TABLE, new]),
            address="127.0.0.1:1",
            say=lambda _: None,
        )

    with pytest.raises(InvalidRequest, match=r"do not fit.*1\.0 MiB free of 1\.0 MiB\. Nothing was moved"):
        ask(2**20)
    assert done == []
    ask(64)
    assert done == [4, "new"]


@pytest.mark.parametrize("lost", [0, 3])
def test_pages_that_a_pool_was_brought_back_without_are_said(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, Any] = dict.fromkeys(("version", "num_bytes", "updates_held", "updates_applied", "lookups"), 0)
    table = TableStatus(table_id=1, name="facts", epoch=1, pages=16, lost_pages=lost, frozen=False, **counts)
    back = status()
    shards = (back.shards[0], replace(back.shards[1], tables=(table,)))
    monkeypatch.setattr(asking, "pool_status", lambda *_, **__: replace(back, shards=shards))
    said: list[str] = []
    file = FILE.model_copy(update={"shard": ShardConfig(storage=StorageConfig(path="/disk"))})
    assert still_to_create(file, address="127.0.0.1:1", token=None, tls=None, say=said.append) == ()
    lines = ["brought back from /disk: facts"]
    if lost:
        lines.append(
            "shard 1 lacks pages of tables that are there: no node that is up has a folder with them. `mempool status` "
            "names the tables, and what to restore"
        )
    assert said == lines
