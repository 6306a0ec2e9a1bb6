"""A connection to one address: grpc.aio channel, raw frames, the token, and errors as ours. Options of both sides.

Leaves routing, retries and deadlines to ``client``. Everything async here runs on the process's IO loop.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import grpc

from mempool.errors import PoolUnreachable, RequestTooLarge, ShardUnavailable, Unauthenticated, Unavailable
from mempool.wire.methods import Method
from mempool.wire.status import from_rpc_error

MAX_MESSAGE_BYTES = 256 * 2**20

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
Options = list[tuple[str, Any]]

_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000


def client_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Options:
    """Channel options of a client."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Else channels of one process to one address share a single TCP connection.
        ("grpc.use_local_subchannel_pool", 1),
        # Retries are the client's, inside one deadline.
        ("grpc.enable_retries", 0),
        # Shards come back within seconds; do not sit out gRPC's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A host that vanished without a word is noticed within 40 s of a call's wait.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # Addresses of shards are inside the cluster; a web proxy of the environment is not meant for them.
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Options:
    """Options of a server that go with ``client_options``."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Two servers on one port must fail, not share its connections.
        ("grpc.so_reuseport", 0),
        # Below the client's keepalive, or the server would end connections for "too many pings".
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 3),
        ("grpc.keepalive_time_ms", 2 * _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ]


class Channel:
    """One connection. Make, use and close it on the IO loop (``mempool.wire.channels.loop``).

    Args:
        address: "host:port".
        shard: The shard there, for error messages; None for the pool.
        token: Sent as ``authorization: Bearer ...`` with each call.
        max_message_bytes: Neither sends nor takes larger messages.

    Raises:
        Unauthenticated: No pool has such a token.
    """

    def __init__(
        self,
        address: str,
        *,
        shard: int | None = None,
        token: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.address = address
        self.shard = shard
        self._max_message_bytes = max_message_bytes
        self._metadata = () if token is None else (("authorization", f"Bearer {_sendable(token)}"),)
        self._channel = grpc.aio.insecure_channel(address, options=client_options(max_message_bytes=max_message_bytes))
        self._closed = False
        self._calls: dict[str, Any] = {}

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        narrow_ids: bool = False,
    ) -> ReplyT:
        """One call, tried once.

        Args:
            method: One of ``mempool.wire.methods`` that does not stream.
            request: Its request.
            timeout_s: The call's deadline, known to the server too.
            narrow_ids: Send slot ids as uint32; the caller knows that they fit.

        Raises:
            MempoolError: As the server raised it, or as gRPC's failure maps to (``status.from_rpc_error``).
        """
        frame = self._frame(method, request, narrow_ids)
        call = self._calls.get(method.path)
        if call is None:
            call = self._calls[method.path] = self._channel.unary_unary(method.path)
        with self._failures():
            reply = await call(frame, timeout=timeout_s, metadata=self._metadata)
        return method.decode_reply(reply)

    async def stream(
        self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float | None = None
    ) -> AsyncIterator[ReplyT]:
        """The messages of a call that streams. Raises as ``call``; ending the iteration cancels the call."""
        frame = self._frame(method, request, False)
        streams: Any = self._channel.unary_stream(method.path)
        call = streams(frame, timeout=timeout_s, metadata=self._metadata)
        replies = aiter(call)
        try:
            while True:
                with self._failures():
                    try:
                        reply = await anext(replies)
                    except StopAsyncIteration:
                        return
                yield method.decode_reply(reply)
        finally:
            call.cancel()

    async def close(self) -> None:
        """Ends the connection; calls under way end with Unavailable."""
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns what grpc raises into our errors."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, shard=self.shard, address=self.address) from None
        except asyncio.CancelledError:
            # Closing a channel ends its calls as if their tasks were cancelled; theirs may not be.
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise self._closed_error() from None

    def _closed_error(self) -> Unavailable:
        cls = PoolUnreachable if self.shard is None else ShardUnavailable
        return cls(f"the connection was closed on this side ({self.address})", shard=self.shard, address=self.address)

    def _frame(self, method: Method[RequestT, ReplyT], request: RequestT, narrow_ids: bool) -> bytes:
        if self._closed:
            raise self._closed_error()
        frame = method.request.encode(request, narrow_ids=narrow_ids)
        if len(frame) > self._max_message_bytes:
            raise RequestTooLarge(
                f"{method.request.name} has {len(frame):,} bytes; {self._max_message_bytes:,} are accepted "
                "(max_message_bytes). Send fewer bags or rows at a time",
                shard=self.shard,
                address=self.address,
            )
        return frame


def _sendable(token: str) -> str:
    """The token as the pool reads its own, without the line end of a file; never shown.

    It has to be a header: of one that cannot be, gRPC only says that some operation failed.
    """
    token = token.strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise Unauthenticated(
            "the token is empty, or has blanks or other than printable ASCII in it, so it is no pool's; check "
            "MEMPOOL_TOKEN, or connect(..., token=...)"
        )
    return token
