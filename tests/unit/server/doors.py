"""A server alone, before a shard that is a mock, on the IO loop of this process; and raw callers of it."""

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import AsyncMock

import grpc
import grpc.aio
import torch

from mempool.server import Server
from mempool.types import Envelope, GatherRequest

CALL_S = 20.0
CONTROLLER_KEY = "for controllers only"
RAW_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
SERVER = """
import asyncio, os, sys
from unittest.mock import AsyncMock
from mempool.server import Server
from mempool.wire.channels.loop import io_loop, run

async def start():
    server = Server(token="sesame", max_message_bytes=16 * 2**20, in_flight_bytes=2 * 16 * 2**20)
    port = server.bind("127.0.0.1", [0])
    await server.start(shard=AsyncMock(), pool=AsyncMock(), lookup=AsyncMock())
    return server, port

server, port = run(start(), 30.0)
print(port, flush=True)
sys.stdin.read()
"""


class ServerProcess:
    """A server of its own process, whose memory can be looked at."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"

    def resident_bytes(self, kind: str = "VmRSS") -> int:
        """Resident memory now, or the most there ever was ("VmHWM")."""
        with open(f"/proc/{self._process.pid}/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith(kind))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@asynccontextmanager
async def served(
    shard: Any = None, *, token: str | None = None, at_once: Any = None, **options: Any
) -> AsyncIterator[tuple[str, Server]]:
    """Address and server, until the block ends."""
    server = Server(token=token, controller_key=CONTROLLER_KEY, **options)
    address = f"127.0.0.1:{server.bind('127.0.0.1', [0])}"
    shard = AsyncMock() if shard is None else shard
    await server.start(shard=shard, pool=AsyncMock(), lookup=AsyncMock(), at_once=at_once)
    try:
        yield address, server
    finally:
        await server.stop(0.0)


async def raw(address: str, path: str, frame: bytes, *metadata: tuple[str, str], timeout_s: float = CALL_S) -> bytes:
    """One call as any gRPC client makes it, on a connection of its own. Raises AioRpcError."""
    async with grpc.aio.insecure_channel(address, options=RAW_OPTIONS) as channel:
        reply: bytes = await channel.unary_unary(path)(frame, metadata=metadata, timeout=timeout_s)
        return reply


async def ended(address: str, path: str, frame: bytes, *metadata: tuple[str, str]) -> grpc.StatusCode:
    """How such a call ends."""
    try:
        await raw(address, path, frame, *metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def gather_request(*, pairs: int = 4) -> GatherRequest:
    return GatherRequest(
        envelope=Envelope(table_id=1, epoch=1, incarnation=1),
        lookup_id=1,
        ids=torch.zeros(pairs, dtype=torch.int64),
        weights=None,
        offsets=torch.tensor([0, pairs]),
        remember=False,
    )
