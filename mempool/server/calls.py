"""From protocol calls to gRPC handlers: decode, call, encode; every error becomes a status with its details."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn, TypeVar

import grpc
import grpc.aio

from mempool.errors import MempoolError, RequestTooLarge
from mempool.observe import Stages
from mempool.wire.methods import Method
from mempool.wire.status import to_status

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

_LOG = logging.getLogger("mempool.server")


async def abort(context: "grpc.aio.ServicerContext[bytes, bytes]", error: Exception, call: str) -> NoReturn:
    """End a call with an error's status and details; what is not mempool's own is a bug and is logged."""
    if not isinstance(error, MempoolError | TimeoutError):
        _LOG.exception("%s failed", call, exc_info=error)
    code, message, metadata = to_status(error)
    await context.abort(code, message, metadata)


def handler(
    method: Method[RequestT, ReplyT],
    call: Callable[[RequestT], Awaitable[ReplyT]],
    *,
    max_message_bytes: int,
    stages: Stages,
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """The handler of one call. Frames go in and out as raw bytes: protobuf's own classes see only the scalars."""

    async def handle(frame: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        try:
            with stages.measure("decode"):
                request = method.request.decode(frame)
            reply = await call(request)
            with stages.measure("encode"):
                encoded = method.reply.encode(reply)
            if len(encoded) > max_message_bytes:
                raise RequestTooLarge(
                    f"the answer to {method.name} would have {len(encoded):,} bytes; {max_message_bytes:,} are "
                    "accepted (max_message_bytes). Ask for fewer bags or rows at a time"
                )
            return encoded
        except Exception as error:
            await abort(context, error, method.name)

    return grpc.unary_unary_rpc_method_handler(handle)


def streaming_handler(
    method: Method[RequestT, ReplyT], call: Callable[[RequestT], AsyncIterator[ReplyT]]
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """The handler of a call that is answered by a stream."""

    async def handle(frame: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> AsyncIterator[bytes]:
        try:
            async for reply in call(method.request.decode(frame)):
                yield method.reply.encode(reply)
        except Exception as error:
            await abort(context, error, method.name)

    return grpc.unary_stream_rpc_method_handler(handle)
