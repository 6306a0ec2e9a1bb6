"""Work that is done before anybody asks for its result: by one thread of the process, first come, first served."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from mempool.types.running import ONLY_WHEN_RUNG, THREADS

T = TypeVar("T")


class Ahead(Generic[T]):
    """The result of some work. It is done elsewhere, from now on, in its turn.

    Args:
        work: What is to be done; nobody sees its errors.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done: Future[T] = Future()
        _helper(os.getpid()).take(self)

    def result(self) -> T | None:
        """Waits for what is being done. None where it was not begun, and is not any more, or has failed."""
        if self._done.cancel():
            return None
        return None if self._done.exception() is not None else self._done.result()

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
        return ONLY_WHEN_RUNG


@cache
def _helper(pid: int) -> _Helper:  # noqa: ARG001 - tells one process's from another's
    return _Helper()
