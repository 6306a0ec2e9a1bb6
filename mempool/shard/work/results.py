"""What comes of jobs, and where it goes: to a loop that awaits it, to a thread that waits itself, or to who is told."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Tell = Callable[[Any, BaseException | None], None]
"""Is given the result of a job, or why there is none, on whatever thread has it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job, or of a piece of it; more: there are further pieces."""

    result: Any = None
    failure: BaseException | None = None
    more: bool = False


class Awaited:
    """A job's result on its way to the loop that waits for it."""

    __slots__ = ("_loop", "future")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()

    def give(self, value: Any) -> None:
        self._send(value, None)

    def fail(self, error: BaseException) -> None:
        self._send(None, error)

    def _send(self, value: Any, error: BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(_settle, self.future, value, error)
        except RuntimeError:
            return  # the loop is closed, and so nobody waits


class Handed:
    """A job's result on its way to a thread that waits for it."""

    __slots__ = ("_error", "_here", "_value")

    def __init__(self) -> None:
        self._here = threading.Lock()
        self._here.acquire()
        self._value: Any = None
        self._error: BaseException | None = None

    def give(self, value: Any) -> None:
        self._value = value
        self._here.release()

    def fail(self, error: BaseException) -> None:
        self._error = error
        if self._here.locked():  # a thread that ends may tell one that has its answer
            self._here.release()

    def wait(self, timeout_s: float) -> Any:
        """The result, None where it does not come in time. Raises what the job raised."""
        if not self._here.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            return None
        if self._error is not None:
            raise self._error
        return self._value


class Told:
    """A job's result for somebody who goes on meanwhile."""

    __slots__ = ("_tell",)

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def give(self, value: Any) -> None:
        self._tell(value, None)

    def fail(self, error: BaseException) -> None:
        self._tell(None, error)


def _settle(future: "asyncio.Future[Any]", value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def bare(error: BaseException) -> BaseException:
    """The error without the frames it went through, and without what it came from: they hold the request."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
