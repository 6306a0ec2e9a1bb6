"""What `apply` compares an edited file with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mempool.config import ClusterConfig, PoolConfig, ShardConfig, TableConfig, resolve
from mempool.placement import plan
from mempool.rayhost import planned
from mempool.rayhost.apply import unfinished
from mempool.rayhost.state.records import PoolRecord, write_record
from mempool.types import Placement, PoolStatus, ShardInfo, ShardStatus, TableView
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
    assert unfinished(half) == "32 of 64 pages of table 'facts' are not where 2 shards have them"
    changes = planned(FILE, half)
    assert changes.rescale
    assert not changes.nothing
    assert changes.lines() == [
        "move pages to where 2 shards have them: 32 of 64 pages of table 'facts' are not where 2 shards have them"
    ]


def test_pages_on_a_shard_that_is_not_there_are_not_nothing_to_do() -> None:
    missing = unfinished(status(shards=1, placed_on=3))
    assert missing == "table 'facts' has pages on shard 1, which is not among the pool's shards"


def test_what_the_pool_says_of_a_rescale_that_stopped_counts() -> None:
    stopped = replace(status(), wanted_shards=1, unfinished="the rescale to 1 shards stopped (no room)")
    changes = planned(FILE, stopped)
    assert changes.unfinished == "the rescale to 1 shards stopped (no room)"
    assert not changes.nothing


def test_the_file_of_another_pool_is_refused() -> None:
    changes = planned(ClusterConfig(pool=PoolConfig(name="mine", shards=2), tables=[TABLE]), status("other"))
    assert [change.field for change in changes.refused] == ["pool.name"]
