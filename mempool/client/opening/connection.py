"""What a pool, its tables and the graphs of their gathers share: the router, the controller, the wait for the IO loop.

Ends once: when it is closed, or when the last of them is gone.
"""

import math
import os
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from mempool.client.direct.asking import Asking, DialAtOnce
from mempool.client.routing.fanout import Dial
from mempool.client.routing.router import Router
from mempool.client.routing.tries import Tries
from mempool.client.routing.whereabouts import Whereabouts
from mempool.client.training.coordinator import Coordinator
from mempool.errors import InvalidRequest
from mempool.types import PoolApi
from mempool.wire.channels import loop

T = TypeVar("T")

# Deadlines are kept on the loop; this only ends a wait for a loop that is stuck.
_STUCK_S = 30.0
_LONGEST_TIMEOUT_S = 1e9
# How long the end waits for shards that have not heard yet of what was committed: they learn of it by themselves too.
_TELLING_S = 5.0


def checked_timeout(timeout_s: object) -> float:
    """A deadline in seconds. Raises InvalidRequest unless it is a number above 0 that ends some day."""
    try:
        seconds = math.nan if isinstance(timeout_s, bool | str) else float(timeout_s)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0.0 < seconds <= _LONGEST_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout_s = {timeout_s!r}: must be above 0 seconds, and at most {_LONGEST_TIMEOUT_S:.0e}."
        )
    return seconds


class Connection:
    """A way to a pool, as its ``Pool`` and its tables hold it. They know it, and it knows none of them.

    Args:
        api: The controller, or what stands for it; closed with the connection.
        dial: Gives the host of a shard, without waiting.
        where: The pool, for messages.
        timeout_s: Deadline of a call that names none, seconds.
        on_close: Awaited when the connection ends, after everything else.
        dial_at_once: Gives the way to a shard for threads that wait themselves; None: there is none.

    Attributes:
        direct: Calls that go this way; None: there are none.
    """

    def __init__(
        self,
        api: PoolApi,
        dial: Dial,
        *,
        where: Whereabouts,
        timeout_s: float,
        on_close: Callable[[], Awaitable[None]] | None = None,
        dial_at_once: DialAtOnce | None = None,
    ) -> None:
        timeout_s = checked_timeout(timeout_s)
        self.api = api
        self.where = where
        self.timeout_s = timeout_s
        self.router = Router(api, dial=dial, pool=where, timeout_s=timeout_s)
        self.coordinator = Coordinator(self.router)
        self.direct: Asking | None = None
        if dial_at_once is not None:
            self.direct = Asking(self.router, dial_at_once, loop=loop.io_loop(), here=where.embedded)
        self._on_close = on_close
        self._lock = threading.Lock()
        self._closed = False
        self._abandoned = weakref.finalize(self, _abandon, os.getpid(), where, self._ending(api))
        self._abandoned.atexit = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def tries(self) -> Tries:
        return self.router.tries

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine that keeps to the connection's deadline itself, or waits for the ranks of a group."""
        waits = self.coordinator.group is not None or self.coordinator.found is not None
        return self._wait(coroutine, None if waits else self.timeout_s + _STUCK_S)

    def run_long(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine that has no deadline."""
        return self._wait(coroutine, None)

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> loop.Begun[T]:
        """Begin a coroutine that keeps to the connection's deadline itself; it is waited for later."""
        if self._closed:
            coroutine.close()
            raise InvalidRequest(self.where.closed)
        return loop.begin(coroutine, timeout_s=self.timeout_s + _STUCK_S)

    def close(self) -> None:
        """End it, and wait for that. Repeatable."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._abandoned.detach()
        loop.run(self._ending(self.api).end(), timeout_s=self.timeout_s + _STUCK_S)

    def _ending(self, api: PoolApi) -> "_Ending":
        return _Ending(self.coordinator, self.router, api, self._on_close, self.timeout_s)

    def _wait(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        if self._closed:
            coroutine.close()
            raise InvalidRequest(self.where.closed)
        return loop.run(coroutine, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class _Ending:
    """All that a connection gives back; knows nothing of the connection itself."""

    coordinator: Coordinator
    router: Router
    api: PoolApi
    on_close: Callable[[], Awaitable[None]] | None
    timeout_s: float

    async def end(self) -> None:
        await self.coordinator.close(timeout_s=min(self.timeout_s, _TELLING_S))
        self.router.close()
        try:
            await self.api.close()
        finally:
            if self.on_close is not None:
                await self.on_close()


def _abandon(pid: int, where: Whereabouts, ending: _Ending) -> None:
    """Nobody can close the connection any more: end it, without waiting, for this may run on any thread."""
    if pid != os.getpid():
        return  # a fork's copy: what it stands for lives in the parent
    try:
        loop.start(ending.end())
    finally:
        warnings.warn(f"{where.pool} was not closed: use it with `with`, or close() it", ResourceWarning, stacklevel=2)
