"""The controller behind channels: ``PoolApi`` by any of several addresses, by shards' while the controller is away."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

from mempool.client.transport.addresses import is_address
from mempool.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MempoolError,
    NotFound,
    PoolUnreachable,
    ShardUnavailable,
    Unavailable,
)
from mempool.placement.changes import changed, known_view
from mempool.types import (
    CheckpointProgress,
    DropTable,
    ForkTable,
    PoolStatus,
    RescaleProgress,
    RestoreTables,
    TableSchema,
    TableView,
    TakeCheckpoint,
)
from mempool.types.caller import current_caller
from mempool.types.running import Clock
from mempool.wire import methods
from mempool.wire.channels.channel import Channel, Channels
from mempool.wire.codecs.tables import AskTable, ToldTable
from mempool.wire.methods import Method

T = TypeVar("T")
RequestT = TypeVar("RequestT")

# How long one address may take to answer a reading call before the next one is asked.
_READ_TIMEOUT_S = 5.0
# How long a reading call keeps to an address that is not the first, before the first is tried again: only the
# controller knows all of the pool.
_DETOUR_S = 5.0


class GrpcPool:
    """The pool's calls. Each is tried once at each address, until one answers.

    Reading calls go to the bootstrap addresses, then to the shards that views have named: any shard answers them from
    what it last heard, so clients outlive the controller. For some seconds they keep to the address that answered last.
    Changing calls go to bootstrap addresses, and to where views say that the controller is: one that came back on
    another node tells the shards, and a client that does not reach it asks them. No other address is believed.

    Args:
        addresses: "host:port" of the controller, of shards, or of both; at least one.
        channels: Makes the connections.
        clock: Seconds, monotonic: what callers' deadlines are told by.
    """

    def __init__(self, addresses: Iterable[str], channels: Channels, *, clock: Clock = time.monotonic) -> None:
        self._deadlines = clock
        self._bootstrap = tuple(dict.fromkeys(addresses))
        self._make_channel = channels
        self._preferred = self._home = self._bootstrap[0]
        self._controller = ""  # as views say
        self._detour_end_s = 0.0
        self._shard_addresses: dict[str, None] = {}
        self._channels: dict[str, Channel] = {}
        self._views: dict[str, TableView] = {}  # by name, as they were told last: what is other is asked for
        self._closed = False

    async def create_table(self, schema: TableSchema) -> TableView:
        view = self._learned(
            await self._change(
                lambda channel, timeout_s: channel.call(methods.CREATE_TABLE, schema, timeout_s=timeout_s)
            )
        )
        self._views[view.schema.name] = view
        return view

    async def drop_table(self, name: str, *, table_id: int = 0) -> None:
        self._views.pop(name, None)
        request = DropTable(name=name, table_id=table_id)
        await self._change(lambda channel, timeout_s: channel.call(methods.DROP_TABLE, request, timeout_s=timeout_s))

    async def table(self, name: str) -> TableView:
        """Raises NotFound only if the pool's own addresses say so: a shard may not have heard of the table yet.

        Of a table that was asked for before, what is other comes, where whoever answers has told the same view.
        """
        known = self._views.get(name)
        try:
            view = None if known is None else await self._changed(name, known)
            view = (await self._asked(AskTable(name=name))).view if view is None else view
        except NotFound:
            self._views.pop(name, None)
            raise
        assert view is not None, "a change comes only where a view is known"
        self._views[name] = view
        return self._learned(view)

    async def _changed(self, name: str, known: TableView) -> TableView | None:
        """The view, of one that is known; None where what was told makes none."""
        told = await self._asked(AskTable(name=name, known=known_view(known)))
        if told.change is None:
            return told.view
        try:
            return changed((known,), told.change)
        except InvalidRequest:
            return None

    async def _asked(self, request: AskTable) -> ToldTable:
        return await self._read(
            lambda channel, timeout_s: channel.call(methods.GET_TABLE, request, timeout_s=timeout_s)
        )

    async def tables(self) -> tuple[TableView, ...]:
        views = await self._read(
            lambda channel, timeout_s: channel.call(methods.LIST_TABLES, None, timeout_s=timeout_s)
        )
        self._learn(views)
        return views

    async def status(self) -> PoolStatus:
        status = await self._read(
            lambda channel, timeout_s: channel.call(methods.GET_STATUS, None, timeout_s=timeout_s)
        )
        self._learn(status.tables)
        self._learn_shards(shard.info.address for shard in status.shards)
        return status

    async def restore(self, request: RestoreTables) -> tuple[TableView, ...]:
        views = await self._change(
            lambda channel, timeout_s: channel.call(methods.RESTORE, request, timeout_s=timeout_s)
        )
        return tuple(self._learned(view) for view in views)

    async def fork(self, request: ForkTable) -> TableView:
        view = await self._change(
            lambda channel, timeout_s: channel.call(methods.FORK_TABLE, request, timeout_s=timeout_s)
        )
        return self._learned(view)

    async def rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        """Where the stream breaks after its first message the rescale goes on, and this raises PoolUnreachable."""
        async for report in self._stream(methods.RESCALE, shards):
            yield report

    async def rebalance(self, *, dry_run: bool = False) -> AsyncIterator[RescaleProgress]:
        """As ``rescale``."""
        async for report in self._stream(methods.REBALANCE, dry_run):
            yield report

    async def checkpoint(self, request: TakeCheckpoint) -> AsyncIterator[CheckpointProgress]:
        """Where the stream breaks after its first message the checkpoint goes on, and this raises PoolUnreachable."""
        async for report in self._stream(methods.CHECKPOINT, request):
            yield report

    async def _stream(self, method: Method[RequestT, T], request: RequestT) -> AsyncIterator[T]:
        problems: dict[str, MempoolError] = {}
        async for address in self._places(problems):
            begun = False
            try:
                async for report in self._channel(address).stream(method, request):
                    begun = True
                    self._answered(address, problems)
                    yield report
                return
            except Unavailable as error:
                if begun:
                    raise
                problems[address] = error
        raise self._unreachable(problems)

    async def close(self) -> None:
        """End all connections. Repeatable."""
        self._closed = True
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))

    async def _change(self, call: Callable[[Channel, float | None], Awaitable[T]]) -> T:
        problems: dict[str, MempoolError] = {}
        async for address in self._places(problems):
            try:
                answer = await call(self._channel(address), current_caller().remaining_s(self._deadlines))
            except Unavailable as error:  # also what a shard says, which changes nothing
                problems[address] = error
            else:
                self._answered(address, problems)
                return answer
        raise self._unreachable(problems)

    async def _places(self, tried: Mapping[str, MempoolError]) -> AsyncIterator[str]:
        """Where the controller may be, one after the other; at last where shards say that it is by now."""
        for address in self._own:
            yield address
        for address in dict.fromkeys((*self._shard_addresses, *self._bootstrap)):
            try:
                views = await self._channel(address).call(methods.LIST_TABLES, None, timeout_s=_READ_TIMEOUT_S)
            except (Unavailable, DeadlineExceeded):
                continue
            self._learn(views)
            if self._controller and self._controller not in tried:
                yield self._controller

    @property
    def _own(self) -> tuple[str, ...]:
        """The addresses that the controller is known by, where it answered last first."""
        found = (self._home, *((self._controller,) if self._controller else ()), *self._bootstrap)
        return tuple(dict.fromkeys(found))

    def _answered(self, address: str, problems: Mapping[str, MempoolError]) -> None:
        """Keep to where the controller is, once it is no more where it was."""
        if self._home in problems:
            self._home = address if address == self._controller else self._bootstrap[0]

    async def _read(self, call: Callable[[Channel, float], Awaitable[T]]) -> T:
        problems: dict[str, MempoolError] = {}
        unknown: NotFound | None = None
        clock = asyncio.get_running_loop()
        if clock.time() > self._detour_end_s:
            self._preferred = self._home
        own = self._own
        for address in dict.fromkeys((self._preferred, *own, *self._shard_addresses)):
            try:
                left_s = current_caller().remaining_s(self._deadlines)
                timeout_s = _READ_TIMEOUT_S if left_s is None else min(left_s, _READ_TIMEOUT_S)
                answer = await call(self._channel(address), timeout_s)
            except (Unavailable, DeadlineExceeded) as error:
                problems[address] = error
            except NotFound as error:
                if address in own:
                    unknown = unknown or error
                problems[address] = error
            else:
                if address != self._preferred:
                    self._preferred, self._detour_end_s = address, clock.time() + _DETOUR_S
                self._answered(address, problems)
                return answer
        if unknown is not None and not any(isinstance(problems.get(each), ShardUnavailable) for each in own):
            raise unknown
        # Where the controller says that it is not known yet, a shard's word for what there is not does not count.
        raise self._unreachable(problems)

    def _learned(self, view: TableView) -> TableView:
        self._learn((view,))
        return view

    def _learn(self, views: Iterable[TableView]) -> None:
        """Take over where shards and controller are."""
        for view in views:
            self._learn_shards(info.address for info in view.shards)
            if is_address(view.controller):
                self._controller = view.controller

    def _learn_shards(self, addresses: Iterable[str]) -> None:
        found = dict.fromkeys(address for address in addresses if address)
        if found:
            self._shard_addresses = found

    def _channel(self, address: str) -> Channel:
        if self._closed:
            raise PoolUnreachable("the pool was closed on this side")
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._make_channel(address)
        return channel

    def _unreachable(self, problems: Mapping[str, MempoolError]) -> PoolUnreachable:
        texts = [
            error.message if address in error.message else f"{address}: {error.message}"
            for address, error in problems.items()
        ]
        unreachable = PoolUnreachable("; ".join(texts), address=self._bootstrap[0])
        unreachable.refused = all(isinstance(error, Unavailable) and error.refused for error in problems.values())
        return unreachable
