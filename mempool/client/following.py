"""Long work of a pool's controller: begun once, whatever is tried again, then followed by its reports."""

from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from mempool.client.opening.connection import Connection
from mempool.types import CheckpointProgress, PoolApi, RescaleProgress, TakeCheckpoint
from mempool.types.caller import Caller, calling

T = TypeVar("T")


class Following:
    """Reports of one client's pool."""

    def __init__(self, api: PoolApi, connection: Connection) -> None:
        self._api = api
        self._connection = connection

    def follow(
        self, reports: AsyncIterator[T], progress: Callable[[T], None] | None, report: T | None = None
    ) -> T | None:
        """Hand on all reports, the first one first where it is there already, on this thread. Returns the last."""
        last = None
        try:
            report = self._connection.run_long(_next(reports)) if report is None else report
            while report is not None:
                last = report
                if progress is not None:
                    progress(report)
                report = self._connection.run_long(_next(reports))
        finally:
            self._connection.run(_end(reports))
        return last

    def checkpoint(
        self, request: TakeCheckpoint, progress: Callable[[CheckpointProgress], None] | None
    ) -> CheckpointProgress:
        """Take a checkpoint and wait for it: its last report."""
        reports, first = self.begun(request)
        return self.follow(reports, progress, first) or first

    def begun(self, request: TakeCheckpoint) -> tuple[AsyncIterator[CheckpointProgress], CheckpointProgress]:
        """A checkpoint's reports, and the first of them."""
        return self._connection.run(self._connection.tries.run("checkpoint", lambda: self._begin_checkpoint(request)))

    def begun_rescale(self, shards: int) -> tuple[AsyncIterator[RescaleProgress], RescaleProgress | None]:
        """A rescale's."""
        return self._begun_moves("rescale", lambda: self._api.rescale(shards))

    def begun_rebalance(self, *, dry_run: bool) -> tuple[AsyncIterator[RescaleProgress], RescaleProgress | None]:
        """Those of load that is evened."""
        return self._begun_moves("rebalance", lambda: self._api.rebalance(dry_run=dry_run))

    def _begun_moves(
        self, name: str, begin: Callable[[], AsyncIterator[RescaleProgress]]
    ) -> tuple[AsyncIterator[RescaleProgress], RescaleProgress | None]:
        return self._connection.run(self._connection.tries.run(name, lambda: self._begin_moves(begin)))

    async def _begin_moves(
        self, begin: Callable[[], AsyncIterator[RescaleProgress]]
    ) -> tuple[AsyncIterator[RescaleProgress], RescaleProgress | None]:
        """The reports and the first of them. Where it raises Unavailable nothing has begun: it may be tried again."""
        reports = begin()
        with calling(Caller()):  # what is begun here has no deadline
            return reports, await _next(reports)

    async def _begin_checkpoint(
        self, request: TakeCheckpoint
    ) -> tuple[AsyncIterator[CheckpointProgress], CheckpointProgress]:
        """The reports and the first of them. Where it raises Unavailable nothing has begun: it may be tried again."""
        reports = self._api.checkpoint(request)
        with calling(Caller()):
            return reports, await anext(reports)


async def _next(reports: AsyncIterator[T]) -> T | None:
    return await anext(reports, None)


async def _end(reports: AsyncIterator[object]) -> None:
    close = getattr(reports, "aclose", None)  # an iterator need not have it; a generator must be ended on its loop
    if close is not None:
        await close()
