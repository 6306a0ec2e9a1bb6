"""The controller of a pool: creates tables, answers views, rescales live. Its state machine of shards and tables is
``roster.py``, the moves of one table are ``mover.py``; starting shards is the ``Launcher``'s."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from mempool.controller.mover import Mover, plan_moves
from mempool.controller.roster import Roster
from mempool.errors import DataLoss, InvalidRequest, MempoolError, ShardUnavailable
from mempool.placement import plan
from mempool.types import (
    AttachTable,
    Placement,
    PoolStatus,
    RescaleProgress,
    ShardHost,
    ShardInfo,
    ShardStatus,
    TableSchema,
    TableView,
)

_LOG = logging.getLogger("mempool.controller")
_STATUS_TIMEOUT_S = 2.0
_CALL_TIMEOUT_S = 60.0

T = TypeVar("T")


class Launcher(Protocol):
    """Starts and stops shards: engines in this process, or Ray actors."""

    async def start(self, shard: int) -> ShardInfo:
        """Start a shard and answer once it is ready. Raises ShardUnavailable with the reason and what to do."""

    async def stop(self, info: ShardInfo) -> None:
        """Stop a shard that owns nothing any more."""


class Controller:
    """The ``PoolApi`` of a pool whose shards a launcher starts.

    One change at a time: creating and dropping tables waits for a rescale, a second rescale is refused.

    Args:
        name: The pool's name.
        launcher: Starts and stops shards.
        dial: The ``ShardHost`` of a shard; cached here until the shard's incarnation changes.
        round_bytes: Bytes that one round of a move carries at most; writers of the table wait for one round.
    """

    def __init__(
        self,
        name: str,
        *,
        launcher: Launcher,
        dial: Callable[[ShardInfo], ShardHost],
        round_bytes: int = 64 * 2**20,
    ) -> None:
        self.name = name
        self._launcher = launcher
        self._dial = dial
        self._round_bytes = round_bytes
        self._roster = Roster()
        self._hosts: dict[tuple[int, int], ShardHost] = {}
        self._changing = asyncio.Lock()
        self._rescaling: asyncio.Task[None] | None = None

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The pool's shards, ascending."""
        return tuple(self._roster.shards[shard] for shard in sorted(self._roster.shards))

    async def open(self, shards: int) -> None:
        """Start the pool's first shards."""
        _check_shards(shards)
        async with self._changing:
            await self._start(range(shards))

    async def adopt(self, infos: Iterable[ShardInfo]) -> None:
        """Take over running shards after this controller was started anew: their newest views are the pool's tables.

        A rescale that was under way stops where it was: frozen tables are thawed and the placement that the most
        advanced shard knows is given to all.
        """
        async with self._changing:
            self._roster.set_shards(infos)
            newest: dict[int, TableView] = {}
            attached: dict[int, set[int]] = {}
            for info in self.shards:
                try:
                    views = await self._call(info, lambda host: host.views())
                except MempoolError as error:
                    _LOG.warning("shard %d does not answer while its controller recovers: %s", info.shard, error)
                    continue
                attached[info.shard] = {view.schema.table_id for view in views}
                for view in views:
                    known = newest.get(view.schema.table_id)
                    if known is None or known.placement.epoch < view.placement.epoch:
                        newest[view.schema.table_id] = view
            for view in newest.values():
                self._roster.put(view.schema, view.placement)
            for info in self.shards:
                for view in self._roster.views:
                    if view.schema.table_id not in attached.get(info.shard, {view.schema.table_id}):
                        await self._attach(info, view, lost=info.shard in view.placement.shards)
            await self._push(self._roster.views)
            for view in self._roster.views:
                await self._everywhere(_thaw(view.schema.table_id))

    async def shard_restarted(self, info: ShardInfo) -> None:
        """A shard came back as a new incarnation, without its pages: its tables there answer DataLoss."""
        async with self._changing:
            self._roster.set_shards([info])
            for view in self._roster.views:
                await self._attach(info, view, lost=info.shard in view.placement.shards)
            await self._push(self._roster.views)

    async def create_table(self, schema: TableSchema) -> TableView:
        async with self._changing:
            self._roster.require_free(schema.name)
            schema = replace(schema, table_id=self._roster.new_table_id())
            assignment = plan(
                None,
                sorted(self._roster.shards),
                num_row_pages=schema.num_row_pages,
                num_blocks=schema.num_blocks,
                num_key_pages=schema.num_key_pages,
                layout=schema.layout,
            )
            placement = Placement(
                table_id=schema.table_id, epoch=1, owners=assignment.owners, key_owners=assignment.key_owners
            )
            view = TableView(schema=schema, placement=placement, shards=self.shards)
            try:
                await self._everywhere(lambda host: host.attach_table(AttachTable(view=view, mode="initialise")))
            except MempoolError:
                await self._everywhere(lambda host: host.drop_table(schema.table_id), tolerant=True)
                raise
            return self._roster.put(schema, placement)

    async def drop_table(self, name: str) -> None:
        async with self._changing:
            view = self._roster.remove(name)
            await self._everywhere(lambda host: host.drop_table(view.schema.table_id), tolerant=True)

    async def table(self, name: str) -> TableView:
        return self._roster.view(name)

    async def tables(self) -> tuple[TableView, ...]:
        return self._roster.views

    async def status(self) -> PoolStatus:
        statuses = await asyncio.gather(*(self._shard_status(info) for info in self.shards))
        return PoolStatus(
            name=self.name, shards=tuple(statuses), tables=self._roster.views, rescaling=self._rescaling is not None
        )

    async def rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        """Change the number of shards while clients go on.

        Raises:
            InvalidRequest: ``shards`` < 1, or a rescale is under way.
            DataLoss: A table has lost pages, which cannot be moved.
            MempoolError: A move failed. Pages moved so far stay where they are now, every table answers, and the same
                rescale can be asked for again.
        """
        _check_shards(shards)
        if self._rescaling is not None:
            raise InvalidRequest("a rescale is under way; wait for it (mempool status shows it), then ask again")
        # A task of its own: a watcher that goes away (Ctrl-C at `mempool scale`) does not stop a move half way.
        reports: asyncio.Queue[RescaleProgress | Exception] = asyncio.Queue()
        self._rescaling = asyncio.create_task(self._run_rescale(shards, reports))
        while True:
            report = await reports.get()
            if isinstance(report, Exception):
                raise report
            yield report
            if report.done:
                return

    async def _run_rescale(self, shards: int, reports: "asyncio.Queue[RescaleProgress | Exception]") -> None:
        last: RescaleProgress | Exception = ShardUnavailable("the rescale was stopped: its controller is closing")
        try:
            async with self._changing:
                async for progress in self._rescale(shards):
                    if progress.done:
                        last = progress
                    else:
                        reports.put_nowait(progress)
        except Exception as error:  # told to whoever watches; a bug is no less an answer than a failed shard
            last = error
        finally:
            self._rescaling = None
            reports.put_nowait(last)

    async def _rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        await self._require_whole()
        before = sorted(self._roster.shards)
        after = _after(before, shards)
        added, removed = sorted(set(after) - set(before)), sorted(set(before) - set(after))
        if added:
            started = await self._start(added)
            for info in started:
                for view in self._roster.views:
                    await self._attach(info, view, lost=False)
            await self._push(self._roster.views)
        plans = [plan_moves(view, after, self._round_bytes) for view in self._roster.views]
        mover = Mover(
            shards_before=len(before),
            shards_after=shards,
            plans=plans,
            roster=self._roster,
            host=self._host,
            push=lambda view: self._push([view]),
        )
        async for progress in mover.run():
            yield progress
        if removed:
            gone = [self._roster.shards[shard] for shard in removed]
            self._roster.remove_shards(removed)
            await self._push(self._roster.views)
            for info in gone:
                await self._forget(info)
                await self._launcher.stop(info)
        yield mover.progress(table="", done=True)

    async def close(self) -> None:
        """Stop every shard; a rescale under way is stopped between two calls."""
        if self._rescaling is not None:
            self._rescaling.cancel()
            await asyncio.wait([self._rescaling])
        for info in self.shards:
            await self._forget(info)
            await self._launcher.stop(info)
        self._roster.remove_shards([info.shard for info in self.shards])

    async def _start(self, shards: Sequence[int]) -> list[ShardInfo]:
        results = await asyncio.gather(*(self._launcher.start(shard) for shard in shards), return_exceptions=True)
        started = [result for result in results if isinstance(result, ShardInfo)]
        for result in results:
            if isinstance(result, BaseException):
                for info in started:
                    await self._launcher.stop(info)
                raise result
        self._roster.set_shards(started)
        return started

    async def _attach(self, info: ShardInfo, view: TableView, *, lost: bool) -> None:
        """Make a table known to one shard. One that owns nothing takes the table's history with its first pages."""
        request = AttachTable(view=self._roster.view(view.schema.name), mode="lost" if lost else "empty")
        await self._call(info, lambda host: host.attach_table(request))

    async def _require_whole(self) -> None:
        for status in (await self.status()).shards:
            for table in status.tables:
                if table.lost_pages:
                    raise DataLoss(
                        f"table {table.name!r} has {table.lost_pages} lost pages on shard {status.info.shard}, which "
                        f"cannot be moved; drop the table (pool.drop_table({table.name!r})), then rescale",
                        shard=status.info.shard,
                    )

    async def _push(self, views: Iterable[TableView]) -> None:
        """Make every shard know these views. A shard that does not answer now learns them when it restarts."""
        for view in views:
            results = await asyncio.gather(
                *(self._call(info, _set_view(view)) for info in self.shards),
                return_exceptions=True,
            )
            for info, result in zip(self.shards, results, strict=True):
                if isinstance(result, BaseException):
                    _LOG.warning(
                        "shard %d did not take epoch %d of table %s: %s",
                        info.shard,
                        view.placement.epoch,
                        view.schema.name,
                        result,
                    )

    async def reconcile(self) -> None:
        """Give shards that missed a view the newest one. Called now and then; cheap when all is well."""
        if self._changing.locked():
            return
        async with self._changing:
            views = {view.schema.table_id: view for view in self._roster.views}
            for status in await asyncio.gather(*(self._shard_status(info) for info in self.shards)):
                known = {table.table_id: table.epoch for table in status.tables}
                for table_id, view in views.items():
                    if status.state == "ready" and known.get(table_id, view.placement.epoch) < view.placement.epoch:
                        await self._call(status.info, _set_view(view))

    def _host(self, shard: int) -> ShardHost:
        info = self._roster.shards[shard]
        key = (info.shard, info.incarnation)
        if key not in self._hosts:
            self._hosts[key] = self._dial(info)
        return self._hosts[key]

    async def _forget(self, info: ShardInfo) -> None:
        host = self._hosts.pop((info.shard, info.incarnation), None)
        if host is not None:
            await host.close()

    async def _call(self, info: ShardInfo, call: Callable[[ShardHost], Awaitable[T]]) -> T:
        """One bounded call of one shard."""
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await call(self._host(info.shard))
        except TimeoutError as error:
            if isinstance(error, MempoolError):
                raise
            raise ShardUnavailable(
                f"shard {info.shard} of pool {self.name!r} did not answer within {_CALL_TIMEOUT_S:g} s; "
                "see which shards are up: mempool status",
                shard=info.shard,
                address=info.address,
            ) from None

    async def _everywhere(self, call: Callable[[ShardHost], Awaitable[None]], *, tolerant: bool = False) -> None:
        """The same call of every shard, side by side; raises the first error once all have answered."""
        infos = self.shards
        results = await asyncio.gather(*(self._call(info, call) for info in infos), return_exceptions=True)
        for info, result in zip(infos, results, strict=True):
            if isinstance(result, BaseException):
                if not tolerant:
                    raise result
                _LOG.warning("shard %d: %s", info.shard, result)

    async def _shard_status(self, info: ShardInfo) -> ShardStatus:
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                return await self._host(info.shard).status()
        except (MempoolError, TimeoutError):
            return ShardStatus(info=info, state="unreachable")


def _set_view(view: TableView) -> Callable[[ShardHost], Awaitable[None]]:
    return lambda host: host.set_view(view)


def _thaw(table_id: int) -> Callable[[ShardHost], Awaitable[None]]:
    return lambda host: host.thaw(table_id)


def _check_shards(shards: int) -> None:
    if shards < 1:
        raise InvalidRequest(f"shards = {shards}: a pool has at least 1 shard")


def _after(before: Sequence[int], shards: int) -> list[int]:
    """The shard ids after a rescale: the lowest of the present ones stay, free ids are filled from below."""
    kept = sorted(before)[:shards]
    free = (shard for shard in range(len(before) + shards) if shard not in kept)
    return sorted(kept + [next(free) for _ in range(shards - len(kept))])
