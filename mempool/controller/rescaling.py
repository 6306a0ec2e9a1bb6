"""Changing the number of shards while clients go on: what is checked first, what is started, moved and stopped.

A rescale is a task of the controller; whoever asked for it only watches. The moves of pages are ``mover.py``'s.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from mempool.controller.calls import ShardCalls
from mempool.controller.changes import TableChanges
from mempool.controller.launcher import Launcher
from mempool.controller.mover import MovePlan, Mover, plan_moves
from mempool.controller.moves.evening import heat_of, loads_of
from mempool.controller.moves.wanted import unfinished
from mempool.controller.room import growth, require_room
from mempool.controller.roster import Roster
from mempool.controller.telling import Telling
from mempool.errors import DataLoss, InvalidRequest, MempoolError, NotFound, ShardUnavailable
from mempool.placement.heat import FloatArray
from mempool.types import MAX_SHARDS, PageHeat, RescaleProgress, ShardInfo, ShardLoad, ShardStatus, TableView
from mempool.types.caller import Caller, calling
from mempool.types.pool import lost_remedy
from mempool.types.running import Clock, Runner

_LOG = logging.getLogger("mempool.controller")

_START_LOOKS, _START_PAUSE_S = 480, 0.25
_HEAT_TIMEOUT_S = 5.0
"""How long a shard is waited for that is to say how hot its pages are: one that does not is planned for without."""

Reports = asyncio.Queue[RescaleProgress | Exception]


class Rescaling:
    """The rescales of one pool, one at a time.

    Args:
        roster: The pool's shards and tables.
        calls, telling: Reach the shards.
        launcher: Starts and stops them.
        changes: What creates tables, and has to come to rest first.
        changing: Held while the pool changes.
        round_bytes: Bytes that one round of a move carries at most.
        trainer_lease_s: How long a step may be prepared and not decided.
        clock: Seconds.
        runner: Plans moves.
        new_token: Names rounds.
        by_heat: Whether a rescale evens load, too.

    Attributes:
        wanted: The number of shards asked for, of a rescale that goes on or has stopped half way.
        unfinished: Why a rescale stopped half way, or what is not where it should be, and what to do.
    """

    def __init__(
        self,
        roster: Roster,
        *,
        calls: ShardCalls,
        telling: Telling,
        launcher: Launcher,
        changes: TableChanges,
        changing: asyncio.Lock,
        round_bytes: int,
        trainer_lease_s: float,
        clock: Clock,
        runner: Runner,
        new_token: Callable[[], str],
        by_heat: bool,
    ) -> None:
        self._roster = roster
        self._calls = calls
        self._telling = telling
        self._launcher = launcher
        self._changes = changes
        self._changing = changing
        self._round_bytes = round_bytes
        self._trainer_lease_s = trainer_lease_s
        self._clock = clock
        self._runner = runner
        self._new_token = new_token
        self._by_heat = by_heat
        self._task: asyncio.Task[None] | None = None
        self._mover: Mover | None = None
        self._waiting = ""
        self._starting = self._half_way = False
        self._before = 0
        self._inherited: int | None = None
        self.wanted: int | None = None
        self.unfinished = ""

    @property
    def running(self) -> bool:
        """Whether one goes on."""
        return self._task is not None

    async def waiting_for(self) -> str:
        """What the one that goes on waits for, for people; "" if for nothing."""
        if self._starting:
            return await self._launcher.starting()
        return self._waiting or ("" if self._mover is None else self._mover.waiting_for)

    async def inherit(self, wanted: int) -> None:
        """Take over what a controller before this one was asked for; 0: nobody knows."""
        self._inherited = wanted
        await self.look_again()

    async def look_again(self) -> None:
        """Find out what of it is not so yet; again while there are shards that were not heard yet."""
        if (wanted := self._inherited) is None:
            return
        views, shards = self._roster.views, sorted(self._roster.shards)
        self.unfinished = await self._runner.run(lambda: unfinished(views, shards, wanted))
        self.wanted = (wanted or len(shards)) if self.unfinished else None
        if self._roster.complete:
            self._inherited = None

    async def start(self, shards: Sequence[int], *, fresh: bool = False) -> None:
        """Start shards: all of them, or none. Raises what the launcher raised."""
        starting = [asyncio.ensure_future(self._launcher.start(shard, fresh=fresh)) for shard in shards]
        try:
            results = await asyncio.gather(*starting, return_exceptions=True)
        except asyncio.CancelledError:
            await asyncio.wait(starting)
            await self.stop([task.result() for task in starting if not task.cancelled() and task.exception() is None])
            raise
        started = [result for result in results if isinstance(result, ShardInfo)]
        for result in results:
            if isinstance(result, BaseException):
                await self.stop(started)
                raise result
        self._roster.set_shards(started)

    async def stop(self, infos: Sequence[ShardInfo]) -> dict[ShardInfo, BaseException]:
        """Stop shards; answers those that could not be stopped, with the reason."""
        results = await asyncio.gather(*(self._launcher.stop(info) for info in infos), return_exceptions=True)
        return {info: result for info, result in zip(infos, results, strict=True) if isinstance(result, BaseException)}

    async def rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        """Begin one, and watch it. Raises as ``Controller.rescale`` does."""
        check_shards(shards)
        async for report in self._watched(shards, by_heat=self._by_heat):
            yield report

    async def rebalance(self, *, dry_run: bool) -> AsyncIterator[RescaleProgress]:
        """Begin one to as many shards as there are, and watch it. Raises as ``Controller.rebalance`` does."""
        if self._task is None and self.unfinished:
            raise InvalidRequest(f"load is evened once pages are where they should be; {self.unfinished}")
        async for report in self._watched(len(self._roster.shards), by_heat=True, dry_run=dry_run):
            yield report

    async def _watched(self, shards: int, *, by_heat: bool, dry_run: bool = False) -> AsyncIterator[RescaleProgress]:
        if self._task is not None:
            raise InvalidRequest(
                f"a rescale to {self.wanted} shards is under way; wait for it (mempool status shows it), then ask again"
            )
        # A task of its own: a watcher that goes away (Ctrl-C at `mempool scale`) does not stop a move half way.
        reports: Reports = asyncio.Queue()
        self._before = (self.wanted or 0) if self.unfinished else 0
        self.wanted, self._half_way, self._inherited = shards, False, None
        with calling(Caller()):  # the watcher's deadline is for its watching alone
            self._task = asyncio.create_task(self._run(shards, reports, by_heat, dry_run))
        while True:
            report = await reports.get()
            if isinstance(report, Exception):
                raise report
            yield report
            if report.done:
                return

    async def close(self) -> None:
        """End the one that goes on, between two calls."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, shards: int, reports: Reports, by_heat: bool, dry_run: bool) -> None:
        last: RescaleProgress | Exception = ShardUnavailable("the rescale was stopped: its controller is closing")
        try:
            reports.put_nowait(_begun(len(self._roster.shards), shards))  # at once: starting shards takes a while
            await self._until_started(shards)
            self._waiting = "another change of the pool"
            async with self._changing:
                async for progress in self._rescale(shards, by_heat, dry_run):
                    if progress.done:
                        last = progress
                    else:
                        reports.put_nowait(progress)
            self._before, self.unfinished = 0, ""
        except Exception as error:  # told to whoever watches; a bug is no less an answer than a failed shard
            _LOG.warning("a rescale to %d shards failed: %s", shards, error)
            last = error
        finally:
            self._task, self._mover, self._waiting, self._starting = None, None, "", False
            if not self._half_way:
                self.wanted = self._before or None
            reports.put_nowait(last)

    async def _until_started(self, shards: int) -> None:
        """Wait for shards that a controller before this one began to start, and that are to stay. Not for ever."""
        for _ in range(_START_LOOKS):
            staying = shards_after(sorted(self._roster.shards), shards)
            infos = self._roster.shards
            starting = [shard for shard in staying if shard in infos and not infos[shard].incarnation]
            if not starting:
                return
            self._waiting = f"shard {', '.join(map(str, starting))} to start"
            await asyncio.sleep(_START_PAUSE_S)

    async def _rescale(self, shards: int, by_heat: bool, dry_run: bool) -> AsyncIterator[RescaleProgress]:
        before = sorted(self._roster.shards)
        after = shards_after(before, shards)
        added, removed = sorted(set(after) - set(before)), sorted(set(before) - set(after))
        if self._changes.filling:
            self._waiting = f"tables that are being made: {', '.join(self._changes.filling)}"
        await self._changes.idle()
        self._waiting = ""
        plans = await self._checked_plans(after, removed, by_heat=by_heat)
        mover = self._mover = Mover(
            shards_before=len(before),
            shards_after=shards,
            plans=plans,
            loads=await self._runner.run(lambda: _loads(plans)),
            roster=self._roster,
            call=self._calls.call,
            untold=self._telling.untold,
            round_bytes=self._round_bytes,
            trainer_lease_s=self._trainer_lease_s,
            clock=self._clock,
            runner=self._runner,
            new_token=self._new_token,
        )
        if dry_run:
            yield replace(mover.progress(table=""), done=True)
            return
        await self._launcher.keep_wanted(shards)
        try:
            if added:
                await self._start_checked(added)
                await self._telling.require_settled(removed)
                _require_unchanged(plans, self._roster)
                require_room(_growth(plans), await self._statuses())
            async for progress in mover.run():
                yield progress
        except Exception as error:
            await self._telling.settle()
            if mover.begun:
                self._half_done(error, mover, shards)
            else:
                await self._take_back(added)
                await self._keep_as_it_is()
            raise
        try:
            await self._remove(removed)
        except Exception as error:
            self._half_done(error, mover, shards)
            raise
        yield mover.progress(table="", done=True)

    async def _checked_plans(self, after: Sequence[int], removed: Sequence[int], *, by_heat: bool) -> list[MovePlan]:
        """Plans of all tables, once every shard is as it should be and has room for what it would get."""
        await self._telling.require_settled(removed)
        statuses = await self._statuses()
        _require_whole(statuses, self._roster)
        views, round_bytes = self._roster.views, self._round_bytes
        heats = await asyncio.gather(*(self._heat(view) for view in views)) if by_heat else [None] * len(views)
        plans = await self._runner.run(
            lambda: [plan_moves(view, after, round_bytes, heat) for view, heat in zip(views, heats, strict=True)]
        )
        require_room(await self._runner.run(lambda: _growth(plans)), statuses)
        return plans

    async def _heat(self, view: TableView) -> FloatArray | None:
        """Of a table's row pages; None where too little is known of it."""
        told = await asyncio.gather(*(self._told_heat(info, view.schema.table_id) for info in self._roster.infos))
        return await self._runner.run(lambda: heat_of(view, [each for each in told if each is not None]))

    async def _told_heat(self, info: ShardInfo, table_id: int) -> PageHeat | None:
        try:
            return await self._calls.call(info, lambda host: host.read_heat(table_id), timeout_s=_HEAT_TIMEOUT_S)
        except NotFound:  # it has no page of the table
            return None
        except MempoolError as error:
            _LOG.warning("shard %d does not say how hot its pages are: %s", info.shard, error)
            return None

    async def _start_checked(self, added: Sequence[int]) -> None:
        """Start the shards that are missing, where there are the resources for them."""
        await self._launcher.require_room(len(added))
        self._starting = True
        try:
            await self.start(added, fresh=True)
        finally:
            self._starting = False

    async def _statuses(self) -> tuple[ShardStatus, ...]:
        return await self._calls.statuses(self._roster.infos)

    async def let_go(self, wanted: int) -> None:
        """A pool that was brought back is to have so many shards: those beyond go that own nothing, others are told."""
        await self._launcher.keep_wanted(wanted)
        idle = [shard for shard in self._roster.shards if shard >= wanted and shard not in self._roster.owners]
        await self._remove(idle)
        await self.inherit(wanted)

    async def _take_back(self, added: Sequence[int]) -> None:
        """Stop what was started for a rescale that moved nothing: the pool is as it was."""
        idle = [shard for shard in added if shard in self._roster.shards and shard not in self._roster.owners]
        await self._remove(idle, tolerant=True)

    async def _keep_as_it_is(self) -> None:
        """Nothing has moved: the pool is meant to have the shards that it has, or that it was asked for before."""
        try:
            await self._launcher.keep_wanted(self._before or len(self._roster.shards))
        except MempoolError as error:
            _LOG.warning("nobody could be told that a rescale was taken back: %s", error)

    async def _remove(self, shards: Sequence[int], *, tolerant: bool = False) -> None:
        """Let shards go that own nothing. Raises the reason where one cannot be stopped: it is the pool's still."""
        if not shards:
            return
        gone = [self._roster.shards[shard] for shard in shards]
        self._roster.remove_shards(shards)
        for view in self._roster.views:
            await self._telling.push(view, self._roster.infos)
        errors = await self.stop(gone)
        if errors:
            self._roster.set_shards(errors)  # the same rescale, asked for again, stops them
            if not tolerant:
                raise next(iter(errors.values()))

    def _half_done(self, error: Exception, mover: Mover, shards: int) -> None:
        """Let status and the error say what has moved and what to do."""
        said = (
            f"{mover.moved_text()}. What has moved stays where it is now, every table answers, and {shards} shards can "
            f"be asked for again: mempool scale --shards {shards}, or mempool apply"
        )
        self._half_way = True
        self.unfinished = f"the rescale to {shards} shards stopped ({error}): {said}"
        if isinstance(error, MempoolError):
            error.message = f"{error.message}. The rescale to {shards} shards stopped half way: {said}"
            error.args = (error.message,)


def check_shards(shards: int) -> None:
    """Raises InvalidRequest for what is no number of shards."""
    if isinstance(shards, bool) or not isinstance(shards, int) or not 1 <= shards <= MAX_SHARDS:
        raise InvalidRequest(
            f"shards = {shards!r}: a pool has a whole number of shards, at least 1 shard and at most {MAX_SHARDS:,}"
        )


def shards_after(before: Sequence[int], shards: int) -> list[int]:
    """The shard ids after a rescale: the lowest of the present ones stay, free ids are filled from below."""
    kept = sorted(before)[:shards]
    taken = set(kept)
    free = (shard for shard in range(len(before) + shards) if shard not in taken)
    return sorted(kept + [next(free) for _ in range(shards - len(kept))])


def _loads(plans: Sequence[MovePlan]) -> tuple[ShardLoad, ...]:
    known = [(plan_, plan_.heat) for plan_ in plans if plan_.heat is not None]
    return loads_of([(plan_.schema, heat, plan_.present.owners, plan_.target.owners) for plan_, heat in known])


def _growth(plans: Sequence[MovePlan]) -> dict[int, int]:
    return growth((plan_.schema, plan_.present, plan_.target) for plan_ in plans)


def _require_whole(statuses: Sequence[ShardStatus], roster: Roster) -> None:
    for status in statuses:
        for table in status.tables:
            if table.lost_pages:
                view = roster.find(table.name)
                remedy = lost_remedy(table.name, None if view is None else view.saved)
                raise DataLoss(
                    f"table {table.name!r} has {table.lost_pages} lost pages on shard {status.info.shard}, which "
                    f"cannot be moved. {remedy}; then rescale",
                    shard=status.info.shard,
                )


def _require_unchanged(plans: Sequence[MovePlan], roster: Roster) -> None:
    """Raises where a shard that was heard since knows a newer placement than the plans began with."""
    for plan_ in plans:
        found = roster.find(plan_.schema.name)
        if found is None or found.placement.epoch != plan_.epoch:
            raise ShardUnavailable(
                f"table {plan_.schema.name!r} was found in another place than planned; ask for the rescale again"
            )


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
