"""Looking after shards: adoption by a new controller, shards that came back, what they missed; the pool's status."""

import asyncio
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from mempool.controller.calls import ShardCalls
from mempool.controller.changes import TableChanges
from mempool.controller.rescaling import Rescaling
from mempool.controller.roster import Roster
from mempool.controller.saving.checkpointing import Checkpoints
from mempool.controller.telling import Telling
from mempool.errors import ShardUnavailable, StorageFailed
from mempool.types import PoolStatus, ShardInfo, ShardStatus, TableView


class Watching:
    """Watches the shards of one pool.

    Args:
        pool: Its name.
        roster: Its shards and tables.
        calls, telling: Reach the shards.
        changes, rescaling, checkpoints: What goes on, for the status.
        changing: Held while the pool changes.
        refusals: Why shards that are down cannot start, by shard, as far as is known; it changes.
    """

    def __init__(
        self,
        pool: str,
        roster: Roster,
        *,
        calls: ShardCalls,
        telling: Telling,
        changes: TableChanges,
        rescaling: Rescaling,
        checkpoints: Checkpoints,
        changing: asyncio.Lock,
        refusals: Mapping[int, str],
    ) -> None:
        self._pool = pool
        self._roster = roster
        self._calls = calls
        self._telling = telling
        self._changes = changes
        self._rescaling = rescaling
        self._checkpoints = checkpoints
        self._changing = changing
        self._refusals = refusals

    async def adopt(self, infos: Iterable[ShardInfo], wanted: int) -> None:
        """Take over running shards. Raises ShardUnavailable where none answers, StorageFailed where disks fail."""
        async with self._changing:
            self._roster.set_shards(infos)
            self._roster.doubt()
            problems = await self._telling.settle()
            if problems and len(problems) == len(self._roster.infos):
                shard, problem = min(problems.items())
                if isinstance(problem, StorageFailed):
                    raise problem
                raise ShardUnavailable(
                    f"none of the {len(problems)} shards of pool {self._pool!r} answers the controller that was "
                    f"started anew (shard {shard}: {problem}); it tries again: see mempool status",
                    shard=shard,
                )
            await self._rescaling.inherit(wanted)

    async def unstarted(self, wanted: int) -> list[int]:
        """The shards that a pool has besides those that are up, ascending: so many are wanted, and some own pages, as
        far as any that is up knows. Raises MempoolError where one does not say what it knows."""
        found = await asyncio.gather(
            *(self._calls.call(info, lambda host: host.views()) for info in self._roster.infos)
        )
        newest: dict[int, TableView] = {}
        for view in (view for views in found for view in views):
            known = newest.get(view.schema.table_id)
            if known is None or view.placement.epoch > known.placement.epoch:
                newest[view.schema.table_id] = view
        owners = {shard for view in newest.values() for shard in view.placement.shards}
        return sorted((owners | set(range(wanted))) - self._roster.shards.keys())

    async def admit(self, info: ShardInfo) -> None:
        """A shard came back as a new incarnation. Raises MempoolError where it does not answer."""
        async with self._changing:
            known = self._roster.shards.get(info.shard)
            if known is None or known.incarnation > info.incarnation:
                return  # a rescale has removed it meanwhile, or it came back once more
            self._roster.set_shards([info])
            problems = await self._telling.settle()
            await self._rescaling.look_again()
            if info.shard in problems:
                raise problems[info.shard]

    async def reconcile(self) -> None:
        """Give shards what they missed. Called now and then; cheap when all is well."""
        if self._changing.locked():
            return
        async with self._changing:
            statuses = await self._calls.statuses(self._roster.infos)
            views, making = self._roster.views, self._roster.unfinished
            current = all(is_current(each, views, making) for each in statuses)
            if self._telling.missed or self._roster.dropped or not current:
                await self._telling.settle()
                await self._rescaling.look_again()

    async def status(self) -> PoolStatus:
        """The pool at a glance; waits for nothing that goes on."""
        infos, rescaling = self._roster.infos, self._rescaling
        statuses, waiting_for = await asyncio.gather(self._calls.statuses(infos), rescaling.waiting_for())
        return PoolStatus(
            name=self._pool,
            shards=tuple(self._with_refusal(each) for each in statuses),
            tables=self._roster.views,
            rescaling=rescaling.running,
            wanted_shards=len(infos) if rescaling.wanted is None else rescaling.wanted,
            waiting_for=waiting_for,
            unfinished="" if rescaling.running else rescaling.unfinished,  # it is being done
            creating=self._changes.creations(statuses),
            checkpoint=self._checkpoints.doing,
        )

    def _with_refusal(self, status: ShardStatus) -> ShardStatus:
        """Why a shard that does not answer cannot start."""
        refusal = "" if status.state == "ready" else self._refusals.get(status.info.shard, "")
        return replace(status, storage_refuses=refusal) if refusal else status


def is_current(status: ShardStatus, views: Iterable[TableView], making: Container[int] = ()) -> bool:
    """Whether a shard has what it should have; one that does not answer cannot be told anything now.

    making: Tables that may be pending there.
    """
    has = {table.table_id: table for table in status.tables}
    if any(table.pending and table.table_id not in making for table in status.tables):
        return status.state != "ready"
    return status.state != "ready" or all(
        (table := has.get(view.schema.table_id)) is not None
        and table.epoch == view.placement.epoch
        and not table.frozen
        for view in views
    )
