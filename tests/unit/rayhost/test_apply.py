"""What `apply` compares an edited file with."""

from pathlib import Path

import pytest

from mempool.config import ClusterConfig, PoolConfig, ShardConfig, TableConfig, resolve
from mempool.placement import plan
from mempool.rayhost import planned
from mempool.rayhost.state.records import PoolRecord, write_record
from mempool.types import Placement, PoolStatus, ShardInfo, ShardStatus, TableView

TABLE = TableConfig(name="facts", num_slots=1024, value_dim=64)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def status(name: str = "local", shards: int = 2) -> PoolStatus:
    schema = resolve(TABLE)
    assignment = plan(
        None, range(shards), num_row_pages=schema.num_row_pages, num_blocks=1, num_key_pages=0, layout="auto"
    )
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


def test_the_file_of_another_pool_is_refused() -> None:
    changes = planned(ClusterConfig(pool=PoolConfig(name="mine", shards=2), tables=[TABLE]), status("other"))
    assert [change.field for change in changes.refused] == ["pool.name"]
