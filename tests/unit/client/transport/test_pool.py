"""Whose word counts when several addresses of a pool are asked."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mempool.client.transport.pool import GrpcPool
from mempool.config import TableConfig, resolve
from mempool.errors import MempoolError, NotFound, PoolUnreachable, ShardUnavailable
from mempool.types import Placement, ShardInfo, TableView
from mempool.wire import methods
from mempool.wire.codecs.tables import ToldTable


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


class Place:
    """A ``Channel`` to a shard, which names a controller in its views, or to a controller; or to nobody."""

    def __init__(self, address: str, names: str = "", *, controls: bool = False) -> None:
        self.address, self.names, self.controls = address, names, controls
        self.asked: list[str] = []
        self.gone = False

    async def call(self, method: Any, *_: Any, **__: Any) -> Any:
        self.asked.append(method.path.rpartition("/")[2])
        if self.gone:
            raise PoolUnreachable(f"nobody listens at {self.address}")
        if method is methods.LIST_TABLES:
            return (view(self.names),)
        if method is methods.GET_TABLE:
            return ToldTable(view=view(self.names))
        if not self.controls:
            raise PoolUnreachable("a shard changes nothing")
        return None

    async def stream(self, method: Any, *_: Any, **__: Any) -> Any:
        await self.call(method)
        yield "moved"

    async def close(self) -> None:
        pass


def view(controller: str) -> TableView:
    schema = replace(resolve(TableConfig(name="facts", num_slots=32, value_dim=4)), table_id=1)
    owners = np.zeros((schema.num_row_pages, 1), dtype=np.int32)
    placement = Placement(table_id=1, epoch=1, owners=owners, key_owners=np.empty(0, dtype=np.int32))
    shards = (
        ShardInfo(shard=0, address="shard-0:1", incarnation=1),
        ShardInfo(shard=1, address="s-1:1", incarnation=1),
    )
    return TableView(schema=schema, placement=placement, shards=shards, controller=controller)


def places(**names: str) -> dict[str, Place]:
    found = {"old:1": Place("old:1", "old:1", controls=True), "new:1": Place("new:1", "new:1", controls=True)}
    return found | {address: Place(address, names.get(key, "old:1")) for key, address in _SHARDS.items()}


_SHARDS = {"first": "shard-0:1", "second": "s-1:1"}


def test_a_client_whose_controller_is_gone_asks_shards_where_it_is_by_now() -> None:
    there = places(second="new:1")  # the first has not heard of it yet

    async def use() -> None:
        pool = GrpcPool(["old:1"], there.__getitem__)  # type: ignore[arg-type]
        await pool.table("facts")
        there["old:1"].gone = True
        await pool.drop_table("facts")
        assert there["new:1"].asked == ["DropTable"]
        old = len(there["old:1"].asked)
        await pool.drop_table("facts")
        assert [each async for each in pool.rescale(2)] == ["moved"]
        await pool.table("facts")
        assert there["new:1"].asked == ["DropTable", "DropTable", "Rescale", "GetTable"]
        assert len(there["old:1"].asked) == old, "it is where it answered last"
        there["new:1"].gone, there["old:1"].gone = True, False
        await pool.drop_table("facts")
        assert there["old:1"].asked[old:] == ["DropTable"], "it may come back to where it was"

    asyncio.run(use())


def test_a_change_is_made_through_any_shard_that_knows_the_controller() -> None:
    there = places(first="new:1")

    async def use() -> None:
        pool = GrpcPool(["shard-0:1"], there.__getitem__)  # type: ignore[arg-type]
        await pool.drop_table("facts")

    asyncio.run(use())
    assert there["new:1"].asked == ["DropTable"]


@pytest.mark.parametrize("said", ["", "nowhere", "a:1,b:2", "http://x:1", "new:0"])
def test_what_is_no_address_is_not_asked(said: str) -> None:
    there = places(first=said, second=said)
    there["old:1"].gone = True

    async def use() -> None:
        pool = GrpcPool(["old:1", "shard-0:1"], there.__getitem__)  # type: ignore[arg-type]
        with pytest.raises(PoolUnreachable, match="nobody listens"):
            await pool.drop_table("facts")

    asyncio.run(use())
    assert there["new:1"].asked == []
