"""Time and threads, as they are handed to whatever measures a lease, waits, or works where it holds nobody up.

Production hands in ``time.monotonic`` and ``Threads``; a test that runs a whole pool on a seed hands in its own.
"""

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol, TypeVar

T = TypeVar("T")

Clock = Callable[[], float]
"""Seconds, monotonic, from any beginning."""
Turn = Callable[[], float | None]
"""Does one thing, and answers how many seconds may pass until it is called again unasked (inf: none); None: the end."""
ONLY_WHEN_RUNG = float("inf")
TRAINER_LEASE_S = 10.0
"""Silence of a trainer after which it is taken for dead, where nothing else is said: what it holds is dropped."""


class Worker(Protocol):
    """Takes turns, one at a time: one for each ring, and one whenever the time is over that the last turn gave."""

    def ring(self) -> None:
        """There is something to do. From any thread."""

    async def join(self) -> None:
        """Wait for the end."""


class Runner(Protocol):
    """Where work runs that must not hold up an event loop."""

    async def run(self, work: Callable[[], T], *, name: str = "") -> T:
        """The result of ``work``, done elsewhere. ``name``: on a thread of its own, so called, as it may take long."""

    def worker(
        self, turn: Turn, *, name: str, within: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> Worker:
        """Somebody who takes turns, from now on. ``within``: in what they are taken; ``turn`` raises nothing."""


class Threads:
    """The runner of production: a thread for each worker, asyncio's own for what is short."""

    async def run(self, work: Callable[[], T], *, name: str = "") -> T:
        if not name:
            return await asyncio.to_thread(work)
        done: Future[T] = Future()
        threading.Thread(target=_finish, args=(work, done), name=name, daemon=True).start()
        return await asyncio.wrap_future(done)

    def worker(
        self, turn: Turn, *, name: str, within: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> Worker:
        return _WorkerThread(turn, name=name, within=within)


THREADS: Runner = Threads()


async def to_its_end(work: Awaitable[T]) -> T:
    """The result of what runs elsewhere. Whoever is cancelled, once or again, waits for its end all the same: a file is
    written by one at a time."""
    working = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not working.cancelled():
            working.exception()  # nobody asks for it any more
        raise cancelled
    return working.result()


class _WorkerThread:
    """A worker that is a thread."""

    def __init__(self, turn: Turn, *, name: str, within: Callable[[], AbstractContextManager[object]]) -> None:
        self._turn = turn
        self._within = within
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def ring(self) -> None:
        self._bell.put(None)

    async def join(self) -> None:
        await asyncio.shield(asyncio.wrap_future(self._ended))
        self._thread.join()

    def _work(self) -> None:
        with self._within():
            wait_s: float | None = ONLY_WHEN_RUNG
            while wait_s is not None:
                with suppress(queue.Empty):
                    self._bell.get(timeout=None if wait_s == ONLY_WHEN_RUNG else max(0.0, wait_s))
                wait_s = self._turn()
        self._ended.set_result(None)


def _finish(work: Callable[[], T], done: "Future[T]") -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
