"""What a shard says of the pool by itself, with peers that answer, and peers that do not."""

import asyncio
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest

from mempool.config import TableConfig, resolve
from mempool.errors import NotFound, PoolUnreachable, ShardUnavailable
from mempool.server import ShardViews, views
from mempool.types import Placement, ShardInfo, ShardStatus, TableView

INFOS = tuple(ShardInfo(shard=shard, address=f"host{shard}:1", incarnation=1) for shard in range(3))
SCHEMA = resolve(TableConfig(name="facts", num_slots=64, value_dim=8))
VIEW = TableView(
    schema=SCHEMA,
    placement=Placement(
        table_id=1,
        epoch=1,
        owners=np.zeros((SCHEMA.num_row_pages, SCHEMA.num_blocks), np.int32),
        key_owners=np.zeros(0, np.int32),
    ),
    shards=INFOS,
)


def shard_views(*, peer: Any = None, clock: Any = lambda: 0.0) -> ShardViews:
    own = AsyncMock()
    own.views.return_value = (VIEW,)
    own.status.return_value = ShardStatus(info=INFOS[1], state="ready")
    return ShardViews("run-7", shard=own, dial=lambda info: peer(info), controller="head:7077", clock=clock)


def test_tables_are_those_of_its_views() -> None:
    assert asyncio.run(shard_views().tables()) == (VIEW,)
    assert asyncio.run(shard_views().table("facts")) is VIEW
    with pytest.raises(NotFound, match="this shard knows no table 'ficts'; its tables: facts"):
        asyncio.run(shard_views().table("ficts"))


def test_of_two_tables_of_one_name_the_later_one_is_told() -> None:
    """The earlier one was dropped, of which this shard has not heard."""
    later, earlier = (replace(VIEW, schema=replace(SCHEMA, table_id=table_id)) for table_id in (9, 4))
    for order in ((later, earlier), (earlier, later)):
        shard = shard_views(peer=lambda _: AsyncMock(status=AsyncMock(side_effect=ShardUnavailable("gone"))))
        shard._shard.views.return_value = order  # type: ignore[attr-defined]
        assert asyncio.run(shard.tables()) == (later,)
        assert asyncio.run(shard.table("facts")) is later
        assert asyncio.run(shard.status()).tables == (later,)


def test_peers_are_asked_for_their_status_and_named_where_they_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_STATUS_TIMEOUT_S", 0.05)

    async def silent() -> ShardStatus:
        await asyncio.sleep(60.0)
        raise AssertionError

    def peer(info: ShardInfo) -> Any:
        host = AsyncMock()
        if info.shard == 0:
            host.status = silent
        else:
            host.status.side_effect = ShardUnavailable("gone")
        return host

    status = asyncio.run(shard_views(peer=peer).status())
    assert [(shard.info, shard.state) for shard in status.shards] == [
        (INFOS[0], "unreachable"),
        (INFOS[1], "ready"),
        (INFOS[2], "unreachable"),
    ]
    assert (status.name, status.tables, status.rescaling) == ("run-7", (VIEW,), False)


def test_however_often_it_is_asked_its_peers_are_not() -> None:
    """Each of N shards would else ask the N others for every call that any client makes of it."""
    now_s, asked = [100.0], []

    def peer(info: ShardInfo) -> Any:
        host = AsyncMock()

        async def status() -> ShardStatus:
            asked.append(info.shard)
            await asyncio.sleep(0)
            return ShardStatus(info=info, state="ready", num_bytes=len(asked))

        host.status = status
        return host

    async def ask() -> None:
        shard = shard_views(peer=peer, clock=lambda: now_s[0])
        statuses = await asyncio.gather(*(shard.status() for _ in range(50)))
        assert asked == [0, 2]
        assert {tuple(each.state for each in status.shards) for status in statuses} == {("ready",) * 3}
        now_s[0] += views._PEERS_KEPT_S
        await shard.status()
        assert asked == [0, 2, 0, 2]
        moved = replace(VIEW, shards=(*INFOS[:2], replace(INFOS[2], incarnation=2)))
        shard._shard.views.return_value = (moved,)  # type: ignore[attr-defined]
        await shard.status()
        assert asked == [0, 2, 0, 2, 0, 2]

    asyncio.run(ask())


def test_changes_are_for_the_controller() -> None:
    async def watched(reports: Any) -> None:
        async for _ in reports:
            raise AssertionError

    moves = [watched(shard_views().rescale(3)), watched(shard_views().rebalance())]
    for change in (shard_views().create_table(SCHEMA), shard_views().drop_table("facts"), *moves):
        with pytest.raises(PoolUnreachable, match="only the controller of pool 'run-7' changes it; it is at head:7077"):
            asyncio.run(change)
    asyncio.run(shard_views().close())
