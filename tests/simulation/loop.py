"""Event loops on simulated time: one for each simulated process, all run by one ``Scheduler`` on one seed.

Time jumps to the next timer when nothing is ready. What is ready is run in an order that the seed chooses, of one
process as of several. A process's loop has its own clock (with another beginning, and another speed), may stand still
(``stop``) and may die (``kill``): nothing of it runs any more. There are no selectors, threads or real sleeps, so one
seed is one history.
"""

import asyncio
import contextvars
import heapq
import sys
import weakref
from asyncio import events
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any, TypeVar

from mempool.types.running import ONLY_WHEN_RUNG, Turn

T = TypeVar("T")

RESOLUTION_S = 1e-6
"""Timers are late by so much at most."""


class Stuck(Exception):
    """Nothing is left to do, or too much was done, before what was waited for had come."""


class Scheduler:
    """Runs the loops of all processes.

    Attributes:
        now_s: Seconds since the beginning, on nobody's clock.
        handles: How many callbacks were run.
        errors: What callbacks and tasks raised that nobody looked at: (process, context).
        world: A loop that never stops, with true time: for what is outside of every process.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_s = 0.0
        self.handles = 0
        self.errors: list[tuple[str, dict[str, Any]]] = []
        self._random = self.random("scheduler")
        self._loops: list[ProcessLoop] = []
        self._alive: list[ProcessLoop] = []
        self.busy: list[ProcessLoop] = []  # those that run and have something ready
        self._number = 0
        self._running: ProcessLoop | None = None
        self._generators: weakref.WeakKeyDictionary[Any, ProcessLoop] = weakref.WeakKeyDictionary()
        self.world = self.loop("world")

    def random(self, name: str) -> Random:
        """A source of numbers of its own for whatever ``name`` is: what others draw does not change it."""
        return Random(f"{self.seed}/{name}")

    def loop(self, name: str, *, begins_s: float = 0.0, speed: float = 1.0) -> "ProcessLoop":
        """The loop of a new process, whose clock shows ``begins_s`` now and makes ``speed`` seconds a second."""
        loop = ProcessLoop(self, name, begins_s=begins_s, speed=speed)
        self._loops.append(loop)
        self._alive.append(loop)
        return loop

    def bury(self, loop: "ProcessLoop") -> None:
        """It never runs again; its tasks end with all others."""
        if loop in self._alive:
            self._alive.remove(loop)
        if loop in self.busy:
            self.busy.remove(loop)

    def run_until(self, done: Callable[[], bool], *, limit_s: float, most_handles: int = 500_000) -> None:
        """Run until ``done``. Raises Stuck where there is nothing left to do, or ``limit_s`` is reached before."""
        last = self.handles + most_handles
        hooks, before = sys.get_asyncgen_hooks(), events._get_running_loop()
        sys.set_asyncgen_hooks(firstiter=self._generator_begins, finalizer=self._generator_ends)
        try:
            while not done():
                if not self.step(limit_s) or self.handles > last:
                    raise Stuck(f"{self.now_s:.3f} s of {limit_s:g} s, {self.handles:,} callbacks")
        finally:
            self._none_runs(before)
            sys.set_asyncgen_hooks(*hooks)

    def run(self, coroutine: Coroutine[Any, Any, T], *, limit_s: float = 1e6, loop: "ProcessLoop | None" = None) -> T:
        """The result of a coroutine on one process's loop, the world's where none is named."""
        task = (loop or self.world).create_task(coroutine)
        self.run_until(task.done, limit_s=limit_s)
        return task.result()

    def step(self, limit_s: float) -> bool:
        """Run one callback; before, let time pass until there is one. Returns whether there was one by ``limit_s``."""
        busy = self.busy
        if not busy:
            due = [(loop.next_due_s(), loop) for loop in self._alive if loop.runs]
            first_s = min((due_s for due_s, _ in due), default=ONLY_WHEN_RUNG)
            if first_s > limit_s:
                self.now_s = max(self.now_s, min(limit_s, first_s))
                return False
            # As a clock does, it goes on in any case: nobody waits for ever for a moment that is almost there.
            now_s = self.now_s = max(self.now_s + RESOLUTION_S, first_s)
            for due_s, loop in due:
                if due_s <= now_s:
                    loop.take_due()
            return True
        random = self._random.random
        at = int(random() * len(busy)) if len(busy) > 1 else 0
        loop = busy[at]
        ready = loop.ready
        # The last one takes the place of the one that is run: what is ready has no order.
        place = int(random() * len(ready)) if len(ready) > 1 else 0
        handle, ready[place] = ready[place], ready[-1]
        ready.pop()
        if not ready:
            busy[at] = busy[-1]
            busy.pop()
        if not handle._cancelled:  # type: ignore[attr-defined]
            self.handles += 1
            if self._running is not loop:  # a system call
                events._set_running_loop(loop)
                self._running = loop
            handle._run()
        return True

    def _none_runs(self, before: asyncio.AbstractEventLoop | None = None) -> None:
        """Between two callbacks for long; before: whose callback runs this scheduler, as an oracle's."""
        events._set_running_loop(before)
        self._running = None

    def close(self) -> None:
        """End every task of every process, as if each had been told to stop; nothing is warned of later."""
        before = events._get_running_loop()
        self._alive = list(self._loops)
        for _ in range(20):
            tasks = [task for loop in self._loops for task in asyncio.all_tasks(loop)]
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            for loop in self._loops:
                loop.runs = True
            self.busy = [loop for loop in self._loops if loop.ready]
            deadline_s = self.now_s + 1.0
            while self.busy and self.step(deadline_s):
                pass
        self._none_runs(before)
        self.busy.clear()
        for loop in self._loops:
            loop.ready.clear()
            loop.forget_timers()
            loop.closed = True

    def number(self) -> int:
        self._number += 1
        return self._number

    def _generator_begins(self, generator: Any) -> None:
        loop = events._get_running_loop()
        if isinstance(loop, ProcessLoop):
            self._generators[generator] = loop

    def _generator_ends(self, generator: Any) -> None:
        loop = self._generators.pop(generator, None)
        if loop is not None and not loop.closed:
            loop.create_task(generator.aclose())


class ProcessLoop(asyncio.AbstractEventLoop):
    """The event loop of one simulated process.

    Attributes:
        ready: Callbacks that may run now, in no order.
        runs: It neither stands still nor is dead.
        dead: It was killed: it never runs again.
    """

    def __init__(self, scheduler: Scheduler, name: str, *, begins_s: float, speed: float) -> None:
        self.scheduler = scheduler
        self.name = name
        self.ready: list[asyncio.Handle] = []
        self.runs = True
        self.dead = False
        self.closed = False
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._begins_s = begins_s
        self._since_s = scheduler.now_s
        self._speed = speed

    def __repr__(self) -> str:
        return f"<process {self.name}>"

    # A process's life

    def stop(self) -> None:
        """Stand still, as after SIGSTOP: nothing of it runs, its clock goes on."""
        self.runs = False
        if self in self.scheduler.busy:
            self.scheduler.busy.remove(self)

    def resume(self) -> None:
        if not self.runs and not self.dead:
            self.runs = True
            if self.ready:
                self.scheduler.busy.append(self)

    def kill(self) -> None:
        """Nothing of it ever runs again."""
        self.dead, self.runs = True, False
        self.scheduler.bury(self)

    def set_speed(self, speed: float) -> None:
        """Its clock makes so many seconds a second from now on."""
        self._begins_s, self._since_s = self.time(), self.scheduler.now_s
        self._speed = speed

    # Time

    def time(self) -> float:
        return self._begins_s + (self.scheduler.now_s - self._since_s) * self._speed

    def next_due_s(self) -> float:
        """When its next timer is due, on the scheduler's time."""
        while self._timers and self._timers[0][2]._cancelled:  # type: ignore[attr-defined]
            heapq.heappop(self._timers)
        if not self._timers:
            return ONLY_WHEN_RUNG
        return self._since_s + (self._timers[0][0] - self._begins_s) / self._speed

    def take_due(self) -> None:
        """Make ready what is due."""
        while self._timers and self.next_due_s() <= self.scheduler.now_s:
            self.make_ready(heapq.heappop(self._timers)[2])

    def make_ready(self, handle: asyncio.Handle) -> None:
        if not self.ready and self.runs:
            self.scheduler.busy.append(self)
        self.ready.append(handle)

    def forget_timers(self) -> None:
        self._timers.clear()

    # What asyncio asks of a loop

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self.closed:
            self.make_ready(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if not self.closed:
            heapq.heappush(self._timers, (when, self.scheduler.number(), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when it is due."""

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> "asyncio.Task[Any]":
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_task_factory(self) -> None:
        return None

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self.closed

    def is_closed(self) -> bool:
        return self.closed

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.dead and not self.closed:
            self.scheduler.errors.append((self.name, context))


class InlineRunner:
    """A ``Runner`` of one simulated process: work is done on its loop, in no time, after or before a simulated while.

    Args:
        loop: The process's.
        random: Draws how long work takes.
        longest_s: What a piece of work takes at most.
    """

    def __init__(self, loop: ProcessLoop, random: Random, *, longest_s: float = 0.01) -> None:
        self._loop = loop
        self._random = random
        self._longest_s = longest_s

    async def run(self, work: Callable[[], T], *, name: str = "") -> T:  # noqa: ARG002
        await asyncio.sleep(self.duration_s())
        return work()

    def worker(
        self,
        turn: Turn,
        *,
        name: str,  # noqa: ARG002
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> "InlineWorker":
        return InlineWorker(self._loop, turn, within=within, duration_s=self.duration_s)

    def duration_s(self) -> float:
        """Mostly short, now and then long."""
        return self._longest_s * self._random.random() ** 4


class InlineWorker:
    """A ``Worker`` that takes its turns on a loop; each is done at once and lasts a simulated while after."""

    def __init__(
        self,
        loop: ProcessLoop,
        turn: Turn,
        *,
        within: Callable[[], AbstractContextManager[object]],
        duration_s: Callable[[], float],
    ) -> None:
        self._loop = loop
        self._turn = turn
        self._within = within
        self._duration_s = duration_s
        self._rings = 0
        self._free_s = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._joining: list[asyncio.Future[None]] = []
        self._rest: Callable[[], None] | None = None
        # Nothing of whoever made it goes with its turns: a thread has a context of its own, too.
        self._context = contextvars.Context()

    def ring(self) -> None:
        self._rings += 1
        if self._rings == 1 and self._rest is None:
            self._next_turn(self._free_s)

    def rest_of_turn(self, rest: Callable[[], None]) -> None:
        """In a turn: ``rest`` is done a while later, as the end of it, and no other turn is taken before. Whatever else
        runs on the loop may see what was done by now."""
        self._rest = rest

    async def join(self) -> None:
        if not self._ended:
            joined: asyncio.Future[None] = self._loop.create_future()
            self._joining.append(joined)
            await joined

    def _next_turn(self, when_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(max(when_s, self._loop.time()), self._take, context=self._context)

    def _take(self) -> None:
        self._timer = None
        if self._ended:
            return
        self._rings = max(0, self._rings - 1)
        with self._within():
            wait_s = self._turn()
        if self._rest is None:
            self._took(wait_s)
        else:
            self._loop.call_later(self._duration_s(), self._take_rest, wait_s, context=self._context)

    def _take_rest(self, wait_s: float | None) -> None:
        rest, self._rest = self._rest, None
        assert rest is not None
        with self._within():
            rest()
        self._took(wait_s)

    def _took(self, wait_s: float | None) -> None:
        now_s = self._loop.time()
        self._free_s = now_s + self._duration_s()
        if wait_s is None:
            self._ended = True
            for joined in self._joining:
                if not joined.done():
                    joined.set_result(None)
        elif self._rings:
            self._next_turn(self._free_s)
        elif wait_s != ONLY_WHEN_RUNG:
            self._next_turn(max(self._free_s, now_s + wait_s))
