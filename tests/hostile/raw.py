"""Raw calls of a pool: protobuf's own classes and grpc.aio, nothing of mempool's client: any bytes can be sent."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from mempool.wire.v1 import data_pb2, pool_pb2, shard_pb2

SERVICES: dict[str, ServiceDescriptor] = {
    "MemoryService": data_pb2.DESCRIPTOR.services_by_name["MemoryService"],
    "ShardService": shard_pb2.DESCRIPTOR.services_by_name["ShardService"],
    "PoolService": pool_pb2.DESCRIPTOR.services_by_name["PoolService"],
}
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True)
class RawMethod:
    """One call of a service."""

    service: str
    name: str
    request: type[Message]
    reply: type[Message]
    streams: bool

    @property
    def path(self) -> str:
        return f"/mempool.wire.v1.{self.service}/{self.name}"

    @property
    def label(self) -> str:
        return f"{self.service}.{self.name}"


def methods() -> Iterator[RawMethod]:
    """Every method of every service."""
    for service, descriptor in SERVICES.items():
        for method in descriptor.methods:
            yield _method(service, method)


def _method(service: str, method: MethodDescriptor) -> RawMethod:
    return RawMethod(
        service=service,
        name=method.name,
        request=message_factory.GetMessageClass(method.input_type),
        reply=message_factory.GetMessageClass(method.output_type),
        streams=method.server_streaming,
    )


METHODS = {method.label: method for method in methods()}


class RawChannel:
    """A connection that sends bytes as they are. Use it on a running event loop."""

    def __init__(self, address: str, *, key: str | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)

    async def send(self, method: RawMethod, frame: bytes, *, timeout_s: float = 30.0) -> tuple[str, bytes, str]:
        """The name of the status the call ended with, the last reply's bytes, and the status' message."""
        reply: bytes = b""
        try:
            if method.streams:
                streams: Any = self._channel.unary_stream(method.path)
                replies = streams(frame, timeout=timeout_s, metadata=self._metadata)
                reply = [reply async for reply in replies][-1]
            else:
                unary: Any = self._channel.unary_unary(method.path)
                reply = await unary(frame, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            return error.code().name, b"", error.details() or ""
        return "OK", reply, ""

    async def ask(self, label: str, request: Message | None = None, *, timeout_s: float = 30.0) -> Any:
        """A call that must succeed."""
        method = METHODS[label]
        frame = (request or method.request()).SerializeToString()
        status, reply, message = await self.send(method, frame, timeout_s=timeout_s)
        assert status == "OK", f"{label}: {status} {message}"
        return method.reply.FromString(reply)

    async def close(self) -> None:
        await self._channel.close()
