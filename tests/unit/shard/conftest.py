"""Engines for tests that need more than the contract suite's: options, faults, several pools."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mempool.shard import Engine
from mempool.types import ShardHost, ShardInfo
from mempool.wire.channels.loop import run
from tests.contract.driver import Driver, Hosted

MakeDriver = Callable[..., Driver]


@pytest.fixture
def make_driver() -> Iterator[MakeDriver]:
    """make_driver(num_shards, peers=..., **options of Engine): a driver of new engines."""
    engines: list[Engine] = []

    def make(num_shards: int = 1, *, peers: Callable[[ShardInfo], ShardHost] | None = None, **options: Any) -> Driver:
        mine: list[Engine] = []
        for shard in range(num_shards):
            info = ShardInfo(shard=shard, address="", incarnation=1)
            mine.append(Engine(info, peers=peers or (lambda source: mine[source.shard]), **options))
        engines.extend(mine)
        return Driver([Hosted(host=engine, info=engine.info) for engine in mine], table_id=1)

    yield make
    for engine in engines:
        run(engine.close(), timeout_s=20)
