"""A ``Channel`` that has two ways: lines through shared memory where the server is on this host, and gRPC.

A line carries one call at a time; more are opened while calls find none free: by the thread that needs one itself, or
beside the event loop for calls on that, which go by gRPC meanwhile. A call that a line fails is as one that gRPC fails:
whoever tries again finds gRPC, and soon another line.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from mempool.errors import DeadlineExceeded, Internal, InvalidRequest, MempoolError, ShardUnavailable
from mempool.wire.channels.channel import ReplyT, RequestT
from mempool.wire.channels.grpc_channel import GrpcChannel, GrpcChannels
from mempool.wire.methods import Method
from mempool.wire.near import handshake
from mempool.wire.near.line import Body, ClientLine, supported
from mempool.wire.near.methods import METHODS, NUMBERS
from mempool.wire.status import from_detail

_AGAIN_S = 2.0
"""Between two tries to open a line, where the last one failed."""
MOST_LINES = 8
"""Of one channel. Calls that find all of them taken go by gRPC."""
MOST_REQUEST_BYTES = 4 * 2**20
"""Larger requests go by gRPC: the memory that is shared has room for few of them."""
_MICROSECONDS = 1e6
_MOST_OF_IT = 0.9
_OPENING_SHARE = 0.25
"""Of a call's time, for a line to be opened by the thread that calls: a server that is silent there may answer gRPC."""
_LEAST_S = 1e-3
"""Enough to read an answer that is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearChannels:
    """Makes ``NearChannel``s to shards, and gRPC's to the pool; a ``Channels``."""

    grpc: GrpcChannels = field(default_factory=GrpcChannels)

    def __call__(self, address: str, *, shard: int | None = None) -> GrpcChannel | NearChannel:
        channel = self.grpc(address, shard=shard)
        if shard is None or not supported():
            return channel
        return NearChannel(channel, token=None if self.grpc.token is None else self.grpc.token.strip())


class NearChannel:
    """The connections to one server. Make, use and close it on the IO loop; ``begin`` is for all other threads.

    Args:
        grpc: The other way; closed with this.
        token: The pool's.
    """

    def __init__(self, grpc: GrpcChannel, *, token: str | None) -> None:
        self.address = grpc.address
        self._grpc = grpc
        self._token = token
        self._loop = asyncio.get_running_loop()
        self._free: deque[ClientLine] = deque()
        self._lines: set[ClientLine] = set()
        self._opening: asyncio.Task[None] | None = None
        self._agreeing: list[None] = []  # as many as there are threads that open a line just now
        self._not_before_s = 0.0
        self._closed = False

    @property
    def is_near(self) -> bool:
        """Whether there is a line now."""
        return bool(self._lines)

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        narrow_ids: bool = False,
    ) -> ReplyT:
        number = NUMBERS.get(method.path)
        line = None if number is None else self._taken()
        if line is None or number is None:
            return await self._grpc.call(method, request, timeout_s=timeout_s, narrow_ids=narrow_ids)
        try:
            near: Method[RequestT, ReplyT] = METHODS[number]
            parts = near.request.parts(request, narrow_ids=narrow_ids)
            is_large = sum(map(len, parts)) > MOST_REQUEST_BYTES
        except BaseException:
            self._give_back(line)
            raise
        if is_large:
            self._give_back(line)
            return await self._grpc.call(method, request, timeout_s=timeout_s, narrow_ids=narrow_ids)
        try:
            replied, body = await line.call(number, parts, _microseconds(timeout_s), timeout_s=timeout_s)
        except BaseException as error:
            self._end(line)  # whatever comes on it from now on is no answer to another call
            raise self._explained(error) from None
        self._give_back(line)
        if replied:
            return near.decode_reply(body)
        raise self._failure(body)

    def begin(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float,
        narrow_ids: bool = False,
        alone: bool = True,
    ) -> Callable[[], ReplyT | None] | None:
        number = NUMBERS[method.path]
        near: Method[RequestT, ReplyT] = METHODS[number]
        end_s = time.monotonic() + timeout_s
        line = self._taken(soon=False)
        if line is None:
            line = self._opened(timeout_s * _OPENING_SHARE)
            timeout_s = max(_LEAST_S, end_s - time.monotonic())
        if line is None:
            return self._grpc.begin(method, request, timeout_s=timeout_s, narrow_ids=narrow_ids, alone=alone)
        try:
            parts = near.request.parts(request, narrow_ids=narrow_ids)
            if sum(map(len, parts)) > MOST_REQUEST_BYTES:
                self._give_back(line)
                return None
            line.bound(receive_s=timeout_s, send_s=timeout_s)
            line.ask(number, parts, _microseconds(timeout_s))
        except BaseException as error:
            self._end(line)
            if isinstance(error, OSError | MempoolError):
                return None
            raise

        def wait() -> ReplyT | None:
            try:
                left_s = end_s - time.monotonic()
                if left_s < _MOST_OF_IT * timeout_s:  # others of the same call were waited for
                    line.bound(receive_s=max(_LEAST_S, left_s))
                replied, body = line.answer()
            except BaseException as error:
                self._end(line)
                if isinstance(error, OSError | InvalidRequest):
                    return None
                raise
            self._give_back(line)
            return near.decode_reply(body) if replied else None

        return wait

    def stream(
        self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float | None = None
    ) -> AsyncIterator[ReplyT]:
        return self._grpc.stream(method, request, timeout_s=timeout_s)

    async def close(self) -> None:
        """Ends the connections; calls under way end with Unavailable. Repeatable."""
        self._closed = True
        if (opening := self._opening) is not None:
            opening.cancel()
            with suppress(asyncio.CancelledError):
                await opening
        for line in list(self._lines):
            line.cut()
        self._end_free()
        await self._grpc.close()

    # Lines, of any thread

    def _taken(self, *, soon: bool = True) -> ClientLine | None:
        """A line that nobody else has, the one used last; None: there is none now. soon: but perhaps then."""
        try:
            return self._free.pop()
        except IndexError:
            pass
        if soon and self._opening is None and not self._closed and len(self._lines) < MOST_LINES:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._open_soon)
        return None

    def _opened(self, timeout_s: float) -> ClientLine | None:
        """A further line, for the thread that finds none free: that takes less time than one call by gRPC."""
        if self._closed or time.monotonic() < self._not_before_s:
            return None
        self._agreeing.append(None)
        try:
            if len(self._lines) + len(self._agreeing) > MOST_LINES:
                return None
            line = _agreed(self.address, self._token, min(timeout_s, handshake.TIMEOUT_S))
            if line is None:
                self._not_before_s = time.monotonic() + _AGAIN_S
                return None
            self._lines.add(line)
        finally:
            self._agreeing.pop()
        if self._closed:  # whoever closed it may not have seen this one
            self._end(line)
            return None
        return line

    def _give_back(self, line: ClientLine) -> None:
        if line in self._lines:
            self._free.append(line)
            if self._closed:  # whoever closed it may not have seen this one
                self._end_free()

    def _end_free(self) -> None:
        while (free := self._taken(soon=False)) is not None:
            self._end(free)

    def _end(self, line: ClientLine) -> None:
        self._lines.discard(line)
        line.close()

    # On the loop

    def _open_soon(self) -> None:
        if self._opening is None and not self._closed and time.monotonic() >= self._not_before_s:
            self._opening = self._loop.create_task(self._open())

    async def _open(self) -> None:
        agreeing = asyncio.ensure_future(asyncio.to_thread(_agreed, self.address, self._token, handshake.TIMEOUT_S))
        try:
            line = await asyncio.shield(agreeing)
        except asyncio.CancelledError:
            agreeing.add_done_callback(_let_go)
            raise
        else:
            if line is None:
                self._not_before_s = time.monotonic() + _AGAIN_S
            else:
                self._lines.add(line)
                self._free.append(line)
        finally:
            self._opening = None

    def _explained(self, error: BaseException) -> BaseException:
        """What a caller is told of what happened to its line."""
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(
                f"shard {self._grpc.shard} at {self.address} did not answer in time; whether the call took effect is "
                "not known",
                shard=self._grpc.shard,
                address=self.address,
            )
        if isinstance(error, OSError | InvalidRequest):
            why = "the connection was closed on this side" if self._closed else "its process died, or ended the line"
            return ShardUnavailable(
                f"shard {self._grpc.shard} at {self.address} does not answer ({why}). See which shards are up: mempool "
                "status",
                shard=self._grpc.shard,
                address=self.address,
            )
        return error

    def _failure(self, detail: Body) -> MempoolError:
        error = from_detail(bytes(detail), shard=self._grpc.shard, address=self.address)
        return error or Internal(f"shard {self._grpc.shard} at {self.address} failed, and did not say how")


def _microseconds(timeout_s: float | None) -> int:
    return -1 if timeout_s is None else max(0, int(timeout_s * _MICROSECONDS))


def _agreed(address: str, token: str | None, timeout_s: float) -> ClientLine | None:
    try:
        return ClientLine(*handshake.call(address, token, timeout_s=timeout_s))
    except (OSError, MempoolError):
        return None  # gRPC it is


def _let_go(agreeing: asyncio.Future[ClientLine | None]) -> None:
    """Nobody wants the line any more."""
    if not agreeing.cancelled() and agreeing.exception() is None and (line := agreeing.result()) is not None:
        line.close()
