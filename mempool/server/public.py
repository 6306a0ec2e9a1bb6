"""Health probes and reflection: foreign services whose messages anyone may send, read one at a time and only if small.

gRPC's own servicers let it read whatever comes, before any of our code is asked.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from mempool.errors import DeadlineExceeded, InvalidRequest, NotFound, ShardUnavailable
from mempool.server.admission import Admission
from mempool.server.calls import Context, refusal

HEALTH_SERVICE: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION_SERVICE: str = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
MAX_PUBLIC_BYTES = 1024
"""Of a message: a service's name, or a symbol's."""
MAX_WATCHERS = 256
"""Streams that wait for news of the health, or for the next question about the services."""
_READ_TIMEOUT_S = 1.0
"""How long a message may take to come: others wait for it."""

MessageT = TypeVar("MessageT", bound=Message)


class PublicServices:
    """Health (needs no token) and reflection of one server.

    Args:
        message_bytes: Of the largest message that gRPC takes from anyone; room for one of them is set aside.
    """

    def __init__(self, *, message_bytes: int) -> None:
        self._reading = Admission(budget_bytes=message_bytes, message_bytes=message_bytes)
        self._names: frozenset[str] = frozenset()
        self._serving = True
        self._changed = asyncio.Event()
        self._streams = 0

    def add_to(self, server: grpc.aio.Server, services: Iterable[str]) -> None:
        """Answer for these services, and for these two themselves."""
        names = (*services, HEALTH_SERVICE, REFLECTION_SERVICE)
        self._names = frozenset(("", *names))
        shown = ReflectionServicer(names)

        async def check(context: Context) -> bytes:
            name = (await self._read(context, health_pb2.HealthCheckRequest)).service
            if name not in self._names:
                raise NotFound(f"there is no service {name!r} here; there are {', '.join(sorted(names))}")
            return self._health_of(name)

        async def watch(context: Context) -> None:
            name = (await self._read(context, health_pb2.HealthCheckRequest)).service
            while True:
                changed = self._changed
                await context.write(self._health_of(name))
                await changed.wait()

        async def reflect(context: Context) -> None:
            async for reply in shown.ServerReflectionInfo(self._questions(context), context):
                await context.write(reply.SerializeToString())

        health: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Check": grpc.stream_unary_rpc_method_handler(_ending(check)),
            "Watch": grpc.stream_stream_rpc_method_handler(_ending(self._counted(watch))),
        }
        reflection: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(_ending(self._counted(reflect)))
        }
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(HEALTH_SERVICE, health),
                grpc.method_handlers_generic_handler(REFLECTION_SERVICE, reflection),
            ]
        )

    def end(self) -> None:
        """Say from now on that nothing is served any more."""
        self._serving = False
        self._changed.set()
        self._changed = asyncio.Event()

    def _health_of(self, name: str) -> bytes:
        status = health_pb2.HealthCheckResponse
        known = status.SERVING if self._serving else status.NOT_SERVING
        said: bytes = status(status=known if name in self._names else status.SERVICE_UNKNOWN).SerializeToString()
        return said

    async def _questions(self, context: Context) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        while (question := await self._next(context, reflection_pb2.ServerReflectionRequest)) is not None:
            yield question

    async def _read(self, context: Context, kind: type[MessageT]) -> MessageT:
        message = await self._next(context, kind)
        if message is None:
            raise InvalidRequest("the call came without a message")
        return message

    async def _next(self, context: Context, kind: type[MessageT]) -> MessageT | None:
        """The next message; None where there is none. Raises InvalidRequest, and DeadlineExceeded where it is slow."""
        peer: str = context.peer()
        passage = await self._reading.enter(peer.rpartition(":")[0])
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                frame: Any = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"no message came within {_READ_TIMEOUT_S:g} s; the call was given up") from None
        finally:
            passage.leave()
        if not isinstance(frame, bytes):
            return None
        if len(frame) > MAX_PUBLIC_BYTES:
            raise InvalidRequest(f"{kind.DESCRIPTOR.name} has {len(frame):,} bytes; {MAX_PUBLIC_BYTES:,} are taken")
        try:
            return kind.FromString(frame)
        except DecodeError as error:
            raise InvalidRequest(f"{kind.DESCRIPTOR.name} is malformed: {error}") from None

    def _counted(self, call: Callable[[Context], Awaitable[None]]) -> Callable[[Context], Awaitable[None]]:
        async def counted(context: Context) -> None:
            if self._streams >= MAX_WATCHERS:
                raise ShardUnavailable(f"{self._streams:,} streams of health and reflection are open already")
            self._streams += 1
            try:
                await call(context)
            finally:
                self._streams -= 1

        return counted


def _ending(call: Callable[[Context], Awaitable[Any]]) -> Callable[[object, Context], Awaitable[Any]]:
    """The call as gRPC runs it: without letting it read, and with our errors at its end."""

    async def handle(_: object, context: Context) -> Any:
        try:
            return await call(context)
        except Exception as error:
            refused = refusal(error, "a public call")
        refused.end(context)
        return b""

    return handle
