"""Calls that are answered on the thread that asks, where a shard has nothing else to do: no thread waits for another.

What cannot be answered so (others wait, a version is still to come, rows are to be brought up to date first, the
request is wrong) is left to the engine's own calls, which know what to do and what to say.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mempool.shard.answers import Answers
from mempool.shard.array_gathers import ArraySpace
from mempool.shard.committing import Committing
from mempool.shard.parking import Behind, Parked
from mempool.shard.reading.begun import Pieces, Space
from mempool.shard.work.jobs import Shared, cost_of, cost_of_parts
from mempool.shard.work.results import Tell
from mempool.shard.work.thread import EngineThread
from mempool.types import (
    CommitRequest,
    GatherReply,
    GatherRequest,
    PrepareRequest,
    UpdateReply,
    UpdateRequest,
)
from mempool.types.messages import ArrayGather, ArrayGathered

if TYPE_CHECKING:
    from mempool.shard.durable.store import Store

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
_USUAL = (GatherReply, ArrayGathered)
TakeBack = Callable[[], None]
"""Nobody waits for the answer any more."""


class AtOnce:
    """Calls of one shard by whoever is in its process.

    ``begin_...`` are for any thread, also for one that signals' handlers may interrupt anywhere: there it only reads,
    and has the shard's own thread do what writes. The others are for threads that nobody interrupts.

    Args:
        thread: Stands still meanwhile, or reads rows.
        answers, committing: Make the answers.
        store: What the shard keeps on a disk: nobody is told of what is not durable yet.
    """

    def __init__(self, thread: EngineThread, answers: Answers, committing: Committing, store: Store | None) -> None:
        self._thread = thread
        self._answers = answers
        self._committing = committing
        self._store = store

    def begin_gather(
        self, request: GatherRequest, *, alone: bool = False, **_: object
    ) -> Callable[[], GatherReply | None]:
        """See ``AtOnceShard``. All is done when the answer is asked for; whoever has the shard just then is waited
        for."""
        return lambda: self._gathered(request, alone)

    def _gathered(self, request: GatherRequest, alone: bool) -> GatherReply | None:
        # Where others are asked for the same bags, what is made of their tensors is there for all of them.
        asked = _as_arrays(request) if alone else None
        answer = self._answers.reading_gather if asked is None else partial(self._of_arrays, asked)
        return self._answer("gather", answer, request, wait=True)

    def _of_arrays(
        self, asked: ArrayGather, request: GatherRequest
    ) -> GatherReply | Parked | Pieces[GatherReply] | None:
        """The same request in both forms: as arrays where that will do."""
        found = self._answers.arrays.reading(asked)
        if found is None:
            return self._answers.reading_gather(request)
        return GatherReply(stamp=found.stamp, blocks=found.blocks, values=torch.from_numpy(found.values))

    def begin_update(
        self, request: UpdateRequest, *, timeout_s: float, **_: object
    ) -> Callable[[], UpdateReply | None]:
        """See ``AtOnceShard``."""
        return self._in_turn("update", self._answers.update, request, _cost_of_update(request), timeout_s)

    def gather(self, request: GatherRequest, *, caller: str, space: Space | None = None) -> GatherReply | None:
        """The answer; None where it cannot be had at once. Nobody is waited for."""
        self._thread.pace.asks(caller, cost_of(request.ids, request.weights, request.offsets))
        if self._answers.is_long(request, caller):
            return None
        answer = partial(self._answers.gather, space=space)
        return self._answer("gather", answer, request, wait=False, caller=caller)

    def gather_arrays(self, asked: ArrayGather, *, cost: int, caller: str, space: ArraySpace) -> ArrayGathered | None:
        """As ``gather``, of the plain ones; None for others, too. Where its caller's turn would come first it goes
        before what waits. cost: As of ``cost_of``, above 0."""
        self._thread.pace.asks(caller, cost)
        answer = partial(self._answers.arrays.gather, space=space)
        beside = self._answers.is_little(asked)
        return self._answer("gather", answer, asked, wait=False, caller=caller, cost=cost, beside=beside)

    def update(self, request: UpdateRequest, *, caller: str, space: Space | None = None) -> UpdateReply | None:
        """The same of an update."""
        if self._answers.is_long(request, caller):
            return None
        answer = partial(self._answers.update, caller=caller, space=space)
        return self._answer("update", answer, request, wait=False, caller=caller)

    def line_up_gather(
        self, request: GatherRequest, *, caller: str, timeout_s: float, tell: Tell, space: Space | None = None
    ) -> TakeBack:
        """``tell`` is given the answer when it is the caller's turn; None, or an error, where it is not to be had so.
        Quiet, as of ``EngineThread.line_up``: see ``take_turn``."""
        cost = cost_of(request.ids, request.weights, request.offsets, numbers=len(request.release))
        shared = self._answers.shared_gather(request, _unless_behind, space=space)
        answer = partial(self._answers.gather, space=space)
        return self._line_up("gather", answer, request, cost, timeout_s, caller, tell, shared=shared, quiet=True)

    def line_up_update(
        self, request: UpdateRequest, *, caller: str, timeout_s: float, tell: Tell, space: Space | None = None
    ) -> TakeBack:
        """The same of an update."""
        answer = partial(self._answers.update, caller=caller, space=space)
        cost = _cost_of_update(request)
        return self._line_up("update", answer, request, cost, timeout_s, caller, tell, quiet=True)

    def line_up_prepare(self, request: PrepareRequest, *, caller: str, timeout_s: float, tell: Tell) -> TakeBack | None:
        """The same; on the shard's own thread. None, and nobody is told, where it would have to be durable first:
        nobody waits for a disk here."""
        if self._store is not None:
            return None
        answer = partial(self._committing.prepare, caller=caller)
        return self._line_up("prepare", answer, request, cost_of_parts(request.parts), timeout_s, caller, tell)

    def line_up_commit(self, request: CommitRequest, *, caller: str, timeout_s: float, tell: Tell) -> TakeBack | None:
        """The same of a commit."""
        if self._store is not None:
            return None
        cost = cost_of_parts(request.parts)
        answer: Any = self._committing.commit  # what it promises besides is the thread's to do
        return self._line_up("commit", answer, request, cost, timeout_s, caller, tell)

    def take_turn(self) -> bool:
        """Run what waits, or a piece of it, on the caller's own thread, where all of it was lined up quietly and nobody
        else is at it; False: that is not so, and ``hand_over`` is for the shard's own thread to see to it. So it is for
        a long read beside which others could read who ask this thread for little."""
        first = self._thread.first
        request = None if first is None else first.request  # another thread may forget it
        if first is not None and isinstance(request, GatherRequest):
            shared = self._thread.pace.is_shared_by(first.caller.name)
            if shared and self._answers.lets_in(request):
                return False
        return self._thread.take_turn()

    def hand_over(self) -> None:
        """See ``take_turn``."""
        self._thread.hand_over()

    def _line_up(
        self,
        stage: str,
        answer: Callable[[RequestT], ReplyT | Parked | Pieces[ReplyT] | None],
        request: RequestT,
        cost: int,
        timeout_s: float,
        caller: str,
        tell: Tell,
        shared: Shared | None = None,
        quiet: bool = False,
    ) -> TakeBack:
        def told(reply: Any, error: BaseException | None) -> None:
            tell(self._durable(reply), error)

        return self._thread.line_up(
            stage,
            partial(_unless_behind, answer),
            request,
            tell=told,
            cost=cost,
            timeout_s=timeout_s,
            caller=caller,
            shared=shared,
            quiet=quiet,
        )

    def _in_turn(
        self,
        stage: str,
        answer: Callable[[RequestT], ReplyT | Parked | Pieces[ReplyT] | None],
        request: RequestT,
        cost: int,
        timeout_s: float,
    ) -> Callable[[], ReplyT | None]:
        job: Callable[[RequestT], Any] = partial(_unless_behind, answer)
        wait = self._thread.begin(stage, job, request, cost=cost, timeout_s=timeout_s)
        return lambda: self._durable(wait())

    def _answer(
        self,
        stage: str,
        answer: Callable[[RequestT], ReplyT | Parked | Pieces[ReplyT] | None],
        request: RequestT,
        *,
        wait: bool,
        caller: str = "",
        cost: int = 0,
        beside: bool = False,
    ) -> ReplyT | None:
        if not self._may_tell:  # nor will it, most likely, when this is read
            return None
        whole = partial(_whole, answer)
        thread = self._thread
        return self._durable(thread.at_once(stage, whole, request, wait=wait, caller=caller, cost=cost, beside=beside))

    def _durable(self, reply: ReplyT | None) -> ReplyT | None:
        return reply if self._may_tell else None

    @property
    def _may_tell(self) -> bool:
        return self._store is None or self._store.is_settled


def _as_arrays(request: GatherRequest) -> ArrayGather | None:
    """A request of this process as arrays, which are its tensors' memory; None where it has no such form."""
    ids, weights = request.ids, request.weights
    if not request.private or request.act or request.reply_dtype != "float32" or ids.dtype != torch.uint32:
        return None
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != ids.shape):
        return None
    return ArrayGather(
        request.envelope,
        request.lookup_id,
        ids.numpy(),
        None if weights is None else weights.numpy(),
        request.offsets.numpy(),
        request.remember,
        request.release,
        True,
        request.pin,
    )


def _cost_of_update(request: UpdateRequest) -> int:
    return cost_of(request.ids, request.weights, request.offsets, request.grads)


def _whole(answer: Callable[[RequestT], ReplyT | Parked | Pieces[ReplyT] | None], request: RequestT) -> ReplyT | None:
    """What is answered; None for what is still to come."""
    try:
        reply: Any = answer(request)
    except Behind:
        return None
    if isinstance(reply, _USUAL):
        return reply  # type: ignore[return-value]  # the usual answer
    whole: ReplyT | None = None if isinstance(reply, GeneratorType) else _unless_parked(reply)  # others have turns
    return whole


def _unless_behind(
    answer: Callable[[RequestT], ReplyT | Parked | Pieces[ReplyT] | None], request: RequestT
) -> ReplyT | Pieces[ReplyT | None] | None:
    """The same in a turn of the shard's thread, which gives others theirs between pieces."""
    try:
        reply: Any = answer(request)
    except Behind:
        return None
    found: ReplyT | Pieces[ReplyT | None] | None = (
        _pieces_unless_behind(reply) if isinstance(reply, GeneratorType) else _unless_parked(reply)
    )
    return found


def _pieces_unless_behind(pieces: Pieces[ReplyT]) -> Pieces[ReplyT | None]:
    try:
        return (yield from pieces)
    except Behind:
        return None


def _unless_parked(reply: Any) -> Any:
    if isinstance(reply, Parked):
        reply.woken.cancel()  # nobody waits for it
        return None
    return reply
