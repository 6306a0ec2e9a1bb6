"""The one asyncio loop of the process on which everything gRPC runs: grpc.aio bears only one loop a process.

Its thread starts at first use and ends with the interpreter. Leaves all else to the coroutines that run on it.
"""

import asyncio
import atexit
import copy
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, TypeVar

from mempool.errors import DeadlineExceeded, MempoolError
from mempool.types.running import Latch, has_interrupted_one

T = TypeVar("T")

_START_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 2.0


class IoLoop:
    """A loop and its thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.ended = False
        self._started = Latch()
        self.thread = threading.Thread(target=self._main, name="mempool-io", daemon=True)

    def start(self) -> None:
        """Starts the thread and waits until the loop runs."""
        self.thread.start()
        if not self._started.wait(_START_TIMEOUT_S):
            raise MempoolError(
                f"mempool's IO loop did not start within {_START_TIMEOUT_S:.0f} s: is the machine overloaded?"
            )

    def end(self) -> None:
        """Cancels what runs, ends the thread; waits for a bounded time only. Nothing else may be done with it then."""
        self.ended = True
        if self.pid != os.getpid() or not self.thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(_END_TIMEOUT_S)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._started.set)
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=_END_TIMEOUT_S / 2))
        self.loop.close()


class _Call(Generic[T]):
    """A coroutine that is handed over to the loop by a thread, which waits for its end.

    It can be cancelled from the moment it is handed over, whether or not it has begun. asyncio's own way there and back
    leads over two futures and their conditions, which are a good part of what a small call costs.
    """

    def __init__(self, coro: Coroutine[Any, Any, T]) -> None:
        self._coro = coro
        self._task: asyncio.Task[T] | None = None
        self._cancelled = False
        self._running = threading.Lock()
        self._running.acquire()

    @property
    def ended(self) -> bool:
        return not self._running.locked()

    def begin(self) -> None:
        """On the loop."""
        self._task = asyncio.get_running_loop().create_task(self._coro)
        self._task.add_done_callback(self._end)
        if self._cancelled:
            self._task.cancel()

    def cancel(self) -> None:
        """On the loop."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    def wait(self, timeout_s: float | None) -> bool:
        """Whether it has ended within so many seconds; None: without end."""
        if not self._running.acquire(timeout=-1 if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)):
            return False
        self._running.release()
        return True

    def result(self) -> T:
        """Once it has ended. Raises what it raised, asyncio.CancelledError where it was cancelled."""
        task, self._task = self._task, None
        assert task is not None
        try:
            return task.result()
        finally:
            del task  # it knows its error, and that this frame: they would end with a collection only

    def _end(self, _: asyncio.Task[T]) -> None:
        self._running.release()


class Begun(Generic[T]):
    """A coroutine that was handed over to the loop, and whose result any thread may ask for, as often as it likes.

    It goes on whether or not anybody waits for it, so it has to end by itself.

    Args:
        io: The loop.
        timeout_s: How long ``result`` waits; None: without end.
    """

    def __init__(self, io: IoLoop, timeout_s: float | None) -> None:
        self._io = io
        self._timeout_s = timeout_s
        self._task: asyncio.Task[T] | None = None
        self._value: T | None = None
        self._error: BaseException | None = None
        self._ended = Latch()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set

    def result(self) -> T:
        """What it answered; waits for that.

        Raises:
            MempoolError: As ``run``; or what the coroutine raised, each time an error of its own, with no traceback of
                the loop's.
            DeadlineExceeded: It did not end within ``timeout_s`` of this call; it goes on.
        """
        if not self.done():
            self._wait()
        if self._error is None:
            return self._value  # type: ignore[return-value]
        if isinstance(self._error, asyncio.CancelledError):
            if self._io.ended:
                raise MempoolError("this Python ends, and a call of mempool that was begun with it")
            raise CancelledError
        # Kept here, an error that was raised would keep the frames of its callers, and those this.
        raise copy.copy(self._error)

    def _wait(self) -> None:
        if _io_loop() is self._io and threading.current_thread() is self._io.thread:
            raise MempoolError(_BLOCKED)
        if has_interrupted_one():
            raise MempoolError(_HANDLER)
        if not self._ended.wait(self._timeout_s):
            raise DeadlineExceeded(
                f"the call took longer than {self._timeout_s} s; whether it took effect is not known"
            )

    def start(self, coro: Coroutine[Any, Any, T]) -> None:
        """On the loop."""
        self._task = asyncio.get_running_loop().create_task(coro)
        _begun.add(self)  # the loop itself keeps no task
        self._task.add_done_callback(self._end)

    def cancel(self, coro: Coroutine[Any, Any, T]) -> None:
        """On the loop: who began it was interrupted meanwhile, and nobody has it."""
        if self._task is not None:
            self._task.cancel()
        else:
            coro.close()  # it was not handed over, or has ended

    def _end(self, task: asyncio.Task[T]) -> None:
        self._task = None
        if task.cancelled():
            self._error = asyncio.CancelledError()
        elif (error := task.exception()) is not None:
            self._error = error.with_traceback(None)
        else:
            self._value = task.result()
        self._ended.set()
        _begun.discard(self)


_BLOCKED = "a blocking call of mempool was made on its own IO loop, which it would block for ever; await it"

_HANDLER = (
    "a signal's handler called mempool, and what it has interrupted is a look-up of its own thread in an embedded "
    "pool: it would wait for itself. Have the handler note that it was called, and do the work once the look-up has "
    "returned"
)

_lock = threading.Lock()
_current: IoLoop | None = None
_started: set[Future[Any]] = set()
_begun: set[Begun[Any]] = set()


def io_loop() -> asyncio.AbstractEventLoop:
    """The process's IO loop, running; started at the first call.

    Raises:
        MempoolError: The process is a fork of one that used the loop already, or is ending.
    """
    return _io_loop().loop


def run(coro: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
    """Runs a coroutine on the IO loop and waits for its result, from any other thread.

    An exception in the waiting thread (KeyboardInterrupt above all) cancels the coroutine.

    Args:
        coro: The coroutine.
        timeout_s: How long to wait; None waits without end.

    Raises:
        DeadlineExceeded: The time is over; the coroutine is cancelled.
        MempoolError: Called on the loop's own thread, in a forked process, or while the interpreter ends.
    """
    try:
        io = _io_loop()
        if threading.current_thread() is io.thread:
            raise MempoolError(_BLOCKED)
        if has_interrupted_one():
            raise MempoolError(_HANDLER)
    except MempoolError:
        coro.close()
        raise
    call = _Call(coro)
    # An interrupt may come anywhere from here on.
    try:
        io.loop.call_soon_threadsafe(call.begin)
        in_time = call.wait(timeout_s)
    except BaseException:
        if not io.ended and not call.ended:
            io.loop.call_soon_threadsafe(call.cancel)
        raise
    if not in_time and not call.ended:
        io.loop.call_soon_threadsafe(call.cancel)
        raise DeadlineExceeded(f"the call took longer than {timeout_s} s; whether it took effect is not known")
    try:
        return call.result()
    except asyncio.CancelledError:
        if not io.ended:
            raise CancelledError from None
        raise MempoolError("this Python ends, and a call of mempool that another thread waited for with it") from None


def begin(coro: Coroutine[Any, Any, T], timeout_s: float | None = None) -> Begun[T]:
    """Runs a coroutine on the IO loop; its result is waited for later. For any thread, the loop's own too.

    Args:
        coro: The coroutine; those that are begun by one thread start in their order.
        timeout_s: How long a wait for its result may take; None: without end.

    Raises:
        MempoolError: In a forked process, or while the interpreter ends.
    """
    try:
        io = _io_loop()
        begun: Begun[T] = Begun(io, timeout_s)
    except BaseException:
        coro.close()
        raise
    try:
        io.loop.call_soon_threadsafe(begun.start, coro)
    except BaseException:  # an interrupt: perhaps it runs already, and what it has entered is the loop's to leave
        if io.loop.is_closed():
            coro.close()
        else:
            io.loop.call_soon_threadsafe(begun.cancel, coro)
        raise
    return begun


def start(coro: Coroutine[Any, Any, object]) -> None:
    """Runs a coroutine on the IO loop without waiting for it, from any thread and at any moment (finalizers).

    Nothing is run where there is no loop any more: what the coroutine would end has ended then.
    """
    io = _current
    if io is None or io.ended or io.pid != os.getpid():
        coro.close()
        return
    future = asyncio.run_coroutine_threadsafe(coro, io.loop)
    _started.add(future)
    future.add_done_callback(_started.discard)


def _io_loop() -> IoLoop:
    global _current
    io = _current
    if io is None:
        with _lock:
            io = _current
            if io is None:
                io = IoLoop()
                io.start()
                atexit.register(io.end)
                _current = io
    if io.pid != os.getpid():
        raise MempoolError(
            f"process {os.getpid()} was forked from process {io.pid}, where mempool was in use: its threads and "
            "connections are there, and pools and tables cannot be used here. Start processes by spawn "
            "(multiprocessing_context='spawn'), or let only the child, and not its parent, open a pool"
        )
    if io.ended:
        raise MempoolError(
            "the interpreter is ending: mempool's IO loop has ended. Close pools before, by `with` or close()"
        )
    return io
