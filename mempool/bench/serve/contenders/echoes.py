"""Floors: the bytes of a look-up's tensors there and back, with no table behind, over grpc.aio and a Unix socket."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mempool.bench.gate import Check
from mempool.bench.processes.child import Child
from mempool.bench.processes.echoes import GRPC_METHOD, GRPC_OPTIONS, LENGTHS, WANTED, answer, receive
from mempool.bench.serve.shapes import Pairs, Shape, TableSize

GRPC_ECHO = "grpc.aio echo"
UNIX_ECHO = "Unix socket echo"
_SERVERS = "mempool.bench.processes.echoes"
_TIMEOUT_S = 120.0

#: Sends a request of so many bytes, answers what came back, which shall be of so many.
Exchange = Callable[[int, int], "bytes | memoryview"]


@dataclass(frozen=True)
class Echo:
    """A contender that moves bytes alone."""

    name: str
    table: TableSize
    exchange: Exchange
    pids: Sequence[int] = ()

    def run(self, pairs: Pairs) -> object:
        shape = Shape(*pairs.ids.shape)
        return self.exchange(shape.request_bytes, shape.reply_bytes(self.table))

    def check(self, pairs: Pairs) -> Check:
        wanted = answer(Shape(*pairs.ids.shape).reply_bytes(self.table))
        return Check(self.name, float(bytes(self.run(pairs)) != wanted), 0.0)  # type: ignore[call-overload]


@contextmanager
def grpc_echo(table: TableSize) -> Iterator[Echo]:
    """A bare grpc.aio server until the block ends, and its client."""
    with grpc_server() as server, grpc_exchange(server.address) as exchange:
        yield Echo(GRPC_ECHO, table, exchange, [server.pid])


@contextmanager
def unix_echo(table: TableSize) -> Iterator[Echo]:
    """A Unix socket's server until the block ends, and its client."""
    with unix_server() as server, unix_exchange(server.address) as exchange:
        yield Echo(UNIX_ECHO, table, exchange, [server.pid])


@dataclass(frozen=True)
class EchoServer:
    """A server of echoes: where it listens, and its process."""

    address: str
    pid: int


@contextmanager
def grpc_server() -> Iterator[EchoServer]:
    """A bare grpc.aio server until the block ends."""
    with Child(f"{_SERVERS}:serve_grpc") as child:
        yield EchoServer(child.hear(), child.pid)


@contextmanager
def unix_server() -> Iterator[EchoServer]:
    """A Unix socket's server until the block ends."""
    # Not where the system keeps such folders by default: a socket's path is short.
    with (
        tempfile.TemporaryDirectory(prefix="mempool-bench-", dir="/tmp") as folder,
        Child(f"{_SERVERS}:serve_unix", {"path": str(Path(folder) / "echo")}) as child,
    ):
        yield EchoServer(child.hear(), child.pid)


@contextmanager
def grpc_exchange(address: str) -> Iterator[Exchange]:
    """A client on the loop and thread that the product's has: calls are handed over and waited for alike."""
    import grpc.aio

    from mempool.wire.channels import loop

    async def open_() -> Any:
        return grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)

    channel = loop.run(open_())
    call = channel.unary_unary(GRPC_METHOD)
    requests: dict[tuple[int, int], bytes] = {}

    async def send(request: bytes) -> bytes:
        replied: bytes = await call(request, timeout=_TIMEOUT_S)
        return replied

    def exchange(num_bytes: int, wanted: int) -> bytes:
        request = requests.get((num_bytes, wanted))
        if request is None:
            request = requests[num_bytes, wanted] = WANTED.pack(wanted).ljust(num_bytes, b"\0")
        return loop.run(send(request))

    try:
        yield exchange
    finally:
        loop.run(channel.close(), timeout_s=_TIMEOUT_S)


@contextmanager
def unix_exchange(path: str) -> Iterator[Exchange]:
    """A connection; one call at a time."""
    buffers: dict[tuple[int, int], tuple[bytes, memoryview]] = {}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(path)

        def exchange(num_bytes: int, wanted: int) -> memoryview:
            kept = buffers.get((num_bytes, wanted))
            if kept is None:
                request = LENGTHS.pack(num_bytes, wanted) + bytes(num_bytes)
                kept = buffers[num_bytes, wanted] = request, memoryview(bytearray(wanted))
            connection.sendall(kept[0])
            if not receive(connection, kept[1]):
                raise ConnectionError(f"the echo at {path} is gone")
            return kept[1]

        yield exchange
