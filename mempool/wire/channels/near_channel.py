"""A ``Channel`` that has two ways: a line through shared memory where the server is on this host, and gRPC.

Nobody waits for a line to be opened, and a call that it fails is as one that gRPC failed: whoever tries again finds
gRPC, and soon another line.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from mempool.errors import DeadlineExceeded, Internal, MempoolError, ShardUnavailable
from mempool.wire.channels.channel import ReplyT, RequestT
from mempool.wire.channels.grpc_channel import GrpcChannel, GrpcChannels
from mempool.wire.methods import Method
from mempool.wire.near import handshake
from mempool.wire.near.framing import CANCEL, FAILURE, MOST_REQUEST_BYTES, REPLY, REQUEST, Message
from mempool.wire.near.line import Line, supported
from mempool.wire.near.memory import ReceivedMemory, SentMemory
from mempool.wire.near.methods import NUMBERS
from mempool.wire.status import from_detail

_AGAIN_S = 2.0
"""Between two tries to open a line."""
_LAST_CALL = 2**32

_Agreed = tuple[socket.socket, SentMemory, ReceivedMemory]


@dataclass(frozen=True, slots=True, kw_only=True)
class NearChannels:
    """Makes ``NearChannel``s to shards, and gRPC's to the pool; a ``Channels``."""

    grpc: GrpcChannels = field(default_factory=GrpcChannels)

    def __call__(self, address: str, *, shard: int | None = None) -> "GrpcChannel | NearChannel":
        channel = self.grpc(address, shard=shard)
        if shard is None or not supported():
            return channel
        return NearChannel(channel, token=None if self.grpc.token is None else self.grpc.token.strip())


class NearChannel:
    """One connection. Make, use and close it on the IO loop.

    Args:
        grpc: The other way; closed with this.
        token: The pool's.
    """

    def __init__(self, grpc: GrpcChannel, *, token: str | None) -> None:
        self.address = grpc.address
        self._grpc = grpc
        self._token = token
        self._line: Line | None = None
        self._opening: asyncio.Task[None] | None = None
        self._not_before_s = 0.0
        self._waiting: dict[int, asyncio.Future[tuple[int, bytes]]] = {}
        self._last_call = 0
        self._closed = False

    @property
    def is_near(self) -> bool:
        """Whether there is a line now."""
        return self._line is not None

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        narrow_ids: bool = False,
    ) -> ReplyT:
        line, number = self._line, NUMBERS.get(method.path)
        if line is not None and number is not None:
            parts = method.request.parts(request, narrow_ids=narrow_ids)
            if sum(len(part) for part in parts) <= MOST_REQUEST_BYTES:
                kind, body = await self._ask(line, number, parts, timeout_s)
                if kind == REPLY:
                    return method.decode_reply(body)
                error = from_detail(body, shard=self._grpc.shard, address=self.address)
                raise error or Internal(f"shard {self._grpc.shard} at {self.address} failed, and did not say how")
        elif number is not None:
            self._open_soon()
        return await self._grpc.call(method, request, timeout_s=timeout_s, narrow_ids=narrow_ids)

    async def _ask(
        self, line: Line, number: int, parts: Sequence[bytes | memoryview], timeout_s: float | None
    ) -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        self._last_call = call = (self._last_call + 1) % _LAST_CALL
        answer: asyncio.Future[tuple[int, bytes]] = loop.create_future()
        self._waiting[call] = answer
        timer, timeout_us = None, -1
        if timeout_s is not None:
            timer, timeout_us = loop.call_later(timeout_s, self._late, answer), max(0, int(timeout_s * 1e6))
        try:
            line.send(Message(REQUEST, call, number, timeout_us), parts)
            return await answer
        except BaseException:
            line.send(Message(CANCEL, call))
            raise
        finally:
            self._waiting.pop(call, None)
            if timer is not None:
                timer.cancel()

    def stream(
        self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float | None = None
    ) -> AsyncIterator[ReplyT]:
        return self._grpc.stream(method, request, timeout_s=timeout_s)

    async def close(self) -> None:
        """Ends the connection; calls under way end with Unavailable. Repeatable."""
        self._closed = True
        if (opening := self._opening) is not None:
            opening.cancel()
            with suppress(asyncio.CancelledError):
                await opening
        if (line := self._line) is not None:
            line.close()
            self._lost("the connection was closed on this side")
        await self._grpc.close()

    # The line

    def _open_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._opening is None and not self._closed and loop.time() >= self._not_before_s:
            self._not_before_s = loop.time() + _AGAIN_S
            self._opening = loop.create_task(self._open())

    async def _open(self) -> None:
        agreeing = asyncio.ensure_future(asyncio.to_thread(_agreed, self.address, self._token))
        try:
            agreed = await asyncio.shield(agreeing)
            if agreed is None:
                return
            self._line = await Line.open(
                *agreed, on_message=self._take, on_lost=partial(self._lost, "its process died, or ended the connection")
            )
        except asyncio.CancelledError:
            agreeing.add_done_callback(_let_go)
            raise
        finally:
            self._opening = None

    def _take(self, message: Message, body: bytes) -> None:
        answer = self._waiting.get(message.call)
        if answer is not None and not answer.done() and message.kind in (REPLY, FAILURE):
            answer.set_result((message.kind, body))

    def _lost(self, why: str) -> None:
        self._line = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._unavailable(why))

    def _late(self, answer: "asyncio.Future[tuple[int, bytes]]") -> None:
        if not answer.done():
            answer.set_exception(
                DeadlineExceeded(
                    f"shard {self._grpc.shard} at {self.address} did not answer in time; whether the call took effect "
                    "is not known",
                    shard=self._grpc.shard,
                    address=self.address,
                )
            )

    def _unavailable(self, why: str) -> ShardUnavailable:
        return ShardUnavailable(
            f"shard {self._grpc.shard} at {self.address} does not answer ({why}). See which shards are up: mempool "
            "status",
            shard=self._grpc.shard,
            address=self.address,
        )


def _agreed(address: str, token: str | None) -> _Agreed | None:
    try:
        return handshake.call(address, token)
    except (OSError, MempoolError):
        return None  # gRPC it is


def _let_go(agreeing: "asyncio.Future[_Agreed | None]") -> None:
    """Nobody wants the line any more."""
    if not agreeing.cancelled() and agreeing.exception() is None and (agreed := agreeing.result()) is not None:
        agreed[0].close()
        agreed[1].close()
