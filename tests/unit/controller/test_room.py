"""Room as numbers: what a shard would hold against what it may."""

from dataclasses import replace

import numpy as np
import pytest

from mempool.config import ProductKeys, TableConfig, resolve
from mempool.controller.room import assigned_bytes, growth, require_room
from mempool.errors import InvalidRequest
from mempool.placement import Assignment, plan
from mempool.types import Placement, ShardInfo, ShardStatus
from mempool.types.sizes import owned_bytes

SCHEMA = resolve(
    TableConfig(name="a", num_slots=24**2, value_dim=100, block_dim=40, keys=ProductKeys(heads=3, key_dim=6))
)


def placed(shards: int, layout: str = "auto") -> Assignment:
    return plan(
        None,
        range(shards),
        num_row_pages=SCHEMA.num_row_pages,
        num_blocks=SCHEMA.num_blocks,
        num_key_pages=3,
        layout=layout,  # type: ignore[arg-type]
    )


def status(shard: int, *, num_bytes: int, limit: int, state: str = "ready") -> ShardStatus:
    info = ShardInfo(shard=shard, address="", incarnation=1)
    return ShardStatus(info=info, state=state, num_bytes=num_bytes, page_limit_bytes=limit)


@pytest.mark.parametrize("layout", ["columns", "rows", "grid", "auto"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_assigned_bytes_are_what_shards_own(shards: int, layout: str) -> None:
    assignment = placed(shards, layout)
    placement = Placement(table_id=0, epoch=1, owners=assignment.owners, key_owners=assignment.key_owners)
    expected = {shard: owned_bytes(SCHEMA, placement, shard) for shard in placement.shards}
    assert assigned_bytes(SCHEMA, assignment) == expected
    packed = replace(SCHEMA, dtype="int8", rounding="stochastic")
    for shard, num_bytes in assigned_bytes(packed, assignment).items():  # rows may be filled up besides
        assert num_bytes <= owned_bytes(packed, placement, shard) <= num_bytes + 24**2 * 3 * 19


def test_growth_is_after_less_before_over_all_tables() -> None:
    one, two = placed(1), placed(2)
    assert growth([]) == {}
    assert sum(growth([(SCHEMA, one, two)]).values()) == 0
    assert growth([(SCHEMA, two, one)])[1] == -assigned_bytes(SCHEMA, two)[1]
    assert growth([(SCHEMA, two, one), (SCHEMA, one, two)]) == {0: 0, 1: 0}


def test_a_shard_without_room_is_named_with_what_it_needs_and_has() -> None:
    statuses = [status(0, num_bytes=3 * 2**20, limit=4 * 2**20), status(1, num_bytes=0, limit=0)]
    require_room({0: 2**20, 1: 2**60}, statuses)
    require_room({0: -(2**30)}, [status(0, num_bytes=9, limit=8)])
    require_room({0: 2**60}, [status(0, num_bytes=0, limit=1, state="unreachable")])
    with pytest.raises(
        InvalidRequest, match=r"shard 0 would need 2\.0 MiB more and has 1\.0 MiB free of 4\.0 MiB\. Noth"
    ):
        require_room({0: 2 * 2**20}, statuses)


def test_a_large_table_is_weighed_in_arrays() -> None:
    large = replace(SCHEMA, num_slots=2**20, page_slots=1, stride=2**10, value_dim=1, block_dim=1)
    owners = (np.arange(2**20, dtype=np.int32) % 1000)[:, None]
    held = assigned_bytes(large, Assignment(owners=owners, key_owners=np.zeros(3, dtype=np.int32)))
    assert len(held) == 1000
    assert held[999] == 8 * 1048
