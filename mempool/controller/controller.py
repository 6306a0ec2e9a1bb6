"""The controller of a pool: creates tables, answers views, rescales live. Its state machine of shards and tables is
``roster.py``, the moves of one table are ``mover.py``; starting shards is the ``Launcher``'s."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from mempool.controller.mover import Mover, plan_moves
from mempool.controller.roster import Roster
from mempool.controller.settling import settle
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
_FILL_TIMEOUT_S = 3600.0
"""Writing the initial values of a large table takes minutes; whoever waits for it has a deadline of their own."""
_PUSH_TRIES = 4
_PUSH_PAUSE_S = 0.5

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
        dial: The ``ShardHost`` of a shard, at once; asked for every call, so it keeps its connections itself.
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
        self._changing = asyncio.Lock()
        self._missed = False  # some shard missed what it was told
        self._rescaling: asyncio.Task[None] | None = None

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The pool's shards, ascending."""
        return self._roster.infos

    async def open(self, shards: int) -> None:
        """Start the pool's first shards."""
        _check_shards(shards)
        async with self._changing:
            await self._start(range(shards))

    async def adopt(self, infos: Iterable[ShardInfo]) -> None:
        """Take over running shards after this controller was started anew: their newest views are the pool's tables.

        A rescale that was under way stops where it was: the placement that the most advanced shard knows is given to
        all, and frozen tables are thawed; by ``reconcile``, where a shard does not answer yet.

        Raises:
            ShardUnavailable: No shard answers, so nothing is known of the pool's tables.
        """
        async with self._changing:
            self._roster.set_shards(infos)
            self._roster.complete = False
            problems = await self._settle()
            if problems and len(problems) == len(self.shards):
                shard, problem = min(problems.items())
                raise ShardUnavailable(
                    f"none of the {len(problems)} shards of pool {self.name!r} answers the controller that was started "
                    f"anew (shard {shard}: {problem}); it tries again: see mempool status",
                    shard=shard,
                )

    async def shard_restarted(self, info: ShardInfo) -> None:
        """A shard came back as a new incarnation, without its pages: its tables there answer DataLoss.

        Raises:
            MempoolError: It does not answer; to be called again.
        """
        async with self._changing:
            self._roster.set_shards([info])
            problems = await self._settle()
            if info.shard in problems:
                raise problems[info.shard]

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
                await self._everywhere(
                    lambda host: host.attach_table(AttachTable(view=view, mode="initialise")), timeout_s=_FILL_TIMEOUT_S
                )
            except BaseException:  # also where the caller's time is over: nobody could drop a table that has no name
                self._roster.dropped.add(schema.table_id)
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
                try:
                    async for progress in self._rescale(shards):
                        if progress.done:
                            last = progress
                        else:
                            reports.put_nowait(progress)
                except Exception:
                    await self._settle()
                    raise
        except Exception as error:  # told to whoever watches; a bug is no less an answer than a failed shard
            last = error
        finally:
            self._rescaling = None
            reports.put_nowait(last)

    async def _rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        before = sorted(self._roster.shards)
        after = _after(before, shards)
        added, removed = sorted(set(after) - set(before)), sorted(set(before) - set(after))
        yield _begun(len(before), shards)  # at once: starting shards takes a while
        await self._require_settled(removed)
        await self._require_whole()
        if added:
            await self._start(added)
            await self._require_settled(removed)
        plans = [plan_moves(view, after, self._round_bytes) for view in self._roster.views]
        mover = Mover(
            shards_before=len(before),
            shards_after=shards,
            plans=plans,
            roster=self._roster,
            call=self._call,
            push=self._push_decided,
        )
        async for progress in mover.run():
            yield progress
        if removed:
            gone = [self._roster.shards[shard] for shard in removed]
            self._roster.remove_shards(removed)
            for view in self._roster.views:
                await self._push(view, self.shards)
            errors = await self._stop(gone)
            if errors:
                self._roster.set_shards(errors)  # the pool's still: the same rescale, asked for again, stops them
                raise next(iter(errors.values()))
        yield mover.progress(table="", done=True)

    async def close(self) -> None:
        """Stop every shard; a rescale under way is stopped between two calls."""
        if self._rescaling is not None:
            self._rescaling.cancel()
            await asyncio.wait([self._rescaling])
        infos = self.shards
        self._roster.remove_shards([info.shard for info in infos])
        errors = await self._stop(infos)
        if errors:
            raise next(iter(errors.values()))

    async def _start(self, shards: Sequence[int]) -> None:
        results = await asyncio.gather(*(self._launcher.start(shard) for shard in shards), return_exceptions=True)
        started = [result for result in results if isinstance(result, ShardInfo)]
        for result in results:
            if isinstance(result, BaseException):
                await self._stop(started)
                raise result
        self._roster.set_shards(started)

    async def _stop(self, infos: Sequence[ShardInfo]) -> dict[ShardInfo, BaseException]:
        """Stop shards; answers those that could not be stopped, with the reason."""
        results = await asyncio.gather(*(self._launcher.stop(info) for info in infos), return_exceptions=True)
        return {info: result for info, result in zip(infos, results, strict=True) if isinstance(result, BaseException)}

    async def _settle(self) -> dict[int, BaseException]:
        """Bring every shard to what the roster says; answers what is in the way, by shard."""
        problems = await settle(self._roster, self._call)
        self._missed = bool(problems)
        for shard, problem in problems.items():
            _LOG.warning("shard %d of pool %s is not up to date: %s", shard, self.name, problem)
        return problems

    async def _require_settled(self, removed: Sequence[int]) -> None:
        """Raises what is wrong with a shard, but for one that owns nothing and is to go."""
        problems = await self._settle()
        owners = {shard for view in self._roster.views for shard in view.placement.shards}
        for shard, problem in sorted(problems.items()):
            if shard in owners or shard not in removed:
                raise problem

    async def _require_whole(self) -> None:
        for status in (await self.status()).shards:
            for table in status.tables:
                if table.lost_pages:
                    raise DataLoss(
                        f"table {table.name!r} has {table.lost_pages} lost pages on shard {status.info.shard}, which "
                        f"cannot be moved; drop the table (pool.drop_table({table.name!r})), then rescale",
                        shard=status.info.shard,
                    )

    async def _push(self, view: TableView, infos: Sequence[ShardInfo]) -> dict[ShardInfo, BaseException]:
        """Make shards know a view; answers those that did not take it. ``reconcile`` will tell them again."""
        results = await asyncio.gather(
            *(self._call(info, lambda host: host.set_view(view)) for info in infos), return_exceptions=True
        )
        failed = {
            info: result for info, result in zip(infos, results, strict=True) if isinstance(result, BaseException)
        }
        self._missed = self._missed or bool(failed)
        return failed

    async def _push_decided(self, view: TableView, owners: Collection[int]) -> None:
        """Make every shard know a placement that is decided. owners: Those that own pages before or after it.

        Raises:
            ShardUnavailable: An owner did not take it, though told several times. No page may move before it has: what
                it has staged is nowhere else any more, and a failed move would thaw it.
        """
        failed = await self._push(view, self.shards)
        for _ in range(_PUSH_TRIES - 1):
            if failed:
                await asyncio.sleep(_PUSH_PAUSE_S)
                failed = await self._push(view, list(failed))
        for info, error in failed.items():
            if info.shard not in owners:
                continue
            raise ShardUnavailable(
                f"shard {info.shard} did not take epoch {view.placement.epoch} of table {view.schema.name!r} "
                f"({error}); the rescale stops here. Ask for it again once all shards are ready: mempool status",
                shard=info.shard,
                address=info.address,
            )

    async def reconcile(self) -> None:
        """Give shards what they missed. Called now and then; cheap when all is well."""
        if self._changing.locked():
            return
        async with self._changing:
            statuses = await asyncio.gather(*(self._shard_status(info) for info in self.shards))
            if self._missed or self._roster.dropped or not all(self._is_current(status) for status in statuses):
                await self._settle()

    def _is_current(self, status: ShardStatus) -> bool:
        """Whether a shard has what it should have; one that does not answer cannot be told anything now."""
        has = {table.table_id: table for table in status.tables}
        return status.state != "ready" or all(
            (table := has.get(view.schema.table_id)) is not None
            and table.epoch == view.placement.epoch
            and not table.frozen
            for view in self._roster.views
        )

    async def _call(
        self, info: ShardInfo, call: Callable[[ShardHost], Awaitable[T]], *, timeout_s: float = _CALL_TIMEOUT_S
    ) -> T:
        """One bounded call of one shard."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call(self._dial(info))
        except TimeoutError as error:
            if isinstance(error, MempoolError):
                raise
            raise ShardUnavailable(
                f"shard {info.shard} of pool {self.name!r} did not answer within {timeout_s:g} s; "
                "see which shards are up: mempool status",
                shard=info.shard,
                address=info.address,
            ) from None

    async def _everywhere(
        self,
        call: Callable[[ShardHost], Awaitable[None]],
        *,
        tolerant: bool = False,
        timeout_s: float = _CALL_TIMEOUT_S,
    ) -> None:
        """The same call of every shard, side by side; raises the first error once all have answered."""
        infos = self.shards
        results = await asyncio.gather(
            *(self._call(info, call, timeout_s=timeout_s) for info in infos), return_exceptions=True
        )
        for info, result in zip(infos, results, strict=True):
            if isinstance(result, BaseException):
                if not tolerant:
                    raise result
                _LOG.warning("shard %d: %s", info.shard, result)

    async def _shard_status(self, info: ShardInfo) -> ShardStatus:
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                return await self._dial(info).status()
        except (MempoolError, TimeoutError):
            return ShardStatus(info=info, state="unreachable")


def _check_shards(shards: int) -> None:
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise InvalidRequest(f"shards = {shards!r}: a pool has a whole number of shards, at least 1 shard")


def _begun(shards_before: int, shards_after: int) -> RescaleProgress:
    return RescaleProgress(
        shards_before=shards_before,
        shards_after=shards_after,
        pages_moved=0,
        pages_total=0,
        bytes_moved=0,
        bytes_total=0,
        table="",
        done=False,
    )


def _after(before: Sequence[int], shards: int) -> list[int]:
    """The shard ids after a rescale: the lowest of the present ones stay, free ids are filled from below."""
    kept = sorted(before)[:shards]
    free = (shard for shard in range(len(before) + shards) if shard not in kept)
    return sorted(kept + [next(free) for _ in range(shards - len(kept))])
