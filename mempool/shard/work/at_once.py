"""Gathers that are answered on the thread that asks, where a shard has nothing else to do: no thread waits for another.

What cannot be answered so (others wait, a version is still to come, rows are to be brought up to date first, the
request is wrong) is left to ``Engine.gather``, which knows what to do and what to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mempool.shard.answers import Answers
from mempool.shard.parking import Parked
from mempool.shard.work.thread import EngineThread
from mempool.types import GatherReply, GatherRequest

if TYPE_CHECKING:
    from mempool.shard.durable.store import Store


class AtOnce:
    """The reads of one shard by whoever is in its process. Any thread may use it.

    Args:
        thread: Stands still meanwhile.
        answers: Makes the answers.
        store: What the shard keeps on a disk: nobody is told of what is not durable yet.
    """

    def __init__(self, thread: EngineThread, answers: Answers, store: Store | None) -> None:
        self._thread = thread
        self._answers = answers
        self._store = store

    def begin_gather(
        self,
        request: GatherRequest,
        *,
        timeout_s: float,  # noqa: ARG002
        narrow_ids: bool,  # noqa: ARG002
        alone: bool,  # noqa: ARG002
    ) -> Callable[[], GatherReply | None]:
        """See ``AtOnceShard``. All is done when the answer is asked for; whoever has the shard just then is waited
        for."""
        return lambda: self._gather(request, wait=True)

    def gather_unless_busy(self, request: GatherRequest) -> GatherReply | None:
        """The answer; None where it cannot be had at once. Nobody is waited for."""
        return self._gather(request, wait=False)

    def _gather(self, request: GatherRequest, *, wait: bool) -> GatherReply | None:
        reply = self._thread.at_once("gather", self._read, request, wait=wait)
        return reply if self._store is None or self._store.is_settled else None

    def _read(self, request: GatherRequest) -> GatherReply | None:
        reply = self._answers.gather_at_once(request)
        if isinstance(reply, Parked):
            reply.woken.cancel()  # nobody waits for it
            return None
        return reply if isinstance(reply, GatherReply) else None  # in pieces: others have their turn in between
