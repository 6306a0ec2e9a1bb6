"""Calls that last: who looks at them, by one timer for all, and ends them. Most are over long before anybody looks.

A shard of this process that is at work is not away, so it has more time than a call's deadline; and it is said. What
takes it long is a kernel's first use, above all: compiling never counts against a call's deadline.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from math import inf
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
    """Looks at calls that last when it is time to. On one loop at a time."""

    def __init__(self) -> None:
        self._watched: set[Deadline] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, deadline: "Deadline") -> None:
        """From now on, until it is removed."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what another one ran has ended with it
            self._loop, self._timer, self._watched = loop, None, set()
        self._watched.add(deadline)
        if self._timer is None or deadline.at_s < self._timer.when():
            self._set(deadline.at_s)

    def remove(self, deadline: "Deadline") -> None:
        self._watched.discard(deadline)

    def look_at(self, deadline: "Deadline", at_s: float) -> None:
        """Then at the latest."""
        if at_s < deadline.at_s:
            deadline.at_s = at_s
            self.add(deadline)

    def _set(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        for deadline in sorted((each for each in self._watched if each.at_s <= now_s), key=lambda each: each.at_s):
            again_s = deadline.look(now_s)
            if again_s is None:
                self._watched.discard(deadline)
            else:
                deadline.at_s = again_s
        if self._watched:
            self._set(min(each.at_s for each in self._watched))


class Deadline:
    """A context that ends a call, with TimeoutError, when its time is over: as ``asyncio.timeout``, without a timer of
    its own. Where there is patience, not while a shard that it waits for is at work.

    While shards keep silent it looks whether what the call goes by is still right, and cuts it off where it is not. A
    host that is gone sends no error. Where its shard lives again elsewhere the view says so, long before any connection
    notices.

    Args:
        watchdog: Looks at it.
        began_s: When the call began, on the loop's clock.
        waiting_for: Gives (shard, address) of those that were asked and have not answered.
        patience: With shards of this process; None: of others nobody knows what they are at.
        check: Raises where what the call goes by is not right any more.
        silence_s: After so much silence, and again after as much more.

    Attributes:
        at_s: When it is looked at next.
    """

    __slots__ = (
        "_began_s",
        "_cancelling",
        "_check",
        "_checking",
        "_found",
        "_idle_looks",
        "_is_over",
        "_patience",
        "_silence_s",
        "_silent_at_s",
        "_task",
        "_timeout_s",
        "_waiting_for",
        "_watchdog",
        "at_s",
    )

    def __init__(
        self,
        watchdog: Watchdog,
        timeout_s: float,
        *,
        began_s: float,
        waiting_for: WaitingFor = tuple,
        patience: "Patience | None" = None,
        check: Callable[[], Awaitable[None]] | None = None,
        silence_s: float = inf,
    ) -> None:
        self._watchdog = watchdog
        self._began_s = began_s
        self._timeout_s = timeout_s
        self._waiting_for = waiting_for
        self._patience = patience
        self._check = check
        self._silence_s = silence_s
        self._silent_at_s = began_s + silence_s
        self._checking: asyncio.Task[None] | None = None
        self._found: Exception | None = None
        self._idle_looks = 0
        self._is_over = False
        first_s = timeout_s if patience is None or timeout_s < _QUIET_S else _QUIET_S
        self.at_s = began_s + (first_s if first_s < silence_s else silence_s)

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a coroutine of a loop is run by a task"
        self._task: asyncio.Task[object] | None = task
        self._cancelling = task.cancelling()
        self._watchdog.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._watchdog.remove(self)
        self.found()
        is_late = self._is_over and self._is_ours() and kind is not None and issubclass(kind, asyncio.CancelledError)
        self._task = None
        if is_late:
            raise TimeoutError from error

    def found(self) -> Exception | None:
        """Within, when a try has ended: what ``check`` has raised, where that cut it off and nobody else has; the call
        may then go on, also where the try ended with something else at that moment."""
        found, self._found = self._found, None
        return found if found is not None and self._is_ours() else None

    async def begin(self) -> None:
        """What the call goes by is new: only from now on it may get old."""
        await self.rest()
        self._silent_at_s = asyncio.get_running_loop().time() + self._silence_s
        if not self._is_over:
            self._watchdog.look_at(self, self._silent_at_s)

    @property
    def is_checking(self) -> bool:
        """Whether it does now."""
        return self._checking is not None

    async def rest(self) -> None:
        """Check nothing any more."""
        checking, self._checking = self._checking, None
        if checking is not None:
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)

    def look(self, now_s: float) -> float | None:
        """Do what is to be done, as it lasts. Answers when to look again; None: not at all."""
        if now_s >= self._silent_at_s:
            self._silent_at_s = inf
            self._checking = asyncio.get_running_loop().create_task(self._keep_checking())
        spent_s, end_s = now_s - self._began_s, self._began_s + self._timeout_s
        at_work = self._patience is not None and self._patience.at_work(self._waiting_for, spent_s)
        if now_s < end_s:  # as is looked at then: ``spent_s`` may round to less than ``timeout_s``
            return min(end_s, self._silent_at_s)
        self._idle_looks = 0 if at_work else self._idle_looks + 1
        looks = 1 if self._patience is None else _IDLE_LOOKS
        if spent_s >= max(self._timeout_s, LONGEST_WORK_S) or self._idle_looks >= looks:
            self._is_over = True
            self._cut()
            return None
        return min(now_s + _LOOK_S, self._silent_at_s)

    def _cut(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _is_ours(self) -> bool:
        """Take the cancellation back. Whether nobody else has cancelled the task as well."""
        return self._task is not None and self._task.uncancel() <= self._cancelling

    async def _keep_checking(self) -> None:
        assert self._check is not None
        while True:
            try:
                await self._check()
            except Exception as error:  # also one that is none of ours: whoever waits is told
                self._found = error
                self._cut()
                return
            await asyncio.sleep(self._silence_s)


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
