"""Makes shards know what the roster says, and remembers that some missed it."""

import asyncio
import logging
from collections.abc import Sequence

from mempool.controller.calls import ShardCalls
from mempool.controller.roster import Roster
from mempool.controller.settling import settle
from mempool.types import AttachTable, ShardInfo, TableView

_LOG = logging.getLogger("mempool.controller")
_PUSH_TRIES = 4
_PUSH_PAUSE_S = 0.5


class Telling:
    """Tells the shards of one pool.

    Attributes:
        missed: Some shard missed what it was told.
    """

    def __init__(self, pool: str, roster: Roster, calls: ShardCalls) -> None:
        self._pool = pool
        self._roster = roster
        self._calls = calls
        self.missed = False
        self._misses = 0

    async def settle(self) -> dict[int, BaseException]:
        """Bring every shard to what the roster says; answers what is in the way, by shard."""
        misses = self._misses
        problems = await settle(self._roster, self._calls.call)
        self.missed = bool(problems) or self._misses != misses  # a making may end meanwhile
        for shard, problem in problems.items():
            _LOG.warning("shard %d of pool %s is not up to date: %s", shard, self._pool, problem)
        return problems

    async def require_settled(self, removed: Sequence[int]) -> None:
        """Raises what is wrong with a shard, but for one that owns nothing and is to go."""
        problems = await self.settle()
        owners = self._roster.owners
        for shard, problem in sorted(problems.items()):
            if shard in owners or shard not in removed:
                raise problem

    async def push(self, view: TableView, infos: Sequence[ShardInfo]) -> dict[ShardInfo, BaseException]:
        """Make shards know a view; answers those that did not take it. They are told again when they are settled."""
        results = await asyncio.gather(
            *(self._calls.call(info, lambda host: host.set_view(view)) for info in infos), return_exceptions=True
        )
        failed = {
            info: result for info, result in zip(infos, results, strict=True) if isinstance(result, BaseException)
        }
        if failed:
            self.untold()
        return failed

    async def confirm(self, request: AttachTable, infos: Sequence[ShardInfo]) -> None:
        """Make shards answer for tables that are made. Those that miss it are told when they are settled."""
        for number in range(_PUSH_TRIES):
            if number:
                await asyncio.sleep(_PUSH_PAUSE_S)
            results = await asyncio.gather(
                *(self._calls.call(info, lambda host: host.attach_table(request)) for info in infos),
                return_exceptions=True,
            )
            infos = [info for info, result in zip(infos, results, strict=True) if isinstance(result, BaseException)]
            if not infos:
                return
        self.untold()
        _LOG.warning(
            "table %r of pool %s is made; shard %s does not know it yet, and is told again",
            request.view.schema.name,
            self._pool,
            ", ".join(str(info.shard) for info in infos),
        )

    def untold(self) -> None:
        """Some shard did not hear what it was told: it is settled again."""
        self.missed = True
        self._misses += 1
