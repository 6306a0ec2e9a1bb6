"""Gathers and updates that a table's link has begun on the IO loop, and that somebody waits for later."""

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from mempool.client.gathers.lease import Lease, Remembering
from mempool.client.opening.waiting import Pending
from mempool.client.routing.attempt import LookupRecord

T = TypeVar("T")


class Told(Generic[T]):
    """What was begun, and who on the waiting thread is told of its result.

    Args:
        pending: What was begun.
        tell: Told each time the result is taken.
    """

    def __init__(self, pending: Pending[T], tell: Callable[[T], None]) -> None:
        self._pending = pending
        self._tell = tell

    def done(self) -> bool:
        return self._pending.done()

    def result(self) -> T:
        answer = self._pending.result()
        self._tell(answer)
        return answer


class BegunGather(Told[tuple[Tensor, LookupRecord]]):
    """A gather (``PendingAnswer``).

    Args:
        pending: What was begun; it tells ``remembering`` who remembers it.
        remembering: Whether shards are still to remember the lookup.
        tell: As of ``Told``.
    """

    def __init__(
        self,
        pending: Pending[tuple[Tensor, LookupRecord]],
        remembering: Remembering,
        tell: Callable[[tuple[Tensor, LookupRecord]], None],
    ) -> None:
        super().__init__(pending, tell)
        self._remembering = remembering
        self.lease: Lease | None = remembering.lease()

    def answered(self) -> tuple[Tensor, LookupRecord]:
        """As ``result``, for whoever only looks at it: nobody is told."""
        return self._pending.result()

    def hand_over(self) -> None:
        self._remembering.forget()
