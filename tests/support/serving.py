"""A pool behind real gRPC in this process: each shard an engine and a server, a controller and its server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from mempool.client import GrpcDialer, Router
from mempool.controller import Controller
from mempool.server import LookupCoordinator, Server, ShardViews
from mempool.shard import Engine
from mempool.types import HeartbeatRequest, ShardHost, ShardInfo
from mempool.wire.channels.channel import MAX_ANSWER_BYTES, MAX_MESSAGE_BYTES
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.line_channel import LineChannels
from mempool.wire.channels.tls import ClientTls, ServerTls

CONTROLLER_KEY = "for controllers only"


@dataclass
class ServedShard:
    """One shard of it."""

    engine: Engine
    server: Server
    info: ShardInfo


class ServedPool:
    """A pool of served shards; its own launcher."""

    def __init__(
        self,
        *,
        token: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        tls: tuple[ServerTls, ClientTls] | tuple[None, None] = (None, None),
        near: bool = False,
        tcp: bool = False,
        **server_options: Any,
    ) -> None:
        self.token = token
        self.tls, client_tls = tls
        self.server_options = server_options
        self.max_message_bytes = max_message_bytes
        channels = GrpcChannels(token=token, controller_key=CONTROLLER_KEY, tls=client_tls)
        self.near, self.tcp = near, tcp
        self.dialer = GrpcDialer(LineChannels(grpc=channels, near=near, tcp=tcp))
        self.shards: dict[int, ServedShard] = {}
        self.controller = Controller("served", launcher=self, dial=self.dialer.dial)
        self.server = Server(token=token, tls=self.tls)
        self.address = ""
        self._incarnation = 0

    def dial(self, info: ShardInfo) -> ShardHost:
        return self.dialer.dial(info)

    async def require_room(self, shards: int) -> None:
        """There is room."""

    async def keep_wanted(self, shards: int) -> None:
        """Nobody will ask."""

    async def starting(self) -> str:
        return ""

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:  # noqa: ARG002
        self._incarnation += 1
        server = Server(
            token=self.token,
            controller_key=CONTROLLER_KEY,
            tls=self.tls,
            max_message_bytes=self.max_message_bytes,
            line_ports=[0] if self.tcp else None,
            **self.server_options,
        )
        port = server.bind("127.0.0.1", [0])
        info = ShardInfo(shard=shard, address=f"127.0.0.1:{port}", incarnation=self._incarnation)
        engine = Engine(info, peers=self.dial, max_message_bytes=MAX_MESSAGE_BYTES, max_answer_bytes=MAX_ANSWER_BYTES)
        views = ShardViews("served", shard=engine, dial=self.dial, controller=self.address)
        router = Router(views, dial=self.dial, pool="served")
        lookup = LookupCoordinator(router, info=info).lookup
        await server.start(
            shard=engine,
            pool=views,
            lookup=lookup,
            address=info.address if self.near else "",
            at_once=engine.at_once,
        )
        self.shards[shard] = ServedShard(engine=engine, server=server, info=info)
        return info

    async def stop(self, info: ShardInfo) -> None:
        served = self.shards.pop(info.shard)
        await served.server.stop(0)
        await served.engine.close()

    async def serve(self) -> None:
        """Serve the controller."""
        port = self.server.bind("127.0.0.1", [0])
        self.address = f"127.0.0.1:{port}"
        router = Router(self.controller, dial=self.dial, pool="served")
        await self.server.start(shard=None, pool=self.controller, lookup=LookupCoordinator(router).lookup)


@asynccontextmanager
async def served_pool(
    num_shards: int, *, token: str | None = None, max_message_bytes: int = MAX_MESSAGE_BYTES, **options: Any
) -> AsyncIterator[ServedPool]:
    """A pool that is served, until the block ends. Runs on the IO loop. Options: of ``ServedPool``."""
    pool = ServedPool(token=token, max_message_bytes=max_message_bytes, **options)
    await pool.serve()
    await pool.controller.open(num_shards)
    try:
        yield pool
    finally:
        await pool.server.stop(0)
        await pool.controller.close()
        await pool.dialer.close()


async def require_line(host: ShardHost, info: ShardInfo, *, near: bool) -> None:
    """Ask until calls go by a line, with shared memory or over TCP."""
    channel = host._channel  # type: ignore[attr-defined]
    async with asyncio.timeout(20):
        while not (channel.is_near if near else channel.is_tcp):
            await host.heartbeat(HeartbeatRequest(incarnation=info.incarnation, group="g", rank=0))
            await asyncio.sleep(0.02)
