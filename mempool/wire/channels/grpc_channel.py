"""A ``Channel`` over gRPC: grpc.aio, raw frames, the pool's secrets as metadata, and gRPC's errors as ours."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import grpc.aio

from mempool.errors import PoolUnreachable, RequestTooLarge, ShardUnavailable, Unauthenticated, Unavailable
from mempool.wire.channels.channel import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, ReplyT, RequestT, client_options
from mempool.wire.channels.tls import ClientTls
from mempool.wire.methods import CONTROLLER_KEY, Method
from mempool.wire.status import from_rpc_error

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcChannels:
    """Makes ``GrpcChannel``s; a ``Channels``.

    Attributes:
        token: Sent as ``authorization: Bearer ...`` with each call.
        controller_key: Sent with the calls that are the controller's alone, and with no other.
        tls: How connections are encrypted; None: they are not.
        max_message_bytes: Neither send nor take larger messages.
    """

    token: str | None = field(default=None, repr=False)
    controller_key: str | None = field(default=None, repr=False)
    tls: ClientTls | None = None
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def __call__(self, address: str, *, shard: int | None = None) -> GrpcChannel:
        return GrpcChannel(
            address,
            shard=shard,
            token=self.token,
            controller_key=self.controller_key,
            tls=self.tls,
            max_message_bytes=self.max_message_bytes,
        )


class GrpcChannel:
    """The connections to one address. Make, use and close it on the IO loop; ``begin`` is for all other threads.

    Args:
        address: "host:port".
        shard: The shard there, for error messages; None for the pool.
        token, controller_key, tls, max_message_bytes: As in ``GrpcChannels``.

    Raises:
        Unauthenticated: No pool has such a token.
    """

    def __init__(
        self,
        address: str,
        *,
        shard: int | None = None,
        token: str | None = None,
        controller_key: str | None = None,
        tls: ClientTls | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.address = address
        self.shard = shard
        self._max_request_bytes = min(max_message_bytes, MAX_REQUEST_BYTES)
        self._metadata: Metadata = () if token is None else (("authorization", f"Bearer {_sendable(token)}"),)
        key: Metadata = () if controller_key is None else ((CONTROLLER_KEY, controller_key),)
        self._controlling: Metadata = (*self._metadata, *key)
        self._tls = tls
        self._options = client_options(
            max_message_bytes=max_message_bytes, server_name=None if tls is None else tls.server_name
        )
        self._channel = (
            grpc.aio.insecure_channel(address, options=self._options)
            if tls is None
            else grpc.aio.secure_channel(address, tls.credentials(), options=self._options)
        )
        self._closed = False
        self._calls: dict[str, Any] = {}
        self._making = threading.Lock()
        self._blocking: grpc.Channel | None = None
        self._blocking_calls: dict[str, Any] = {}

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        narrow_ids: bool = False,
    ) -> ReplyT:
        frame = self._frame(method, request, narrow_ids)
        call = self._calls.get(method.path)
        if call is None:
            call = self._calls[method.path] = self._channel.unary_unary(method.path)
        with self._failures():
            reply = await call(frame, timeout=timeout_s, metadata=self._metadata_of(method))
        return method.decode_reply(reply)

    def begin(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float,
        narrow_ids: bool = False,
        alone: bool = True,
    ) -> Callable[[], ReplyT | None] | None:
        if not alone:  # gRPC's own thread would take the answers, and hand them over: the loop does that as well
            return None
        frame = self._frame(method, request, narrow_ids)
        call = self._blocking_calls.get(method.path)
        if call is None:
            call = self._blocking_calls[method.path] = self._blocking_channel().unary_unary(method.path)

        def wait() -> ReplyT | None:
            try:
                reply = call(frame, timeout=timeout_s, metadata=self._metadata_of(method))
            except (grpc.RpcError, ValueError):  # ValueError: of a channel that was closed
                return None
            return method.decode_reply(reply)

        return wait

    async def stream(
        self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float | None = None
    ) -> AsyncIterator[ReplyT]:
        frame = self._frame(method, request, False)
        streams: Any = self._channel.unary_stream(method.path)
        call = streams(frame, timeout=timeout_s, metadata=self._metadata_of(method))
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
        """Ends the connection; calls under way end with Unavailable. Repeatable."""
        with self._making:
            self._closed = True
            if self._blocking is not None:
                self._blocking.close()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _blocking_channel(self) -> grpc.Channel:
        """A connection for threads that wait themselves, made at first use."""
        with self._making:
            if self._closed:
                raise self._closed_error()
            if self._blocking is None:
                self._blocking = (
                    grpc.insecure_channel(self.address, options=self._options)
                    if self._tls is None
                    else grpc.secure_channel(self.address, self._tls.credentials(), options=self._options)
                )
            return self._blocking

    def _metadata_of(self, method: Method[RequestT, ReplyT]) -> Metadata:
        return self._controlling if method.controls else self._metadata

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
        if len(frame) > self._max_request_bytes:
            raise RequestTooLarge(
                f"{method.request.name} has {len(frame):,} bytes; {self._max_request_bytes:,} are accepted "
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
