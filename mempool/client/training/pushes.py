"""Updates on their way to shards, while the backward pass goes on. What did not arrive is sent again by the step."""

import asyncio
from collections.abc import Coroutine
from typing import Any

# Bytes of one table's updates that may be on their way before one more waits.
_WINDOW_BYTES = 64 * 2**20


class Pushes:
    """The updates of one session that are on their way.

    Args:
        window_bytes: So many bytes at once; one update alone may be larger.
    """

    def __init__(self, *, window_bytes: int = _WINDOW_BYTES) -> None:
        self._window_bytes = window_bytes
        self._num_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_bytes(self) -> int:
        """On their way now."""
        return self._num_bytes

    async def room(self, num_bytes: int) -> None:
        """Waits until so many bytes may go out. Each push ends by its own deadline, so this does."""
        while self._tasks and self._num_bytes + num_bytes > self._window_bytes:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    def start(self, push: Coroutine[Any, Any, None], num_bytes: int) -> None:
        """Let a push run. It must not raise."""
        task = asyncio.get_running_loop().create_task(push)
        self._num_bytes += num_bytes
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._num_bytes -= num_bytes

        task.add_done_callback(ended)

    async def settled(self) -> None:
        """Waits until all that are on their way now have arrived or failed."""
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
