"""What the calls of lines are answered with: at once, in a turn of the shard, or by a call on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from mempool.errors import InvalidRequest, MempoolError, RequestTooLarge, ShardUnavailable
from mempool.observe import Stages
from mempool.server.lines.serving import Serving
from mempool.server.services import AtOnce
from mempool.types.caller import Caller, calling
from mempool.types.messages import ArrayGathered
from mempool.wire import methods
from mempool.wire.lines.framing import Message
from mempool.wire.lines.line import Body, Parts
from mempool.wire.lines.methods import GATHER, METHODS, UPDATE
from mempool.wire.lines.plain import gathered, read_gather
from mempool.wire.methods import Method
from mempool.wire.status import to_status

_LOG = logging.getLogger("mempool.server")
_LONGEST_TURN_S = 60.0
_LITTLE_BYTES = 128 * 2**10
"""Of gathers that are answered one after the other where several are there, not lined up."""
_IN_PLACE = (GATHER, UPDATE)
"""Calls whose tensors are read where they came: the shard copies what it keeps of them."""

Calls = Mapping[str, Callable[[Any], Awaitable[Any]]]
Told = Callable[[Serving, Any, BaseException | None], None]
"""Is given the answer to the call that a line is at, or ``OnLoop``, or why there is none, on any thread."""


@dataclass(frozen=True, slots=True)
class OnLoop:
    """Is told in place of an answer: a call on the event loop has it.

    Attributes:
        begin: Begins that call. Of the thread that began the line's: what takes it back is known there alone.
    """

    begin: Callable[[], None]


class Answering:
    """Answers the calls of one server's lines; what waits does not hold up the thread that asks.

    Args:
        calls: What answers, by a method's path.
        at_once: Answers gathers, updates and steps without an event loop.
        stages: Where the stages of calls are timed.
        max_message_bytes: Larger answers are refused.
        loop: What calls run on.

    Attributes:
        closing: No call is let in any more.
    """

    def __init__(
        self,
        *,
        calls: Calls,
        at_once: AtOnce | None,
        stages: Stages,
        max_message_bytes: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._calls = [calls.get(method.path) for method in METHODS]
        self._at_once = at_once
        self._stages = stages
        self._max_message_bytes = max_message_bytes
        self._loop = loop
        self.closing = False

    def begin(self, serving: Serving, message: Message, body: Body, *, alone: bool, told: Told) -> Any:
        """Begin the call that a line brings.

        Args:
            serving: The line, which waits meanwhile.
            message, body: The request.
            alone: No other is there that could be answered with it.
            told: Is told of it later where there is no answer yet: once, or never where it was taken back; once more
                after an ``OnLoop``.

        Returns:
            The answer; None where it is still to come.

        Raises:
            What the call raises.
        """
        method = METHODS[message.method] if message.method < len(METHODS) else None
        call = None if method is None else self._calls[message.method]
        if method is None or call is None:
            raise InvalidRequest(f"call {message.method} is none that this server answers")
        if self.closing:
            raise _ending()
        timeout_s = None if message.timeout_us < 0 else message.timeout_us / 1e6
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if method is GATHER and self._at_once is not None and (alone or message.num_bytes < _LITTLE_BYTES):
            reply = self._gathered(serving, body, own=message.place is None)
            if reply is not None:
                return reply
        began_s = time.perf_counter()
        in_place = message.place is not None and method in _IN_PLACE
        request = method.request.decode(body if in_place or message.place is None else bytes(body))
        self._stages.record("decode", time.perf_counter() - began_s)
        on_loop = partial(self._on_loop, serving, call, request, deadline_s, told)
        if self._at_once is not None:
            timeout_s = _LONGEST_TURN_S if timeout_s is None else min(timeout_s, _LONGEST_TURN_S)
            try:
                reply = self._answered(serving, method, request) if alone else None
                if reply is not None or self._lined_up(serving, method, request, timeout_s, told, on_loop):
                    return reply
            except MempoolError:
                pass  # the call knows what to say
        on_loop()
        return None

    def take_turn(self) -> bool:
        """Have the shard answer some of those that are lined up quietly, here; False: it is not to be had so now."""
        return self._at_once is not None and self._at_once.take_turn()

    def hand_over(self) -> None:
        """Have the shard's own thread answer them."""
        if self._at_once is not None:
            self._at_once.hand_over()

    def parts(self, message: Message, reply: Any) -> Parts:
        """An answer as it is sent. Raises RequestTooLarge."""
        method = METHODS[message.method]
        began_s = time.perf_counter()
        parts: Parts = gathered(reply) if isinstance(reply, ArrayGathered) else method.reply.parts(reply)
        self._stages.record("encode", time.perf_counter() - began_s)
        num_bytes = sum(map(len, parts))
        if num_bytes > self._max_message_bytes:
            raise RequestTooLarge(
                f"the answer to {method.name} would have {num_bytes:,} bytes; {self._max_message_bytes:,} are accepted "
                "(max_message_bytes). Ask for fewer bags or rows at a time"
            )
        return parts

    def _gathered(self, serving: Serving, body: Body, *, own: bool) -> ArrayGathered | None:
        """A plain gather, where the shard has nothing else to do: with others that are there it would wait for its
        turn, which takes longer."""
        assert self._at_once is not None, "it was asked for"
        asked = read_gather(body, own=own)
        if asked is None:
            return None
        try:
            return self._at_once.gather_arrays(asked, cost=len(body), caller=serving.peer, space=serving.values)
        except MempoolError:
            return None

    def _answered(self, serving: Serving, method: Method[Any, Any], request: Any) -> Any:
        """What the shard answers here and now; None where it has something else to do, or it is no such call."""
        assert self._at_once is not None, "it was asked for"
        if method is GATHER:
            return self._at_once.gather(request, caller=serving.peer, space=serving.space)
        if method is UPDATE:
            return self._at_once.update(request, caller=serving.peer, space=serving.space)
        return None

    def _lined_up(
        self,
        serving: Serving,
        method: Method[Any, Any],
        request: Any,
        timeout_s: float,
        told: Told,
        on_loop: Callable[[], None],
    ) -> bool:
        """Whether the shard answers when its turn comes. What it does not answer so, a call on the loop does."""
        at_once = self._at_once
        assert at_once is not None, "it was asked for"

        def tell(reply: Any, error: BaseException | None) -> None:
            if reply is not None:
                told(serving, reply, None)
            elif error is None or isinstance(error, MempoolError):
                told(serving, OnLoop(on_loop), None)
            else:
                told(serving, None, error)

        options: dict[str, Any] = {"caller": serving.peer, "timeout_s": timeout_s, "tell": tell}
        if method is GATHER or method is UPDATE:
            serving.is_quiet = True
            line_up = at_once.line_up_gather if method is GATHER else at_once.line_up_update
            try:
                serving.take_back = line_up(request, space=serving.space, **options)
            except BaseException:
                serving.is_quiet = False
                raise
            return True
        if method is methods.PREPARE:
            serving.take_back = at_once.line_up_prepare(request, **options)
        elif method is methods.COMMIT:
            serving.take_back = at_once.line_up_commit(request, **options)
        return serving.take_back is not None

    def _on_loop(
        self,
        serving: Serving,
        call: Callable[[Any], Awaitable[Any]],
        request: Any,
        deadline_s: float | None,
        told: Told,
    ) -> None:
        asked = _called(call, request, Caller(serving.peer, deadline_s))
        try:
            future = asyncio.run_coroutine_threadsafe(asked, self._loop)
        except RuntimeError:
            asked.close()
            told(serving, None, _ending())
            return
        serving.take_back = future.cancel
        future.add_done_callback(partial(_tell, serving, told))


def detail_of(error: BaseException, call: str) -> bytes:
    """An ErrorDetail. Nothing of the call is kept by the error."""
    if not isinstance(error, MempoolError | TimeoutError):
        _LOG.error("%s failed", call, exc_info=error)
    _, _, metadata = to_status(error)
    detail = bytes(metadata[0][1])  # type: ignore[arg-type]
    known: BaseException | None = error
    while known is not None:  # tracebacks hold frames, and these the request
        after = known.__cause__ or known.__context__
        known.__traceback__ = known.__cause__ = known.__context__ = None
        known = after
    return detail


def _tell(serving: Serving, told: Told, future: Future[Any]) -> None:
    try:
        reply = future.result()
    except CancelledError:
        told(serving, None, _ending())
    except BaseException as error:
        told(serving, None, error)
    else:
        told(serving, reply, None)


def _ending() -> ShardUnavailable:
    return ShardUnavailable("this process is ending; try again in a moment")


async def _called(call: Callable[[Any], Awaitable[Any]], request: Any, caller: Caller) -> Any:
    with calling(caller):
        return await call(request)
