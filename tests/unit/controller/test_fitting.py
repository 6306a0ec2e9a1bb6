"""What an apply would make of a pool is refused before any of it is begun, where it does not fit."""

from dataclasses import replace

import pytest

from mempool.config import TableConfig, resolve
from mempool.controller import changes
from mempool.controller.moves import fitting
from mempool.controller.moves.fitting import require_fit
from mempool.errors import InvalidRequest
from mempool.placement import plan
from mempool.types import (
    Placement,
    PoolStatus,
    ShardFill,
    ShardInfo,
    ShardStatus,
    TableCreation,
    TableSchema,
    TableView,
)

MIB = 2**20


def table(name: str, mib: int) -> TableSchema:
    return resolve(TableConfig(name=name, num_slots=mib * 1024, value_dim=256, optimizer={"type": "sgd", "lr": 0.1}))


def pool(shards: int, *, limit_mib: int, mib: int) -> PoolStatus:
    """Of a table of so many MiB on so many shards."""
    schema = table("there", mib)
    placed = plan(
        None,
        range(shards),
        num_row_pages=schema.num_row_pages,
        num_blocks=schema.num_blocks,
        num_key_pages=0,
        layout=schema.layout,
    )
    infos = tuple(ShardInfo(shard=shard, address="", incarnation=1) for shard in range(shards))
    placement = Placement(table_id=1, epoch=1, owners=placed.owners, key_owners=placed.key_owners)
    return PoolStatus(
        name="p",
        shards=tuple(
            ShardStatus(info=info, state="ready", num_bytes=mib * MIB // shards, page_limit_bytes=limit_mib * MIB)
            for info in infos
        ),
        tables=(TableView(schema=schema, placement=placement, shards=infos),),
        rescaling=False,
    )


def test_tables_have_to_fit_on_the_shards_that_there_will_be() -> None:
    now = pool(2, limit_mib=16, mib=24)
    require_fit(now, 2, [])
    require_fit(now, 2, [table("new", 4)])
    with pytest.raises(InvalidRequest, match=r"shard 0 would need 8\.\d MiB more and has 4\.0 MiB free of 16\.0 MiB"):
        require_fit(now, 2, [table("new", 16)])
    require_fit(now, 4, [table("new", 16)])  # shards that come may hold what the others may
    with pytest.raises(InvalidRequest, match=r"do not fit .*shard 3 would need 2\d\.\d MiB more and has 16"):
        require_fit(now, 4, [table("new", 80)])
    with pytest.raises(InvalidRequest, match="shard 0 would need"):
        require_fit(now, 1, [])
    require_fit(pool(2, limit_mib=0, mib=24), 1, [table("new", 1024)])


def test_a_shard_that_does_not_answer_speaks_for_nobody() -> None:
    now = pool(2, limit_mib=16, mib=24)
    silent = replace(now, shards=tuple(replace(shard, state="unreachable") for shard in now.shards))
    require_fit(silent, 3, [table("new", 1024)])


def test_a_table_that_is_being_filled_is_not_counted_twice() -> None:
    """Whoever asked for it may be gone: the same apply joins in."""
    now, new = pool(2, limit_mib=16, mib=24), table("new", 8)
    fill = ShardFill(shard=0, bytes_done=0, bytes_total=8 * MIB)
    being_made = TableCreation(table="new", table_id=2, waiting_for="", spent_s=1.0, shards=(fill,))
    full = replace(now, shards=tuple(replace(shard, num_bytes=16 * MIB) for shard in now.shards))
    with pytest.raises(InvalidRequest, match="do not fit"):
        require_fit(full, 2, [new])
    require_fit(replace(full, creating=(being_made,)), 2, [new])
    with pytest.raises(InvalidRequest, match="do not fit"):
        require_fit(replace(full, creating=(replace(being_made, shards=()),)), 2, [new])


def test_too_many_tables_or_pages_are_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now, new = pool(1, limit_mib=0, mib=1), table("new", 1)
    require_fit(now, 1, [new])
    monkeypatch.setattr(fitting, "MAX_TABLES", 1)
    with pytest.raises(InvalidRequest, match="would have 2 tables"):
        require_fit(now, 1, [new])
    monkeypatch.setattr(fitting, "MAX_TABLES", changes.MAX_TABLES)
    monkeypatch.setattr(fitting, "MAX_PLACED_PAGES", changes.num_pages(new))
    with pytest.raises(InvalidRequest, match="Nothing was changed"):
        require_fit(now, 1, [new])


def test_a_number_that_no_pool_has_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="shards = 0"):
        require_fit(pool(1, limit_mib=0, mib=1), 0, [])
