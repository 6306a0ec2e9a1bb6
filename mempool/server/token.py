"""One check for every call, before its message is read: does it carry the pool's token?"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from mempool.errors import Unauthenticated
from mempool.server.calls import refusal

_PUBLIC = ("/grpc.health.v1.Health/",)
"""Health probes come from kubelets and load balancers, which have no token; they learn nothing of the tables."""


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers Unauthenticated to calls without ``authorization: Bearer <token>``, except health checks."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        details = handler_call_details
        if details.method.startswith(_PUBLIC):
            return await continuation(details)
        for key, value in details.invocation_metadata:
            if key == "authorization":
                given = value if isinstance(value, bytes) else value.encode()
                if hmac.compare_digest(given, self._expected):
                    return await continuation(details)
                return _refusing("the token sent is not this pool's; check MEMPOOL_TOKEN, or connect(..., token=...)")
        return _refusing("this pool needs a token and none was sent; set MEMPOOL_TOKEN, or connect(..., token=...)")


def _refusing(message: str) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """A handler that takes and gives a stream, so that gRPC neither reads a message for it nor sends one."""

    async def refuse(_: object, context: Any) -> None:
        refusal(Unauthenticated(message), "token check").end(context)

    return grpc.stream_stream_rpc_method_handler(refuse)
