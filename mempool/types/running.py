"""Time and threads, as they are handed to whatever measures a lease, waits, or works where it holds nobody up.

Production hands in ``time.monotonic`` and ``Threads``; a test that runs a whole pool on a seed hands in its own.
"""

import asyncio
import atexit
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from types import CodeType, FrameType
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
CallT = TypeVar("CallT", bound=Callable[..., Any])

Clock = Callable[[], float]
"""Seconds, monotonic, from any beginning."""
Turn = Callable[[], float | None]
"""Does one thing, and answers how many seconds may pass until it is called again unasked (inf: none); None: the end."""
ONLY_WHEN_RUNG = float("inf")
TRAINER_LEASE_S = 10.0
"""Silence of a trainer after which it is taken for dead, where nothing else is said: what it holds is dropped."""


class Latch:
    """Is set once; threads wait for that. As ``threading.Event``, but that an interrupt of one who waits takes nothing
    with it: an event's lock is taken by Python code, which may be cut off once it has it, and whoever sets the event,
    an IO loop say, would wait for that for ever."""

    __slots__ = ("_is_set", "_waiting")

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: deque[threading.Lock] = deque()  # each one's own, taken until it is set

    @property
    def is_set(self) -> bool:
        """Whether it is."""
        return self._is_set

    def set(self) -> None:
        """Never waits. By one thread alone; repeatable."""
        self._is_set = True
        with suppress(IndexError):
            while True:
                self._waiting.popleft().release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is set within so many seconds; None: without end."""
        own = threading.Lock()
        own.acquire()
        self._waiting.append(own)
        try:
            if not self._is_set:  # else whoever sets it may not have seen this one
                own.acquire(timeout=-1 if timeout_s is None else max(0.0, min(timeout_s, threading.TIMEOUT_MAX)))
        finally:
            if not self._is_set:
                with suppress(ValueError, IndexError):  # it is set just now
                    self._waiting.remove(own)
        return self._is_set


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


_holding: set[CodeType] = set()


def holds_others_up(function: CallT) -> CallT:
    """Mark a function that others wait for: what a signal's handler does within it must not wait for them."""
    _holding.add(function.__code__)
    return function


def has_interrupted_one() -> bool:
    """Whether this is a signal's handler that has interrupted such a function of its own thread.

    Its stack is asked, not what was noted: an interrupt can come before anything is noted, or taken back.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in _holding:
        frame = frame.f_back
    return frame is not None


_LEAVING_S = 5.0


class _WorkerThread:
    """A worker that is a thread. When the interpreter ends it takes no more turns, and the one under way is waited for:
    Python would end a thread in the middle of compiled code, which C++ answers by ending the process with an error."""

    def __init__(self, turn: Turn, *, name: str, within: Callable[[], AbstractContextManager[object]]) -> None:
        self._turn = turn
        self._within = within
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ended: Future[None] = Future()
        self._leaving = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        _at_exit()
        _workers.add(self)
        self._thread.start()

    def ring(self) -> None:
        self._bell.put(None)

    def leave(self) -> None:
        """Take no more turns."""
        self._leaving = True
        self.ring()

    def left(self, timeout_s: float) -> None:
        """Waits for the turn that is under way, so long at most."""
        self._thread.join(timeout_s)

    async def join(self) -> None:
        await asyncio.shield(asyncio.wrap_future(self._ended))
        self._thread.join()

    def _work(self) -> None:
        with self._within():
            wait_s: float | None = ONLY_WHEN_RUNG
            while wait_s is not None:
                with suppress(queue.Empty):
                    self._bell.get(timeout=None if wait_s == ONLY_WHEN_RUNG else max(0.0, wait_s))
                if self._leaving:
                    return
                wait_s = self._turn()
        self._ended.set_result(None)


_workers: "weakref.WeakSet[_WorkerThread]" = weakref.WeakSet()


@cache
def _at_exit() -> None:
    """Not before the first worker: who tells others of its results, as an event loop, is there then, and ends after."""
    atexit.register(_leave)


def _leave() -> None:
    workers = tuple(_workers)
    for worker in workers:
        worker.leave()
    end_s = time.monotonic() + _LEAVING_S
    for worker in workers:
        worker.left(max(0.0, end_s - time.monotonic()))


def _finish(work: Callable[[], T], done: "Future[T]") -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
