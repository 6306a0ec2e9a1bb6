"""A ``Channel`` that has two ways: lines, with shared memory where the server is on this host, else over TCP; and gRPC.

A line carries one call at a time; more are opened while calls find none free: by the thread that needs one itself,
where that takes it less than a call by gRPC, or beside the event loop, while calls go by gRPC. A call that a line fails
is as one that gRPC fails: whoever tries again finds gRPC, and soon another line. Where lines cannot be had, no call
waits to find out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Generic

from mempool.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    MempoolError,
    ShardUnavailable,
    Unavailable,
)
from mempool.wire import methods
from mempool.wire.channels.channel import ReplyT, RequestT
from mempool.wire.channels.grpc_channel import GrpcChannel, GrpcChannels
from mempool.wire.codecs.lines import OpenLine
from mempool.wire.lines import handshake
from mempool.wire.lines import tcp as lines_over_tcp
from mempool.wire.lines.buffers import Buffers
from mempool.wire.lines.framing import MOST_REQUEST_BYTES, VERSION
from mempool.wire.lines.line import Body, ClientLine, supported
from mempool.wire.lines.methods import METHODS, NUMBERS
from mempool.wire.lines.shared import Shared
from mempool.wire.methods import Method
from mempool.wire.status import from_detail

_AGAIN_S = 2.0
"""Between two tries to open a line, where the last one failed."""
_MUCH_LATER_S = 300.0
"""The same over TCP, where there is no way: a firewall, a server that has no lines."""
MOST_LINES = 8
"""Of one channel. Calls that find all of them taken go by gRPC."""
_KEPT_BUFFERS = 16
_DRAWN = secrets.randbits(62)
_LOG = logging.getLogger("mempool.wire")
_MICROSECONDS = 1e6
_MOST_OF_IT = 0.9
_OPENING_SHARE = 0.25
"""Of a call's time, for a line to be opened by the thread that calls: a server that is silent there may answer gRPC."""
_LEAST_S = 1e-3
"""Enough to read an answer that is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChannels:
    """Makes ``LineChannel``s to shards, and gRPC's to the pool; a ``Channels``.

    Attributes:
        grpc: Makes the others. With encryption there are no lines over TCP.
        near, tcp: Kinds of lines that are wanted.
    """

    grpc: GrpcChannels = field(default_factory=GrpcChannels)
    near: bool = True
    tcp: bool = True
    _buffers: Buffers = field(default_factory=lambda: Buffers(_KEPT_BUFFERS), init=False)

    def __call__(self, address: str, *, shard: int | None = None) -> GrpcChannel | LineChannel:
        channel = self.grpc(address, shard=shard)
        tcp = self.tcp and self.grpc.tls is None
        if shard is None or not (self.near or tcp):
            return channel
        token = None if self.grpc.token is None else self.grpc.token.strip()
        return LineChannel(channel, token=token, near=self.near, tcp=tcp, buffers=self._buffers)


class LineChannel:
    """The connections to one server. Make, use and close it on the IO loop; ``begin`` is for all other threads.

    Args:
        grpc: The other way; closed with this.
        token: The pool's.
        near, tcp: Kinds of lines that are wanted.
        buffers: What bodies come into that come with their messages.
    """

    def __init__(
        self,
        grpc: GrpcChannel,
        *,
        token: str | None,
        near: bool = True,
        tcp: bool = True,
        buffers: Buffers | None = None,
    ) -> None:
        self.address = grpc.address
        self._grpc = grpc
        self._token = token
        self._buffers = buffers or Buffers(_KEPT_BUFFERS)
        self._loop = asyncio.get_running_loop()
        self._free: deque[ClientLine] = deque()
        self._lines: set[ClientLine] = set()
        self._opening: asyncio.Task[None] | None = None
        self._agreeing: list[None] = []  # as many as there are threads, and the loop, that open a line just now
        self._near_from_s = 0.0 if near and supported() else math.inf  # monotonic: it is not tried before
        self._tcp_from_s = 0.0 if tcp and lines_over_tcp.possible() else math.inf
        self._closed = False

    @property
    def is_near(self) -> bool:
        """Whether there is a line with shared memory now."""
        return any(line.is_near for line in tuple(self._lines))

    @property
    def is_tcp(self) -> bool:
        """Whether there is a line over TCP now."""
        return any(not line.is_near for line in tuple(self._lines))

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
            self._want_line()
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

        return _Answer(self, line, near.decode_reply, end_s, timeout_s)

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
        with suppress(IndexError):
            while (line := self._free.pop()).is_forked:
                self._end(line)
            return line
        if soon:
            self._want_line()
        return None

    def _want_line(self) -> None:
        """Have a further one opened, beside the loop, where there may be one."""
        if self._opening is None and not self._closed and self._is_room and self._is_time:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._open_soon)

    @property
    def _is_room(self) -> bool:
        return len(self._lines) + len(self._agreeing) < MOST_LINES

    @property
    def _is_time(self) -> bool:
        return time.monotonic() >= min(self._near_from_s, self._tcp_from_s)

    def _opened(self, timeout_s: float) -> ClientLine | None:
        """A further line with shared memory, for the thread that finds none free: that takes less time than one call by
        gRPC."""
        if self._closed or time.monotonic() < self._near_from_s:
            return None
        self._agreeing.append(None)
        try:
            if len(self._lines) + len(self._agreeing) > MOST_LINES:
                return None
            try:
                line = self._near_line(min(timeout_s, handshake.TIMEOUT_S))
            except (OSError, MempoolError) as error:  # another way it is
                self._is_not_near(error)
                return None
            self._lines.add(line)
        finally:
            self._agreeing.pop()
        if self._closed:  # whoever closed it may not have seen this one
            self._end(line)
            return None
        return line

    def _near_line(self, timeout_s: float = handshake.TIMEOUT_S) -> ClientLine:
        """Raises as ``handshake.call``."""
        connection, sent, received = handshake.call(self.address, self._token, timeout_s=timeout_s)
        return ClientLine(connection, Shared(sent, received), self._buffers)

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
        if self._opening is None and not self._closed and self._is_time:
            self._opening = self._loop.create_task(self._open())

    async def _open(self) -> None:
        self._agreeing.append(None)
        try:
            if len(self._lines) + len(self._agreeing) > MOST_LINES:
                return
            line = await self._open_near() or await self._open_tcp()
            if line is not None:
                self._lines.add(line)
                self._free.append(line)
        finally:
            self._agreeing.pop()
            self._opening = None

    async def _open_near(self) -> ClientLine | None:
        """A line with shared memory; None: there is none now."""
        if time.monotonic() < self._near_from_s:
            return None
        try:
            return await _in_thread(self._near_line)
        except (OSError, MempoolError) as error:
            self._is_not_near(error)
            return None

    def _is_not_near(self, error: Exception) -> None:
        """No line with shared memory is to be had for now."""
        self._near_from_s = time.monotonic() + _AGAIN_S
        if isinstance(error, TimeoutError):  # it is on this host, and busy: nothing else is as good
            self._tcp_from_s = max(self._tcp_from_s, self._near_from_s)

    async def _open_tcp(self) -> ClientLine | None:
        """The same over TCP."""
        if time.monotonic() < self._tcp_from_s:
            return None
        self._tcp_from_s = time.monotonic() + _AGAIN_S
        asked = OpenLine(version=VERSION, client=client_number())
        try:
            opened = await self._grpc.call(methods.OPEN_LINE, asked, timeout_s=lines_over_tcp.TIMEOUT_S)
        except (Unavailable, DeadlineExceeded):  # whoever calls now hears of it
            return None
        except MempoolError as error:  # it is of another version, say
            why = error.message
        else:
            why = opened.why
            if opened.port:
                host = self.address.rpartition(":")[0]
                call = partial(
                    lines_over_tcp.call, host, opened.port, opened.ticket, opened.answer,
                    timeout_s=lines_over_tcp.TIMEOUT_S,
                )  # fmt: skip
                try:
                    line = await _in_thread(lambda: ClientLine(call(), buffers=self._buffers))
                except (OSError, MempoolError) as error:
                    why = f"port {opened.port} there: {error}"
                else:
                    self._tcp_from_s = 0.0
                    return line
        self._tcp_from_s = time.monotonic() + _MUCH_LATER_S
        _LOG.info("calls to %s go by gRPC alone: %s", self.address, why)
        return None

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


class _Answer(Generic[ReplyT]):
    """The answer to what a line was asked, for the thread that waits; None: it is not to be had so. Whoever lets go of
    this before ends the line: others that were asked with it were interrupted, and it would be nobody's for ever."""

    __slots__ = ("_channel", "_decode", "_end_s", "_line", "_timeout_s")

    def __init__(
        self,
        channel: LineChannel,
        line: ClientLine,
        decode: Callable[[Body], ReplyT],
        end_s: float,
        timeout_s: float,
    ) -> None:
        self._channel, self._line, self._decode = channel, line, decode
        self._end_s, self._timeout_s = end_s, timeout_s

    def __call__(self) -> ReplyT | None:
        channel, line = self._channel, self._line
        try:
            left_s = self._end_s - time.monotonic()
            if left_s < _MOST_OF_IT * self._timeout_s:  # others of the same call were waited for
                line.bound(receive_s=max(_LEAST_S, left_s))
            replied, body = line.answer()
        except BaseException as error:
            channel._end(line)
            if isinstance(error, OSError | InvalidRequest):
                return None
            raise
        finally:
            del self._line
        channel._give_back(line)
        return self._decode(body) if replied else None

    def __del__(self) -> None:
        if (line := getattr(self, "_line", None)) is not None:
            self._channel._end(line)


def client_number() -> int:
    """What servers tell this process's lines from others' by; its children have other numbers."""
    return _DRAWN ^ os.getpid()


def _microseconds(timeout_s: float | None) -> int:
    return -1 if timeout_s is None else max(0, int(timeout_s * _MICROSECONDS))


async def _in_thread(make: Callable[[], ClientLine]) -> ClientLine:
    """A line that is made by blocking calls; it ends where nobody wants it any more. Raises as that does."""
    making = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_let_go)
        raise


def _let_go(making: asyncio.Future[ClientLine]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()
