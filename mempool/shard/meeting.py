"""Carries out what ``mempool.agreement.groups`` says: ranks that wait for each other wait here, on the event loop.

The engine's thread has nothing to do with it: a shard that is at work is the home of groups all the same.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

from mempool.agreement.groups.home import Groups
from mempool.shard.bounds import check_rank
from mempool.shard.parking import LONGEST_WAIT_S
from mempool.types.groups.meeting import MeetReply, MeetRequest
from mempool.types.running import Clock

_LEAST_WAIT_S = 0.01


class Meetings:
    """The groups whose home a shard is.

    Args:
        lease_s: Silence after which a rank is taken for dead.
        clock: Seconds, monotonic.
        wall_s: Seconds since 1970: what generations of groups that nothing is known of are told by.
        incarnation: Of the shard.
    """

    def __init__(self, *, lease_s: float, clock: Clock, wall_s: Clock = time.time, incarnation: int = 0) -> None:
        self._incarnation = incarnation
        self._groups = Groups(lease_s=lease_s)
        self._lease_s = lease_s
        self._clock = clock
        self._looked_s = clock()
        self._paused_s = 0.0
        self._wall_s = wall_s
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}  # in the order in which they came

    async def meet(self, request: MeetRequest) -> MeetReply:
        """See ``Shard``."""
        return replace(await self._met(request), home=self._incarnation)

    async def _met(self, request: MeetRequest) -> MeetReply:
        check_rank(request.group, request.rank)
        came_s = self._now_s()
        end_s = came_s + LONGEST_WAIT_S
        while True:
            now_s, before = self._now_s(), self._groups.changes(request.group)
            reply = self._groups.handle(request, now_s, heard_s=came_s, first_generation=int(self._wall_s() * 1000.0))
            if self._groups.changes(request.group) != before:
                self._wake(request.group)
            if reply is not None:
                return reply
            if now_s >= end_s:
                return self._groups.waiting(request, now_s)
            await self._changed(request.group, min(end_s - now_s, self._groups.next_s(request.group, now_s)))

    def _now_s(self) -> float:
        """The clock, which stands still while nobody is heard for long: whoever lives is heard at a third of the lease,
        so it was this process that was paused, and ranks were not silent."""
        now_s = self._clock()
        self._paused_s += max(0.0, now_s - self._looked_s - self._lease_s / 2)
        self._looked_s = now_s
        return now_s - self._paused_s

    def _wake(self, group: str) -> None:
        for future in self._waiting.pop(group, ()):
            if not future.done():
                future.set_result(None)

    async def _changed(self, group: str, longest_s: float) -> None:
        """Until somebody of the group has said anything, or so long."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, {})[future] = None
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(_LEAST_WAIT_S, longest_s)):
                    await future
        finally:
            waiting = self._waiting.get(group)
            if waiting is not None:
                waiting.pop(future, None)
                if not waiting:
                    del self._waiting[group]
