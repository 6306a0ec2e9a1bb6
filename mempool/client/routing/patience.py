"""Calls that last: who looks at them, by one timer for all, and ends them. Most are over long before anybody looks.

A shard of this process that is at work is not away, so it has more time than a call's deadline; and it is said. What
takes it long is a kernel's first use, above all: compiling never counts against a call's deadline.
"""

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

_LOG = logging.getLogger("mempool")

LONGEST_WORK_S = 600.0
"""How long a call waits at most for a shard that is at work, where its own deadline is earlier."""
# Work that takes longer than this is said.
_QUIET_S = 2.0
# How often a shard that is at work is looked at, and how often it must be found idle: between two jobs it is, shortly.
_LOOK_S = 0.1
_IDLE_LOOKS = 2

WaitingFor = Callable[[], tuple[tuple[int, str], ...]]


class Watchdog:
    """Looks at what is watched when its time has come. On one loop at a time."""

    def __init__(self) -> None:
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, watched: "Watched") -> None:
        """From now on, until it is removed."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what another one ran has ended with it
            self._loop, self._timer, self._watched = loop, None, set()
        self._watched.add(watched)
        if self._timer is None or watched.at_s < self._timer.when():
            self._set(watched.at_s)

    def remove(self, watched: "Watched") -> None:
        self._watched.discard(watched)

    def close(self) -> None:
        """Look at nothing any more, unless something is added."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, at_s: float) -> None:
        self.close()
        self._timer = asyncio.get_running_loop().call_at(at_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        for watched in sorted((each for each in self._watched if each.at_s <= now_s), key=_when):
            again_s = watched.look(now_s)
            if again_s is None:
                self._watched.discard(watched)
            else:
                watched.at_s = again_s
        if self._watched:
            self._set(min(each.at_s for each in self._watched))


class Watched:
    """A context that the task within can be cut off from, with TimeoutError: as ``asyncio.timeout``, but without a
    timer of its own.

    Args:
        watchdog: Looks at it.
        at_s: When, on the loop's clock.

    Attributes:
        is_cut: Whether it was cut off.
    """

    __slots__ = ("_cancelling", "_task", "_watchdog", "at_s", "is_cut")

    def __init__(self, watchdog: Watchdog, at_s: float) -> None:
        self.at_s = at_s
        self.is_cut = False
        self._watchdog = watchdog

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a coroutine of a loop is run by a task"
        self._task: asyncio.Task[object] | None = task
        self._cancelling = task.cancelling()
        self._watchdog.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._watchdog.remove(self)
        task, self._task = self._task, None
        if self.is_cut and task is not None:
            left = task.uncancel()
            if left <= self._cancelling and kind is not None and issubclass(kind, asyncio.CancelledError):
                raise TimeoutError from error

    def cut(self) -> None:
        """End what is within."""
        if self._task is not None and not self.is_cut:
            self.is_cut = True
            self._task.cancel()

    @abstractmethod
    def look(self, now_s: float, /) -> float | None:
        """What is to be done about it, as it lasts; when to look again, None: not at all."""


def _when(watched: Watched) -> float:
    return watched.at_s


class Deadline(Watched):
    """Ends a call when its time is over: but, where there is patience, not while a shard that it waits for is at work.

    Args:
        began_s: When the call began, on the loop's clock.
        waiting_for: Gives (shard, address) of those that were asked and have not answered.
        patience: With shards of this process; None: of others nobody knows what they are at.
    """

    __slots__ = ("_began_s", "_idle_looks", "_patience", "_timeout_s", "_waiting_for")

    def __init__(
        self,
        watchdog: Watchdog,
        timeout_s: float,
        *,
        began_s: float,
        waiting_for: WaitingFor = tuple,
        patience: "Patience | None" = None,
    ) -> None:
        first_s = timeout_s if patience is None else min(timeout_s, _QUIET_S)
        super().__init__(watchdog, began_s + first_s)
        self._began_s = began_s
        self._timeout_s = timeout_s
        self._waiting_for = waiting_for
        self._patience = patience
        self._idle_looks = 0

    def look(self, now_s: float, /) -> float | None:
        spent_s = now_s - self._began_s
        at_work = self._patience is not None and self._patience.at_work(self._waiting_for, spent_s)
        if spent_s < self._timeout_s:
            return self._began_s + self._timeout_s
        self._idle_looks = 0 if at_work else self._idle_looks + 1
        looks = 1 if self._patience is None else _IDLE_LOOKS
        if spent_s >= max(self._timeout_s, LONGEST_WORK_S) or self._idle_looks == looks:
            self.cut()
            return None
        return now_s + _LOOK_S


class Silence(Watched):
    """Looks, once a call lasts, whether what it goes by is still right, and cuts it off where it is not.

    A host that is gone sends no error. Where its shard lives again elsewhere the view says so, long before any
    connection notices.

    Args:
        every_s: After so much silence, and again after as much more.
        check: Raises where it is not right any more.

    Attributes:
        found: What that raised.
    """

    __slots__ = ("_check", "_every_s", "_looking", "found")

    def __init__(self, watchdog: Watchdog, *, every_s: float, check: Callable[[], Awaitable[None]]) -> None:
        super().__init__(watchdog, asyncio.get_running_loop().time() + every_s)
        self._every_s = every_s
        self._check = check
        self._looking: asyncio.Task[None] | None = None
        self.found: Exception | None = None

    def look(self, _: float, /) -> None:
        self._looking = asyncio.get_running_loop().create_task(self._look_again())

    async def end(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look_again(self) -> None:
        while True:
            try:
                await self._check()
            except Exception as error:  # also one that is none of ours: whoever waits is told
                self.found = error
                self.cut()
                return
            await asyncio.sleep(self._every_s)


class Patience:
    """With the shards of one embedded pool.

    Args:
        pool: The pool, in a sentence.
        doing: What a shard is at just now; "" for nothing.
    """

    def __init__(self, pool: str, doing: Callable[[int], str]) -> None:
        self._pool = pool
        self._doing = doing
        self._said = False

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
