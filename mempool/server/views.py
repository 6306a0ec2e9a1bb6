"""What a shard tells of the pool: every shard answers the pool's read-only calls, so that clients find their way while
the controller is away."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

from mempool.errors import MempoolError, NotFound, PoolUnreachable
from mempool.types import (
    CheckpointProgress,
    ForkTable,
    PoolStatus,
    RescaleProgress,
    RestoreTables,
    ShardHost,
    ShardInfo,
    ShardStatus,
    TableSchema,
    TableView,
    TakeCheckpoint,
)
from mempool.types.running import Clock

_STATUS_TIMEOUT_S = 2.0
_PEERS_KEPT_S = 2.0
"""Whatever is asked of a shard, its peers are asked for their status this seldom: else one call would cost a call of
every shard, and so would everybody's at every shard."""


class ShardViews:
    """The read-only half of ``PoolApi``, from the views one shard has.

    Args:
        pool: The pool's name.
        shard: The shard that answers.
        dial: Its peers, asked for their status.
        controller: Where changes have to be asked for, for messages.
        clock: Seconds, ascending.
    """

    def __init__(
        self,
        pool: str,
        *,
        shard: ShardHost,
        dial: Callable[[ShardInfo], ShardHost],
        controller: str,
        clock: Clock = time.monotonic,
    ) -> None:
        self._pool = pool
        self._shard = shard
        self._dial = dial
        self._controller = controller
        self._clock = clock
        self._asking = asyncio.Lock()
        self._peers: dict[ShardInfo, ShardStatus] = {}
        self._heard_s = float("-inf")

    async def tables(self) -> tuple[TableView, ...]:
        """Of two tables of one name the later one: the other was dropped, and this shard has not heard of it yet."""
        views = sorted(await self._shard.views(), key=lambda view: view.schema.table_id)
        return tuple({view.schema.name: view for view in views}.values())

    async def table(self, name: str) -> TableView:
        views = await self.tables()
        for view in views:
            if view.schema.name == name:
                return view
        known = ", ".join(sorted(view.schema.name for view in views)) or "none"
        raise NotFound(f"this shard knows no table {name!r}; its tables: {known}")

    async def status(self) -> PoolStatus:
        """Its own status and that of the peers its views name, which may be two seconds old."""
        own, views = await asyncio.gather(self._shard.status(), self.tables())
        peers = {info.shard: info for view in views for info in view.shards if info.shard != own.info.shard}
        shards = sorted((own, *await self._others(list(peers.values()))), key=lambda status: status.info.shard)
        return PoolStatus(name=self._pool, shards=tuple(shards), tables=views, rescaling=False)

    async def create_table(self, schema: TableSchema) -> TableView:
        await self._refuse(f"create table {schema.name!r}")

    async def drop_table(self, name: str, *, table_id: int = 0) -> None:  # noqa: ARG002
        await self._refuse(f"drop table {name!r}")

    async def rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        await self._refuse(f"rescale to {shards} shards")
        yield  # makes this an asynchronous generator, as PoolApi asks

    async def rebalance(self, *, dry_run: bool = False) -> AsyncIterator[RescaleProgress]:  # noqa: ARG002
        await self._refuse("even the load")
        yield

    async def checkpoint(self, request: TakeCheckpoint) -> AsyncIterator[CheckpointProgress]:
        await self._refuse(f"take a checkpoint to {request.url!r}")
        yield

    async def restore(self, request: RestoreTables) -> tuple[TableView, ...]:
        await self._refuse(f"restore from {request.url!r}")

    async def fork(self, request: ForkTable) -> TableView:
        await self._refuse(f"fork table {request.table!r}")

    async def close(self) -> None:
        """Nothing to give back."""

    async def _refuse(self, what: str) -> NoReturn:
        at = next((view.controller for view in await self.tables() if view.controller), self._controller)
        raise PoolUnreachable(
            f"cannot {what}: a shard answers, and only the controller of pool {self._pool!r} changes it; "
            f"it is at {at} and Ray restarts it if it died: try again shortly"
        )

    async def _others(self, infos: list[ShardInfo]) -> list[ShardStatus]:
        async with self._asking:  # who comes meanwhile is answered by what is heard now
            if self._clock() - self._heard_s >= _PEERS_KEPT_S or not self._peers.keys() >= set(infos):
                statuses = await asyncio.gather(*(self._peer_status(info) for info in infos))
                self._peers, self._heard_s = dict(zip(infos, statuses, strict=True)), self._clock()
            return [self._peers[info] for info in infos]

    async def _peer_status(self, info: ShardInfo) -> ShardStatus:
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                return await self._dial(info).status()
        except (MempoolError, TimeoutError):
            return ShardStatus(info=info, state="unreachable")
