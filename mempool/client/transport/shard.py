"""Shards behind channels: ``ShardHost`` as calls, each tried once, with what is left of its caller's time as deadline.

Everything here is made, used and closed on the process's IO loop. Retries and deadlines are the router's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mempool.errors import InvalidRequest, ShardUnavailable
from mempool.placement.changes import Changes
from mempool.types import (
    AttachTable,
    CommitReply,
    CommitRequest,
    DiscardReply,
    DiscardRequest,
    ExportLedger,
    ExportPages,
    GatherReply,
    GatherRequest,
    HeartbeatReply,
    HeartbeatRequest,
    LedgerPart,
    MarkTable,
    PageBatch,
    PageHeat,
    PartProgress,
    PinReply,
    PinRequest,
    PrepareReply,
    PrepareRequest,
    PullPages,
    PullReport,
    ReadRowsReply,
    ReadRowsRequest,
    ReleaseMark,
    ResolveReply,
    ResolveRequest,
    ScoreReply,
    ScoreRequest,
    ShardInfo,
    ShardStatus,
    StepCountReply,
    StepCountRequest,
    TableView,
    UpdateReply,
    UpdateRequest,
    WritePart,
    WriteRowsReply,
    WriteRowsRequest,
)
from mempool.types.caller import current_caller
from mempool.types.groups.meeting import MeetReply, MeetRequest
from mempool.types.running import Clock
from mempool.types.usage import UsageReply, UsageRequest
from mempool.wire import methods
from mempool.wire.channels.channel import Channel, Channels
from mempool.wire.codecs.pages import AttachView, ForgetTable, FreezeTable, SetView, ThawTable
from mempool.wire.methods import Method

if TYPE_CHECKING:
    from torch import Tensor

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

_NARROW_END = 2**32
# A connection nobody has used for so long is closed when the next one is made.
_IDLE_S = 120.0


class GrpcShard:
    """A shard behind a channel; a ``ShardHost``.

    Args:
        info: Which it is.
        channel: Leads to it; closed with this.
        clock: Seconds, monotonic: what callers' deadlines are told by.
        changes: Of views that shards are told.

    Attributes:
        used_s: When it was dialled last, on the clock.
    """

    def __init__(
        self, info: ShardInfo, channel: Channel, *, clock: Clock = time.monotonic, changes: Changes | None = None
    ) -> None:
        self._clock = clock
        self._changes = Changes() if changes is None else changes
        self._told: dict[int, TableView] = {}  # what it took last of each of its tables
        self.info = info
        self.used_s = 0.0
        self._channel = channel
        self._calls = 0

    @property
    def busy(self) -> bool:
        """Whether calls are under way."""
        return self._calls > 0

    def begin_gather(
        self, request: GatherRequest, *, timeout_s: float, narrow_ids: bool, alone: bool
    ) -> Callable[[], GatherReply | None] | None:
        """See ``AtOnceShard``: where the channel has such a way. For all threads but the loop's."""
        return self._channel.begin(methods.GATHER, request, timeout_s=timeout_s, narrow_ids=narrow_ids, alone=alone)

    def begin_update(
        self, request: UpdateRequest, *, timeout_s: float, narrow_ids: bool, alone: bool
    ) -> Callable[[], UpdateReply | None] | None:
        """The same of an update."""
        return self._channel.begin(methods.UPDATE, request, timeout_s=timeout_s, narrow_ids=narrow_ids, alone=alone)

    async def gather(self, request: GatherRequest) -> GatherReply:
        return await self._call(methods.GATHER, request, ids=request.ids)

    async def update(self, request: UpdateRequest) -> UpdateReply:
        return await self._call(methods.UPDATE, request, ids=request.ids)

    async def prepare(self, request: PrepareRequest) -> PrepareReply:
        return await self._call(methods.PREPARE, request)

    async def commit(self, request: CommitRequest) -> CommitReply:
        return await self._call(methods.COMMIT, request)

    async def discard(self, request: DiscardRequest) -> DiscardReply:
        return await self._call(methods.DISCARD, request)

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply:
        return await self._call(methods.HEARTBEAT, request)

    async def score(self, request: ScoreRequest) -> ScoreReply:
        return await self._call(methods.SCORE, request)

    async def read_rows(self, request: ReadRowsRequest) -> ReadRowsReply:
        return await self._call(methods.READ_ROWS, request, ids=request.ids)

    async def write_rows(self, request: WriteRowsRequest) -> WriteRowsReply:
        return await self._call(methods.WRITE_ROWS, request, ids=request.ids)

    async def step_count(self, request: StepCountRequest) -> StepCountReply:
        return await self._call(methods.STEP_COUNT, request)

    async def usage(self, request: UsageRequest) -> UsageReply:
        return await self._call(methods.USAGE, request)

    async def meet(self, request: MeetRequest) -> MeetReply:
        return await self._call(methods.MEET, request)

    async def pin(self, request: PinRequest) -> PinReply:
        return await self._call(methods.PIN, request)

    async def attach_table(self, request: AttachTable) -> None:
        """A shard that was given this very view before is told which one it is to confirm."""
        view, known = request.view, None
        if request.mode == "confirm" and (told := self._told.get(view.schema.table_id)) is not None:
            known = self._changes.known(view) if self._changes.known(told) == self._changes.known(view) else None
        asked = AttachView(
            view=view,
            mode=request.mode,
            ledger=request.ledger,
            pending=request.pending,
            source=request.source,
            fork=request.fork,
            known=known,
            also=request.also,
        )
        try:
            await self._call(methods.ATTACH_TABLE, asked)
        except InvalidRequest:
            if known is None:
                raise
            # It has that view no more, or is of a version that knows of none.
            await self._call(methods.ATTACH_TABLE, replace(asked, known=None))
        self._told[view.schema.table_id] = view

    async def drop_table(self, table_id: int, *, unmade: bool = False) -> None:
        self._told.pop(table_id, None)
        await self._call(methods.SHARD_DROP_TABLE, ForgetTable(table_id=table_id, unmade=unmade))

    async def freeze(self, table_id: int, timeout_s: float, *, token: str, lease_s: float, renew: bool = False) -> int:
        request = FreezeTable(table_id=table_id, timeout_s=timeout_s, token=token, lease_s=lease_s, renew=renew)
        return await self._call(methods.FREEZE, request)

    async def thaw(self, table_id: int, *, token: str = "") -> None:
        await self._call(methods.THAW, ThawTable(table_id=table_id, token=token))

    async def resolve(self, request: ResolveRequest) -> ResolveReply:
        return await self._call(methods.RESOLVE, request)

    async def export_pages(self, request: ExportPages) -> PageBatch:
        return await self._call(methods.EXPORT_PAGES, request)

    async def export_ledger(self, request: ExportLedger) -> LedgerPart:
        return await self._call(methods.EXPORT_LEDGER, request)

    async def pull_pages(self, request: PullPages) -> PullReport:
        return await self._call(methods.PULL_PAGES, request)

    async def set_view(self, view: TableView, *, token: str = "") -> None:
        told = self._told.pop(view.schema.table_id, None)
        change = None if told is None else self._changes.between(told, view)
        try:
            await self._call(methods.SET_VIEW, SetView(view=view, token=token, change=change))
        except InvalidRequest:
            if change is None:
                raise
            # It has another view than it took from here, or is of a version that knows of no changes.
            await self._call(methods.SET_VIEW, SetView(view=view, token=token))
        self._told[view.schema.table_id] = view

    async def mark_table(self, request: MarkTable) -> None:
        await self._call(methods.MARK_TABLE, request)

    async def write_part(self, request: WritePart) -> PartProgress:
        return await self._call(methods.WRITE_PART, request)

    async def read_heat(self, table_id: int) -> PageHeat:
        return await self._call(methods.READ_HEAT, table_id)

    async def release_mark(self, request: ReleaseMark) -> None:
        await self._call(methods.RELEASE_MARK, request)

    async def views(self) -> tuple[TableView, ...]:
        return await self._call(methods.LIST_TABLES, None)

    async def status(self) -> ShardStatus:
        return await self._call(methods.STATUS, None)

    async def close(self) -> None:
        """End the connection; calls under way end with ShardUnavailable. Repeatable."""
        await self._channel.close()

    async def _call(self, method: Method[RequestT, ReplyT], request: RequestT, *, ids: Tensor | None = None) -> ReplyT:
        narrow_ids = ids is not None and _fit_narrow(ids)
        self._calls += 1
        try:
            return await self._channel.call(
                method, request, timeout_s=current_caller().remaining_s(self._clock), narrow_ids=narrow_ids
            )
        finally:
            self._calls -= 1


class GrpcDialer:
    """Connections to shards, one to each start of each, made at first use. Its ``dial`` is what a router asks for.

    Args:
        channels: Makes the connections.
        clock: As of ``GrpcShard``.
    """

    def __init__(self, channels: Channels, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._channels = channels
        self._changes = Changes()
        self._hosts: dict[ShardInfo, GrpcShard] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def dial(self, info: ShardInfo) -> GrpcShard:
        """The host of a shard.

        A shard that came back, perhaps at its old address, gets a new connection at once, where the old one might
        still be waiting out its reconnect backoff.

        Raises:
            ShardUnavailable: The shard has no address, or the pool is closed.
        """
        if self._closed or not info.address:
            why = "the pool was closed on this side" if self._closed else "it has no address yet"
            raise ShardUnavailable(f"shard {info.shard} cannot be reached: {why}", shard=info.shard)
        host = self._hosts.get(info)
        now_s = asyncio.get_running_loop().time()
        if host is None:
            self._close_idle(now_s)
            channel = self._channels(info.address, shard=info.shard)
            host = GrpcShard(info, channel, clock=self._clock, changes=self._changes)
            self._hosts[info] = host
        host.used_s = now_s
        return host

    def dial_at_once(self, info: ShardInfo) -> GrpcShard | None:
        """The host of a shard that was dialled before, for all threads but the loop's."""
        host = self._hosts.get(info)
        if host is not None:
            host.used_s = self._clock()
        return host

    async def close(self) -> None:
        """End all connections. Repeatable."""
        self._closed = True
        hosts = list(self._hosts.values())
        self._hosts.clear()
        await asyncio.gather(*(host.close() for host in hosts), *self._closing)

    def _close_idle(self, now_s: float) -> None:
        for info, host in list(self._hosts.items()):
            if now_s - host.used_s > _IDLE_S and not host.busy:
                self._close_soon(self._hosts.pop(info).close())

    def _close_soon(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _fit_narrow(ids: Tensor) -> bool:
    """Whether ids fit uint32. One pass over them costs less than the bytes it saves."""
    numbers = ids.numpy()  # numpy: torch's thread pool can hold up the IO loop for milliseconds
    if not numbers.size or numbers.dtype == np.uint32:
        return True
    return int(numbers.min()) >= 0 and int(numbers.max()) < _NARROW_END
