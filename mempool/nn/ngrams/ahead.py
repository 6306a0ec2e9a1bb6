"""Work that is done before anybody asks for its result: by one thread of the process, first come, first served."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from queue import Empty, SimpleQueue
from typing import Generic, Self, TypeVar

from mempool.types.running import ONLY_WHEN_RUNG, THREADS, has_interrupted_one

T = TypeVar("T")


class Ahead(Generic[T]):
    """The result of some work. It is done elsewhere, from now on, in its turn.

    Args:
        work: What is to be done; nobody sees its errors.
        never: Called where it will not be done.
    """

    def __init__(self, work: Callable[[], T], *, never: Callable[[], object] | None = None) -> None:
        self._work = work
        self._never = never
        self._pid = os.getpid()
        self._done: Future[T] = Future()
        _helper(self._pid).take(self)

    @classmethod
    def of(cls, result: T) -> Self:
        """What is done already."""
        done = cls.__new__(cls)
        done._pid, done._done = os.getpid(), Future()
        done._done.set_result(result)
        return done

    def result(self) -> T | None:
        """Waits for what is being done. None where it was not begun, and is not any more, or has failed; in a process
        that was forked, as the thread is its parent's; and in a signal's handler that has interrupted what the thread
        may be waiting for."""
        return None if os.getpid() != self._pid or self.cancel() else self._waited()

    def begun(self) -> T | None:
        """As ``result``; but what was not begun will be."""
        if os.getpid() != self._pid or not (self._done.running() or self._done.done()) or self._done.cancelled():
            return None
        return self._waited()

    def _waited(self) -> T | None:
        if not self._done.done() and has_interrupted_one():
            return None
        return None if self._done.exception() is not None else self._done.result()

    def cancel(self) -> bool:
        """Whether it was not begun, and will not be any more."""
        was_done = self._done.cancelled()
        if not self._done.cancel():
            return False
        if not was_done and self._never is not None:
            self._never()
        return True

    def do(self) -> None:
        """For the thread."""
        if not self._done.set_running_or_notify_cancel():
            return
        try:
            self._done.set_result(self._work())
        except BaseException as error:
            self._done.set_exception(error)


class _Helper:
    """The thread and what it is to do. A process that was forked has none of its parent's."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Ahead[object]] = SimpleQueue()
        self._worker = THREADS.worker(self._turn, name="mempool-ngrams")

    def take(self, work: "Ahead[T]") -> None:
        self._waiting.put(work)  # type: ignore[arg-type]
        self._worker.ring()

    def _turn(self) -> float:
        with suppress(Empty):
            self._waiting.get_nowait().do()
        return ONLY_WHEN_RUNG if self._waiting.empty() else 0.0  # who was interrupted has not rung


@cache
def _helper(pid: int) -> _Helper:  # noqa: ARG001 - tells one process's from another's
    return _Helper()
