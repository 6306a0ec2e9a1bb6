"""Ends waits that take too long: by one timer for all of them, where one for each would be a good part of what a small
call costs its server.
"""

import asyncio
from typing import Any

Task = asyncio.Task[Any]


class Overdue:
    """Tasks of one loop that wait for as long as each other at most. One that has waited so long is cancelled.

    Args:
        timeout_s: How long each may wait.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waiting: dict[Task, float] = {}  # until when, on the loop's clock; the first to end comes first
        self._due: set[Task] = set()
        self._alarm: asyncio.TimerHandle | None = None

    def begin(self) -> Task:
        """This task waits from now on; for ``is_due``, and for ``end``, which must follow."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None, "only tasks can be cancelled"
        ends_s = self._waiting[task] = loop.time() + self._timeout_s
        if self._alarm is None:
            self._alarm = loop.call_at(ends_s, self._look, loop)
        return task

    def is_due(self, task: Task) -> bool:
        """Whether it was cancelled here, and by nobody else; asked once, by the task itself when it is cancelled."""
        if task not in self._due:
            return False
        self._due.discard(task)
        return task.uncancel() == 0

    def end(self, task: Task) -> None:
        """It waits no more."""
        self._waiting.pop(task, None)
        self._due.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel those whose time is over; look again when that of the next one is."""
        self._alarm = None
        now_s = loop.time()
        while self._waiting:
            task, ends_s = next(iter(self._waiting.items()))
            if ends_s > now_s:
                self._alarm = loop.call_at(ends_s, self._look, loop)
                return
            del self._waiting[task]
            self._due.add(task)
            task.cancel()
