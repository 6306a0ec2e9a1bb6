"""Asks the shards of one plan on the caller's own thread: all of them, then for the answer of each."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from mempool.client.routing.router import Router
from mempool.errors import MempoolError
from mempool.types import AtOnceShard, ShardInfo

T = TypeVar("T")

DialAtOnce = Callable[[ShardInfo], AtOnceShard | None]
"""The way to a shard for threads that wait themselves; None where there is none now. Raises nothing."""
Wait = Callable[[], T | None]
Begin = Callable[[AtOnceShard], Wait[T] | None]
_LITTLE_S = 0.1
NARROW_END = 2**32
"""Slots of a table whose ids fit uint32."""


class Asking:
    """The calls of one client. Any thread of the process that made it may ask, but its event loop's.

    Args:
        router: What is known of tables and shards.
        dial: Leads to shards.
        loop: The one that all else of this client runs on.
        here: Shards are of this process: whoever waits for their answer makes it.
        patience_s: After so much silence of a shard the router is asked; it has half of a call's time at least.
    """

    def __init__(
        self,
        router: Router,
        dial: DialAtOnce,
        *,
        loop: asyncio.AbstractEventLoop,
        here: bool = False,
        patience_s: float = 5.0,
    ) -> None:
        self.router = router
        self.loop = loop
        self.here = here
        self.patience_s = min(patience_s, router.timeout_s / 2)
        self._dial = dial
        self._pid = os.getpid()

    def by(self, router: Router) -> "Asking":
        """The same by what another router knows, as one that reads at a version."""
        return Asking(router, self._dial, loop=self.loop, here=self.here, patience_s=self.patience_s)

    def left_s(self, began_s: float) -> float | None:
        """What the router has of the time of a call that was begun then, monotonic; None: all of it, or nearly."""
        spent_s = time.monotonic() - began_s
        return None if spent_s < _LITTLE_S else max(_LITTLE_S, self.router.timeout_s - spent_s)

    @property
    def possible(self) -> bool:
        """Whether this thread may ask so."""
        return self._pid == os.getpid() and asyncio._get_running_loop() is not self.loop

    def each(self, calls: Sequence[tuple[ShardInfo, Begin[T]]]) -> list[T | None]:
        """What shards answer, in the order of the calls. What fails, or is not asked any more, is None: the router
        finds out why."""
        begun: list[Wait[T]] = []
        answers: list[T | None] = []
        try:
            for info, begin in calls:
                shard = self._dial(info)
                wait = None if shard is None else self._begun(shard, begin)
                if wait is None:
                    break
                begun.append(wait)
        finally:
            # Of all that were asked: their answers come, whatever others say.
            try:
                answers += [self._waited(wait) for wait in begun]
            finally:
                wait = None
                begun.clear()  # an interrupt's traceback would keep those that are not waited for any more
        return answers + [None] * (len(calls) - len(answers))

    def one(self, info: ShardInfo, begin: Begin[T]) -> T | None:
        """The same of one shard."""
        try:
            shard = self._dial(info)
            wait = None if shard is None else begin(shard)
            return None if wait is None else wait()
        except MempoolError:
            return None

    @staticmethod
    def _begun(shard: AtOnceShard, begin: Begin[T]) -> Wait[T] | None:
        try:
            return begin(shard)
        except MempoolError:
            return None

    @staticmethod
    def _waited(wait: Wait[T]) -> T | None:
        try:
            return wait()
        except MempoolError:
            return None
