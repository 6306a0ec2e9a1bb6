"""Clients of lines over TCP, and hands that write what they want there."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mempool.errors import ShardUnavailable
from mempool.server.lines.server import LineServer
from mempool.wire import methods
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.line_channel import LineChannel
from mempool.wire.codecs.lines import OpenLine
from mempool.wire.lines import tcp
from mempool.wire.lines.framing import VERSION
from mempool.wire.methods import Method

from .test_near import opened, until


class Asked(GrpcChannel):
    """Of gRPC it has the question for a line alone.

    Attributes:
        asked: How often that was asked.
        given: What is answered in place of what the server would, where that is not None.
    """

    def __init__(self, server: LineServer) -> None:
        super().__init__("127.0.0.1:1", shard=0)
        self._server = server
        self.asked = 0
        self.given: Any = None

    async def call(self, method: Method[Any, Any], request: Any, **_: object) -> Any:
        if method is not methods.OPEN_LINE:
            raise ShardUnavailable("by gRPC nobody is reached", shard=0)
        self.asked += 1
        if isinstance(self.given, Exception):
            raise self.given
        return self.given or await self._server.open_line(request)

    def begin(self, *_: object, **__: object) -> None:
        return None


@asynccontextmanager
async def connected_by_tcp(server: LineServer, *, lines: int = 1) -> AsyncIterator[LineChannel]:
    channel = LineChannel(Asked(server), token=None, near=False)
    await opened(channel, lines)
    try:
        await until(lambda: not channel.is_tcp or not server._beginning)  # it has its end a moment later
        yield channel
    finally:
        await channel.close()


async def ticket_of(server: LineServer) -> tuple[int, bytes, bytes]:
    given = await server.open_line(OpenLine(version=VERSION, client=7))
    return given.port, given.ticket, given.answer


@asynccontextmanager
async def hand(server: LineServer, *, agreed: bool = True) -> AsyncIterator[socket.socket]:
    """A connection to the port, with a line or without."""
    port, ticket, answer = await ticket_of(server)
    if agreed:
        before = server.num_lines
        connection = await asyncio.to_thread(tcp.call, "127.0.0.1", port, ticket, answer)
        await until(lambda: server.num_lines > before)
    else:
        connection = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port), 5.0)
    connection.settimeout(10.0)
    try:
        yield connection
    finally:
        connection.close()


async def ended(connection: socket.socket) -> bool:
    """Whether the other side ends it, and says nothing before."""
    try:
        return not await asyncio.to_thread(connection.recv, 1)
    except ConnectionError:
        return True
