"""The controller of a pool, as one object: the ``PoolApi`` over what creates tables, rescales and watches shards."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Literal

from mempool.controller.calls import ShardCalls
from mempool.controller.changes import TableChanges
from mempool.controller.launcher import Launcher
from mempool.controller.rescaling import Rescaling, check_shards
from mempool.controller.roster import Roster
from mempool.controller.saving.checkpointing import Checkpoints
from mempool.controller.saving.forking import Forking, forks_of
from mempool.controller.saving.moment import Moments
from mempool.controller.saving.origin import origins_of
from mempool.controller.telling import Telling
from mempool.controller.watching import Watching
from mempool.types import (
    CheckpointProgress,
    ForkTable,
    PoolStatus,
    RescaleProgress,
    RestoreTables,
    ShardHost,
    ShardInfo,
    TableSchema,
    TableView,
    TakeCheckpoint,
)
from mempool.types.running import THREADS, TRAINER_LEASE_S, Clock, Runner


class Controller:
    """The ``PoolApi`` of a pool whose shards a launcher starts.

    One change at a time: creating and dropping tables waits for a rescale, which waits for tables that are being
    filled; a second rescale is refused.

    Args:
        name: The pool's name.
        address: "host:port" by which clients reach it, for views to carry; "" if embedded.
        launcher: Starts and stops shards.
        dial: The ``ShardHost`` of a shard, at once; asked for every call, so it keeps its connections itself.
        round_bytes: Bytes that one round of a move carries at most. Writers of the table wait for one round, which is
            made smaller where it holds them off for long.
        trainer_lease_s: How long a trainer may hold a step undecided before the shards give it up.
        clock: Seconds, ascending.
        wall_clock: Seconds since 1970; ids of tables are made of it.
        runner: Runs what takes long, as planning does.
        new_token: Gives a name that no round of any controller ever had.
        rescale_by: "heat": a rescale evens load; "pages": it looks at the number of pages alone, so that where they lie
            depends on nothing that clients do.
        refusals: Why shards that are down cannot start, by shard, as far as whoever starts them knows; it changes.
    """

    def __init__(
        self,
        name: str,
        *,
        launcher: Launcher,
        address: str = "",
        dial: Callable[[ShardInfo], ShardHost],
        round_bytes: int = 64 * 2**20,
        trainer_lease_s: float = TRAINER_LEASE_S,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        runner: Runner = THREADS,
        new_token: Callable[[], str] = lambda: secrets.token_hex(16),
        rescale_by: Literal["heat", "pages"] = "heat",
        refusals: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self._changing = changing = asyncio.Lock()
        self._roster = roster = Roster(controller=address, wall_clock=wall_clock)
        calls = ShardCalls(name, dial)
        telling = Telling(name, roster, calls)
        moments = Moments(roster=roster, calls=calls, trainer_lease_s=trainer_lease_s, clock=clock)
        forking = Forking(calls=calls, moments=moments, new_token=new_token)
        self._changes = changes = TableChanges(
            roster, calls, telling=telling, forking=forking, changing=changing, clock=clock, runner=runner
        )
        self._rescaling = rescaling = Rescaling(
            roster,
            calls=calls,
            telling=telling,
            launcher=launcher,
            changes=changes,
            changing=changing,
            round_bytes=round_bytes,
            trainer_lease_s=trainer_lease_s,
            clock=clock,
            runner=runner,
            new_token=new_token,
            by_heat=rescale_by == "heat",
        )
        self._checkpoints = Checkpoints(
            pool=name,
            roster=roster,
            calls=calls,
            telling=telling,
            changes=changes,
            changing=changing,
            moments=moments,
            written_by=_written_by(),
            clock=clock,
            runner=runner,
            new_token=new_token,
        )
        self._runner = runner
        self._watching = Watching(
            name,
            roster,
            calls=calls,
            telling=telling,
            changes=changes,
            rescaling=rescaling,
            checkpoints=self._checkpoints,
            changing=changing,
            refusals=refusals,
        )

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The pool's shards, ascending."""
        return self._roster.infos

    @property
    def highest_incarnation(self) -> int:
        """Of any shard that was ever heard of: the next has to be higher."""
        return self._roster.highest_incarnation

    async def open(self, shards: int) -> None:
        """Start the pool's first shards."""
        check_shards(shards)
        async with self._changing:
            await self._rescaling.start(range(shards))

    async def bring_back(self, shards: int, *, wanted: Callable[[], int]) -> None:
        """Start the shards of a pool that have storage: with all that they have kept, or as ``open`` does.

        Args:
            shards: How many a new pool has.
            wanted: How many this one was meant to have, as those that are up have kept it; 0: it is new.

        Raises:
            MempoolError: A shard does not start, or what it has kept is damaged: nothing is left running.
        """
        await self.open(shards)
        while missing := await self._watching.unstarted(wanted()):
            async with self._changing:
                await self._rescaling.start(missing)
        await self._watching.adopt(self.shards, wanted() or shards)
        async with self._changing:
            await self._rescaling.let_go(wanted() or shards)

    async def adopt(self, infos: Iterable[ShardInfo], *, wanted: int = 0) -> None:
        """Take over running shards after this controller was started anew: their newest views are the pool's tables.

        A rescale that was under way stops where it was: the placement that the most advanced shard knows is given to
        all, and frozen tables are thawed; by ``reconcile``, where a shard does not answer yet. A table that was being
        made is there where any shard knows that it was, and else is dropped.

        Args:
            infos: The shards.
            wanted: How many there were to be, as the launcher was told to keep; 0: nobody knows. Status says what is
                not so yet.

        Raises:
            ShardUnavailable: No shard answers, so nothing is known of the pool's tables.
            StorageFailed: What it told them could not be kept.
        """
        await self._watching.adopt(infos, wanted)

    async def shard_restarted(self, info: ShardInfo) -> None:
        """A shard came back as a new incarnation, without its pages: its tables there answer DataLoss.

        Raises:
            MempoolError: It does not answer; to be called again.
        """
        await self._watching.admit(info)

    async def reconcile(self) -> None:
        """Give shards what they missed. Called now and then; cheap when all is well."""
        await self._watching.reconcile()

    async def create_table(self, schema: TableSchema) -> TableView:
        """Make a table, or wait for the one that is being made; goes on where the caller does not wait.

        Raises:
            InvalidRequest: The schema is wrong, or the pool has too many tables or pages.
            AlreadyExists: There is a table of that name, or one of another schema is being made.
            NotFound: It was dropped while it was being made.
            ShardUnavailable: Whether there is one of that name is not known yet.
            MempoolError: A shard could not take it; it is on none then.
        """
        return await self._changes.create(schema)

    async def drop_table(self, name: str, *, table_id: int = 0) -> None:
        """Drop a table, also one that is being made; it is gone once one shard was told.

        Args:
            table_id: Of the table that is meant; 0: whichever has that name.

        Raises:
            NotFound: There is no such table, or another one has that name by now.
            ShardUnavailable: No shard answered, or one that may have it was not heard yet.
        """
        await self._changes.drop(name, table_id)

    async def table(self, name: str) -> TableView:
        """The view of a table. Raises NotFound; ShardUnavailable where shards that were not heard yet may have it."""
        return self._roster.view(name)

    async def tables(self) -> tuple[TableView, ...]:
        """The views of all tables."""
        return self._roster.views

    async def status(self) -> PoolStatus:
        """The pool at a glance."""
        return await self._watching.status()

    async def rescale(self, shards: int) -> AsyncIterator[RescaleProgress]:
        """Change the number of shards while clients go on. Goes on where the watcher goes away.

        Raises:
            InvalidRequest: ``shards`` is out of range, a rescale is under way, or the tables would not fit.
            DataLoss: A table has lost pages, which cannot be moved.
            MempoolError: Shards could not be started, or a move failed. The message says what has moved: those pages
                stay where they are now, every table answers, and the same rescale can be asked for again.
        """
        async for progress in self._rescaling.rescale(shards):
            yield progress

    async def rebalance(self, *, dry_run: bool = False) -> AsyncIterator[RescaleProgress]:
        """Even the load of the shards, by the heat of their pages, while clients go on. Goes on where the watcher goes
        away.

        Args:
            dry_run: Only say what would move, in one message.

        Raises:
            InvalidRequest: A rescale is under way, or has stopped half way.
            DataLoss, MempoolError: As ``rescale``.
        """
        async for progress in self._rescaling.rebalance(dry_run=dry_run):
            yield progress

    async def checkpoint(self, request: TakeCheckpoint) -> AsyncIterator[CheckpointProgress]:
        """Take a checkpoint of all tables, or some, at one moment, while clients go on. Goes on where the watcher
        goes away.

        Raises:
            InvalidRequest: The place, or what is to be kept, is wrong; the place is another pool's; or a checkpoint is
                under way.
            NotFound: There is no such table.
            DataLoss: A table has lost pages.
            StorageFailed: The place does not take it.
            MempoolError: A shard did not answer. No checkpoint was taken in any case.
        """
        async for progress in self._checkpoints.take(request):
            yield progress

    async def restore(self, request: RestoreTables) -> tuple[TableView, ...]:
        """Make tables of a checkpoint's, each with its keys and whole, or not at all; goes on where the caller does not
        wait.

        Raises:
            NotFound: There is no such checkpoint, or it has no such table.
            DataLoss: It is damaged, or not whole. Where a table could not be made, one that it was to replace is as it
                was.
            InvalidRequest: The place or the name is wrong, or the checkpoint is of a newer format.
            AlreadyExists: There is a table of that name, which is not to be replaced.
            MempoolError: As ``create_table``.
        """
        found = await self._runner.run(lambda: origins_of(request), name="mempool-checkpoint")
        await self._changes.drop_left_over(found)
        self._changes.require_new(found)
        return await self._changes.restore(found)

    async def fork(self, request: ForkTable) -> TableView:
        """Make a table that is another one as it is now, with its optimizer state and step count; goes on where the
        caller does not wait.

        Raises:
            NotFound: There is no such table, or another one has that name by now.
            AlreadyExists: There is a table of the new name; or one that is to be replaced is another kind of table.
            DataLoss: The table has lost pages.
            InvalidRequest, MempoolError: As ``create_table``.
        """
        return await self._changes.fork(forks_of(request, self._roster))

    async def close(self) -> None:
        """Stop every shard; what is under way is stopped between two calls."""
        await self._checkpoints.close()
        await self._rescaling.close()
        await self._changes.close()
        infos = self.shards
        self._roster.remove_shards([info.shard for info in infos])
        errors = await self._rescaling.stop(infos)
        if errors:
            raise next(iter(errors.values()))


def _written_by() -> str:
    """The program and its version, for manifests."""
    try:
        return f"mempool {metadata.version('mempool')}"
    except metadata.PackageNotFoundError:  # run from its source
        return "mempool"
