"""Says to shards that this process is alive, while they hold anything for it; an idle client sends nothing.

What is held is its owner's to know (``Holdings``); a lease that ended all the same is found, and told of, by the step.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from mempool.client.routing.router import Router
from mempool.errors import MempoolError
from mempool.types import HeartbeatRequest, ShardInfo
from mempool.types.running import TRAINER_LEASE_S

_FIRST_LEASE_S = TRAINER_LEASE_S  # until a shard has said how long it is
_LEAST_LEASE_S = 1.0  # that a pool may have
_SHORTEST_S = 0.05
_AT_ONCE = 64

Rank = tuple[str, int]
Holdings = Callable[[], Mapping[ShardInfo, set[Rank]]]


class Heartbeats:
    """The heartbeats of one client to the shards of its pool: one task, while anything is held.

    Args:
        router: Reaches the shards.
        holdings: Which ranks of this process hold anything, by shard.

    Attributes:
        lease_s: How long a shard keeps what it holds for a rank that is silent.
    """

    def __init__(self, router: Router, holdings: Holdings) -> None:
        self.lease_s = _FIRST_LEASE_S
        self._router = router
        self._holdings = holdings
        self._task: asyncio.Task[None] | None = None
        self._answered_s: dict[int, float] = {}
        self._silences: dict[int, float] = {}
        self._began_s = 0.0
        self._closed = False
        self._learnt = False
        self._asleep = True

    def wake_from(self, loop: asyncio.AbstractEventLoop) -> None:
        """As ``wake``, of any thread; ``loop`` is the one that they are on."""
        if self._asleep and not self._closed:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.wake)

    def wake(self) -> None:
        """Something may be held from now on."""
        if self._closed or (self._task is not None and not self._task.done()):
            return
        self._answered_s.clear()
        self._silences.clear()
        self._began_s = asyncio.get_running_loop().time()
        self._task = asyncio.get_running_loop().create_task(self._beat())
        self._asleep = False

    def silence_s(self, shard: int) -> float:
        """The longest time for which this process was not heard of at a shard, as far as it knows; the last one too."""
        now_s = asyncio.get_running_loop().time()
        return max(self._silences.pop(shard, 0.0), now_s - self._answered_s.get(shard, self._began_s))

    async def close(self) -> None:
        """Say nothing any more."""
        self._closed = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})

    async def _beat(self) -> None:
        at_once, loop = asyncio.Semaphore(_AT_ONCE), asyncio.get_running_loop()
        last_s = loop.time()
        while True:
            # From one beat to the next, whatever the beat took: a shard that hangs does not make others wait. The first
            # comes soon, to learn how long the lease is.
            pause_s = max(_SHORTEST_S, (self.lease_s if self._learnt else min(_LEAST_LEASE_S, self.lease_s)) / 3)
            await asyncio.sleep(max(0.0, last_s + pause_s - loop.time()))
            last_s = loop.time()
            self._asleep = True  # what a thread adds from here on it says, as this may not see it
            holdings = self._holdings()
            if not holdings:
                return
            self._asleep = False
            beats = [self._say(info, rank, pause_s, at_once) for info, ranks in holdings.items() for rank in ranks]
            leases = [lease_s for lease_s in await asyncio.gather(*beats) if lease_s is not None and lease_s > 0.0]
            self.lease_s = min(leases, default=self.lease_s)
            self._learnt = self._learnt or bool(leases)

    async def _say(self, info: ShardInfo, rank: Rank, timeout_s: float, at_once: asyncio.Semaphore) -> float | None:
        """The lease, as the shard says; None where it does not answer in time: calls of the step find out why."""
        request = HeartbeatRequest(incarnation=info.incarnation, group=rank[0], rank=rank[1])
        try:
            async with at_once, asyncio.timeout(timeout_s):
                reply = await self._router.dial(info).heartbeat(request)
        except (MempoolError, TimeoutError):
            return None
        now_s = asyncio.get_running_loop().time()
        silence_s = now_s - self._answered_s.get(info.shard, self._began_s)
        self._silences[info.shard] = max(silence_s, self._silences.get(info.shard, 0.0))
        self._answered_s[info.shard] = now_s
        return reply.lease_s
