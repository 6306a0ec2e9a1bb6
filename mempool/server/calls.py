"""From protocol calls to gRPC handlers. A call's life: its secrets are checked, it waits for room, its message is read;
decode, call, encode. Every error becomes a status with its details. Nothing of a call outlives its end.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio

from mempool.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MempoolError,
    RequestTooLarge,
    ShardUnavailable,
    Unauthenticated,
)
from mempool.observe import Stages
from mempool.server.admission import Admission, Passage
from mempool.server.overdue import Overdue
from mempool.server.turns import FEW_CALLS, LARGE_BYTES, Turns
from mempool.types.caller import Caller, calling
from mempool.wire.methods import CONTROLLER_KEY, SHARD_SERVICE, Method
from mempool.wire.status import Metadata, to_status

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
Context = Any  # grpc.aio.ServicerContext, whose stubs differ from what it is

_LOG = logging.getLogger("mempool.server")


@dataclass(slots=True, kw_only=True)
class Door:
    """What every call of a server passes.

    Attributes:
        admission: Bounds the bytes of all calls.
        stages: Where waiting at the door, receiving, decoding, encoding and replying are timed.
        controller_key: What calls of the controller must carry; None: they are refused.
        receive_timeout_s: How long a message may take to come, once there is room for it.
        closed: No call is let in any more: the server is ending.
        turns: Whose work the loop does next, where many calls are in.
    """

    admission: Admission
    stages: Stages
    controller_key: str | None = field(repr=False)
    receive_timeout_s: float
    closed: bool = False
    turns: Turns = field(default_factory=Turns)

    _messages: Overdue = field(init=False)

    def __post_init__(self) -> None:
        self._messages = Overdue(self.receive_timeout_s)

    async def enter(
        self, method: Method[Any, Any], context: Context, peer: str, host: str, sender: str | None
    ) -> tuple[Passage, float]:
        """Check a call and wait for room; answers the way in, and what ``turns`` reserved for its message.

        Args:
            method, context: The call.
            peer, host: Who asks, with the port and without it.
            sender: As of ``turns.to_read``; None: the call is not paced.

        Raises:
            Unauthenticated: It needs the controller's key and does not have it.
            ShardUnavailable: The server is ending, or has too much to do.
            Overloaded: The caller does not take its answers.
        """
        if method.controls and not self._has_key(context.invocation_metadata()):
            raise Unauthenticated(
                f"{method.name} is for the pool's controller and its shards alone; clients change tables and shards by "
                "PoolService"
            )
        self._check_open()
        came_s = time.perf_counter()
        reserved_s = 0.0
        if sender is not None:
            self.turns.saw(host)
            reserved_s = await self.turns.to_read(host, sender)
            self._check_open()  # whoever ends waits for those that are in, not for those that rest
        try:
            passage = await self.admission.enter(host, peer)
        except BaseException:
            self.turns.gives_back(host, reserved_s)
            raise
        self.stages.record("door", time.perf_counter() - came_s)
        return passage, reserved_s

    async def receive(self, method: Method[Any, Any], context: Context) -> bytes:
        """The call's one message.

        Raises:
            InvalidRequest: There is none.
            DeadlineExceeded: It took too long.
        """
        waiting = self._messages.begin()
        try:
            frame: Any = await context.read()
        except asyncio.CancelledError:
            if not self._messages.is_due(waiting):
                raise
            raise DeadlineExceeded(
                f"the message of {method.name} did not come within {self.receive_timeout_s:g} s; it was given up"
            ) from None
        finally:
            self._messages.end(waiting)
        if not isinstance(frame, bytes):
            raise InvalidRequest(f"{method.name} came without a message")
        return frame

    def _check_open(self) -> None:
        if self.closed:
            raise ShardUnavailable("this process is ending; try again in a moment")

    def _has_key(self, metadata: tuple[tuple[str, str | bytes], ...]) -> bool:
        expected = self.controller_key
        if expected is None:
            return False
        for key, value in metadata:
            if key == CONTROLLER_KEY:
                given = value if isinstance(value, bytes) else value.encode()
                return hmac.compare_digest(given, expected.encode())
        return False


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call ends that failed."""

    code: grpc.StatusCode
    message: str
    metadata: Metadata

    def end(self, context: Context) -> None:
        """Make it the end of a call. Not by ``abort``, whose exception would be kept with all that raised it."""
        context.set_code(self.code)
        context.set_details(self.message)
        context.set_trailing_metadata(self.metadata)


def refusal(error: Exception, call: str) -> Refusal:
    """The end of a call by an error; what is not mempool's own is a bug and is logged.

    Nothing that the error holds is kept: its tracebacks hold frames, and these the request, the reply and the error.
    """
    if not isinstance(error, MempoolError | TimeoutError):
        _LOG.error("%s failed", call, exc_info=error)
    refused = Refusal(*to_status(error))
    errors: list[BaseException | None] = [error]
    while errors:
        known = errors.pop()
        if known is not None:
            errors += (known.__cause__, known.__context__)
            known.__traceback__ = known.__cause__ = known.__context__ = None
    return refused


def handler(
    method: Method[RequestT, ReplyT],
    call: Callable[[RequestT], Awaitable[ReplyT]],
    *,
    door: Door,
    max_message_bytes: int,
    at_once: Callable[[bytes, str], bytes | None] | None = None,
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """The handler of one call. Frames go in and out as raw bytes: protobuf's own classes see only the scalars.

    To gRPC it takes a stream, of one message: the messages of others are read before any of our code is asked.

    at_once: Answers a request with a frame below ``LARGE_BYTES``, given the request's and who sent it; None: ``call``
        is to be asked.
    """
    stages, admission, turns = door.stages, door.admission, door.turns
    paced = _is_paced(method)

    async def answer(context: Context, ended: "_Ended") -> bytes:
        peer: str = context.peer()
        host = peer.rpartition(":")[0]
        sender = f"{peer} {method.name}" if paced else None
        passage, reserved_s = await door.enter(method, context, peer, host, sender)
        ended.passage = passage
        received_s = time.perf_counter()
        frame = await door.receive(method, context)
        passage.resize(len(frame))
        if sender is not None:
            turns.has_read(host, sender, len(frame), reserved_s=reserved_s)
        decoded_s = time.perf_counter()
        stages.record("receive", decoded_s - received_s)
        if admission.active > FEW_CALLS:
            await turns.take(host, peer)
            decoded_s = time.perf_counter()
        called_s = decoded_s
        encoded = None if at_once is None else at_once(frame, peer)
        if encoded is None:
            decoded_s = time.perf_counter()
            request = method.request.decode(frame)
            stages.record("decode", time.perf_counter() - decoded_s)
            with calling(Caller(peer, _deadline_s(context), ended.then)):
                reply = await call(request)
            if paced and (num_bytes := method.reply.tensor_bytes(reply)) >= LARGE_BYTES:
                await turns.room(host, num_bytes)
            if admission.active > FEW_CALLS:
                await turns.take(host, peer)
            called_s = time.perf_counter()
            encoded = method.reply.encode(reply)
            stages.record("encode", time.perf_counter() - called_s)
        ended.replied_s = time.perf_counter()
        if len(encoded) > max_message_bytes:
            raise RequestTooLarge(
                f"the answer to {method.name} would have {len(encoded):,} bytes; {max_message_bytes:,} are "
                "accepted (max_message_bytes). Ask for fewer bags or rows at a time"
            )
        passage.answer(len(encoded))
        if paced and len(encoded) >= LARGE_BYTES:
            ended.then(turns.answers(host, len(encoded), since_s=called_s))
        return encoded

    async def handle(_: object, context: Context) -> bytes:
        ended = _Ended(stages)
        ended.follow()
        try:
            return await answer(context, ended)
        except Exception as error:
            refused = refusal(error, method.name)
        refused.end(context)
        return b""

    return grpc.stream_unary_rpc_method_handler(handle)


def streaming_handler(
    method: Method[RequestT, ReplyT], call: Callable[[RequestT], AsyncIterator[ReplyT]], *, door: Door
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """The handler of a call that is answered by a stream."""

    async def answer(context: Context, ended: "_Ended") -> None:
        peer: str = context.peer()
        sender = f"{peer} {method.name}" if _is_paced(method) else None
        ended.passage, _ = await door.enter(method, context, peer, peer.rpartition(":")[0], sender)
        frame = await door.receive(method, context)
        ended.passage.resize(len(frame))
        with calling(Caller(peer, _deadline_s(context))):
            async for reply in call(method.request.decode(frame)):
                await context.write(method.reply.encode(reply))

    async def handle(_: object, context: Context) -> None:
        ended = _Ended(door.stages)
        ended.follow()
        try:
            await answer(context, ended)
        except Exception as error:
            refused = refusal(error, method.name)
        else:
            return
        refused.end(context)

    return grpc.stream_stream_rpc_method_handler(handle)


def _is_paced(method: Method[Any, Any]) -> bool:
    """Whether a call is a client's. Nobody rests for the controller's questions, nor do pages that move: writers wait
    for them."""
    return method.service != SHARD_SERVICE


class _Ended:
    """Gives a call's room back when its answer has been taken, or it ended otherwise."""

    __slots__ = ("_stages", "_then", "passage", "replied_s")

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self.passage: Passage | None = None
        self.replied_s: float | None = None
        self._then: list[Callable[[], None]] = []

    def then(self, do: Callable[[], None]) -> None:
        """Do this when the call has ended."""
        self._then.append(do)

    def follow(self) -> None:
        """Watch the task that serves this call: it ends when gRPC has sent the answer."""
        task = asyncio.current_task()
        assert task is not None, "handlers run in tasks"
        task.add_done_callback(self)

    def __call__(self, _: "asyncio.Task[Any]") -> None:
        for do in self._then:
            do()
        self._then.clear()
        if self.passage is not None:
            self.passage.leave()
        if self.replied_s is not None:
            self._stages.record("reply", time.perf_counter() - self.replied_s)


def _deadline_s(context: Context) -> float | None:
    left_s: float | None = context.time_remaining()
    return None if left_s is None else time.monotonic() + left_s
