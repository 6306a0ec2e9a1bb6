"""A ``Runner`` whose workers take their turns when a test says so, on its own thread."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from mempool.types.running import Turn

T = TypeVar("T")


class ByHand:
    """Runs what is short at once; a worker's turns wait for ``HandWorker.work``."""

    def __init__(self) -> None:
        self.workers: list[HandWorker] = []

    async def run(self, work: Callable[[], T], *, name: str = "") -> T:  # noqa: ARG002
        return work()

    def worker(
        self,
        turn: Turn,
        *,
        name: str,  # noqa: ARG002
        within: Callable[[], AbstractContextManager[object]] = nullcontext,  # noqa: ARG002
    ) -> "HandWorker":
        self.workers.append(HandWorker(turn))
        return self.workers[-1]

    def work(self) -> None:
        """All turns that somebody rang for."""
        for worker in self.workers:
            worker.work()


class HandWorker:
    """A worker."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.rings = 0
        self.ended = False

    def ring(self) -> None:
        self.rings += 1

    def work(self) -> None:
        while self.rings and not self.ended:
            self.rings -= 1
            self.ended = self._turn() is None

    async def join(self) -> None:
        self.work()
        assert self.ended
