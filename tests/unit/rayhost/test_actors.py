"""Names of actors."""

import pytest

from mempool.rayhost.actors import controller_name, pool_of, shard_name, shard_of


@pytest.mark.parametrize("pool", ["local", "a.b-c_d", "shard-1"])
def test_names_lead_back(pool: str) -> None:
    assert shard_of(pool, shard_name(pool, 12)) == 12
    assert shard_of(pool, controller_name(pool)) is None
    assert pool_of(shard_name(pool, 0)) == pool_of(controller_name(pool)) == pool


def test_other_pools_and_other_actors_are_not_ours() -> None:
    assert shard_of("local", shard_name("local2", 1)) is None
    assert shard_of("local", "local/shard-x") is None
    assert shard_of("local", "local/shard--1") is None
    assert pool_of("somebody's actor") is None
