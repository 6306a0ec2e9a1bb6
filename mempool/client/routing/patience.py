"""The deadline of calls on shards of this process: one that is at work is not away, so it has time; and it is said.

What takes it long is a kernel's first use, above all: compiling never counts against a call's deadline.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

_LOG = logging.getLogger("mempool")

LONGEST_WORK_S = 600.0
"""How long a call waits at most for a shard that is at work, where its own deadline is earlier."""
# Work that takes longer than this is said.
_QUIET_S = 2.0
# How often a shard that is at work is looked at, and how often it must be found idle: between two jobs it is, shortly.
_LOOK_S = 0.1
_IDLE_LOOKS = 2

WaitingFor = Callable[[], tuple[tuple[int, str], ...]]


class Patience:
    """Deadlines of the calls on one embedded pool.

    Args:
        pool: The pool, in a sentence.
        doing: What a shard is at just now; "" for nothing.
    """

    def __init__(self, pool: str, doing: Callable[[int], str]) -> None:
        self._pool = pool
        self._doing = doing
        self._said = False

    @asynccontextmanager
    async def timeout(self, timeout_s: float, waiting_for: WaitingFor) -> AsyncIterator[None]:
        """As ``asyncio.timeout``, but not while one of the shards waited for is at work. On their loop.

        waiting_for: Gives (shard, address) of those that were asked and have not answered.
        """
        async with asyncio.timeout(None) as bound:
            watch = _Watch(self, timeout_s, waiting_for, bound)
            try:
                yield
            finally:
                watch.end()

    def at_work(self, waiting_for: WaitingFor, spent_s: float) -> bool:
        """Whether a shard that is waited for is at work."""
        doing = next(filter(None, (self._doing(shard) for shard, _ in waiting_for())), "")
        if doing:
            self._say(doing, spent_s)
        return bool(doing)

    def _say(self, doing: str, spent_s: float) -> None:
        if spent_s >= _QUIET_S and not self._said:
            self._said = True
            _LOG.warning(
                "%s: a call has taken %.1f s so far: %s. The first use of a kernel compiles it; the next process finds "
                "it on disk",
                self._pool,
                spent_s,
                doing,
            )


class _Watch:
    """Looks at one call now and then, and ends it. Only its timer knows it, so the call's objects go with the call."""

    def __init__(self, patience: Patience, timeout_s: float, waiting_for: WaitingFor, bound: asyncio.Timeout) -> None:
        self._clock = asyncio.get_running_loop()
        self._began_s = self._clock.time()
        self._timeout_s = timeout_s
        self._idle_looks = 0
        self._about = (patience, waiting_for, bound)
        self._timer = self._clock.call_later(min(timeout_s, _QUIET_S), self._look)

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        patience, waiting_for, bound = self._about
        spent_s = self._clock.time() - self._began_s
        at_work = patience.at_work(waiting_for, spent_s)
        next_s = self._timeout_s
        if spent_s >= self._timeout_s:
            self._idle_looks = 0 if at_work else self._idle_looks + 1
            if spent_s >= max(self._timeout_s, LONGEST_WORK_S) or self._idle_looks == _IDLE_LOOKS:
                bound.reschedule(self._clock.time())
                return
            next_s = spent_s + _LOOK_S
        self._timer = self._clock.call_at(self._began_s + next_s, self._look)
