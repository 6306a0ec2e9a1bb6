"""Whose word counts when several addresses of a pool are asked."""

import asyncio
from typing import Any

import pytest

from mempool.client.transport.pool import GrpcPool
from mempool.errors import MempoolError, NotFound, PoolUnreachable, ShardUnavailable


class Refusing:
    """A ``Channel`` of which every call fails."""

    def __init__(self, address: str, error: MempoolError) -> None:
        self.address = address
        self.error = error

    async def call(self, *_: Any, **__: Any) -> Any:
        raise self.error

    async def close(self) -> None:
        pass


def asked(errors: dict[str, MempoolError]) -> MempoolError:
    """What a client of those addresses is told that asks for a table."""
    pool = GrpcPool(list(errors), lambda address: Refusing(address, errors[address]))  # type: ignore[arg-type, return-value]
    with pytest.raises(MempoolError) as raised:
        asyncio.run(pool.table("facts"))
    return raised.value


def test_a_shard_that_knows_no_table_does_not_speak_for_a_controller_that_does_not_know_yet() -> None:
    shard = NotFound("this shard knows no table 'facts'")
    told = asked({"controller:1": ShardUnavailable("whether there is one is not known yet"), "shard-0:1": shard})
    assert isinstance(told, PoolUnreachable)
    assert "is not known yet" in str(told)
    assert isinstance(asked({"controller:1": PoolUnreachable("nobody answers"), "shard-0:1": shard}), NotFound)
