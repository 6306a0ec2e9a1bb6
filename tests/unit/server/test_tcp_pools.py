"""Lines over TCP to real servers: the token lets in, status says who comes how, gRPC answers where there is none."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificates
from serving import ServedPool, require_line, served_pool

from mempool.client.transport.shard import GrpcShard
from mempool.errors import Unauthenticated
from mempool.server.services import Services
from mempool.types import HeartbeatRequest, ShardStatus
from mempool.wire import methods
from mempool.wire.channels import line_channel
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.line_channel import LineChannel
from mempool.wire.channels.loop import run
from mempool.wire.channels.tls import ClientTls, ServerTls
from mempool.wire.codecs.lines import OpenedLine, OpenLine
from mempool.wire.lines.framing import VERSION
from mempool.wire.lines.line import can_be_served

pytestmark = pytest.mark.skipif(not can_be_served(), reason="this system serves no lines")

ASKED = OpenLine(version=VERSION, client=1)


@asynccontextmanager
async def channel_to(pool: ServedPool, **ways: bool) -> AsyncIterator[LineChannel]:
    """A client of its first shard."""
    channel = LineChannel(GrpcChannel(pool.shards[0].info.address, shard=0, token=pool.token), token=pool.token, **ways)
    try:
        yield channel
    finally:
        await channel.close()


async def beats(channel: LineChannel) -> None:
    await channel.call(methods.HEARTBEAT, HeartbeatRequest(incarnation=1, group="g", rank=0), timeout_s=20)


async def settled(channel: LineChannel) -> None:
    """A few calls, and a line if there is one."""
    for _ in range(3):
        await beats(channel)
        await asyncio.sleep(0.02)
        if channel._opening is not None:
            await asyncio.wait([channel._opening])
    await beats(channel)


def test_status_says_who_comes_how() -> None:
    async def main() -> None:
        async with served_pool(1, token="sesame", near=True, tcp=True) as pool:
            info = pool.shards[0].info

            async def status() -> ShardStatus:
                return await pool.dial(info).status()

            before = await status()
            assert (before.near_clients, before.tcp_line_clients) == (0, 0)
            async with channel_to(pool, near=False) as far, channel_to(pool) as here, channel_to(pool) as other:
                host = GrpcShard(info, far)
                await require_line(host, info, near=False)
                await settled(here)
                await settled(other)
                assert (here.is_near, here.is_tcp) == (True, False), "memory is the better way, where it can be had"
                assert (far.is_near, far.is_tcp) == (False, True)
                now = await status()
                assert (now.near_clients, now.tcp_line_clients) == (1, 1), "processes are counted"
            for _ in range(500):
                now = await status()
                if not (now.near_clients or now.tcp_line_clients):
                    break
                await asyncio.sleep(0.01)
            assert (now.near_clients, now.tcp_line_clients) == (0, 0)

    run(main(), 60)


def test_without_the_token_nobody_gets_a_ticket() -> None:
    async def main() -> None:
        async with served_pool(1, token="sesame", tcp=True) as pool:
            for token in (None, "another"):
                async with GrpcChannel(pool.shards[0].info.address, shard=0, token=token) as channel:
                    with pytest.raises(Unauthenticated):
                        await channel.call(methods.OPEN_LINE, ASKED, timeout_s=20)

    run(main(), 60)


@pytest.mark.parametrize("what", ["none are served", "an older server", "a firewall"])
def test_where_there_is_none_calls_go_by_grpc(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[object] = []
    memory, call = Services.memory, line_channel.lines_over_tcp.call

    def older(self: Services, *args: Any, **options: Any) -> Any:
        return {name: handler for name, handler in memory(self, *args, **options).items() if name != "OpenLine"}

    def refused(*args: Any, **options: Any) -> Any:
        tries.append(args)
        if what == "a firewall":
            raise ConnectionRefusedError
        return call(*args, **options)

    if what == "an older server":
        monkeypatch.setattr(Services, "memory", older)
    monkeypatch.setattr(line_channel.lines_over_tcp, "call", refused)

    async def main() -> None:
        async with (
            served_pool(1, token="sesame", tcp=what != "none are served") as pool,
            channel_to(pool, near=False) as channel,
        ):
            await settled(channel)
            assert not channel.is_tcp
            assert channel._tcp_from_s > asyncio.get_running_loop().time() + 60.0
            assert len(tries) == (what == "a firewall")

    run(main(), 60)


def test_an_encrypted_pool_has_none(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    tls = ServerTls(certificate=certificates.certificate.read_bytes(), key=certificates.key.read_bytes())
    known = ClientTls(authority=certificates.authority.read_bytes())

    async def main() -> None:
        async with served_pool(1, token="sesame", tls=(tls, known), near=True, tcp=True) as pool:
            async with GrpcChannel(pool.shards[0].info.address, shard=0, token="sesame", tls=known) as channel:
                found = await channel.call(methods.OPEN_LINE, ASKED, timeout_s=20)
            assert isinstance(found, OpenedLine)
            assert not found.port
            assert not found.ticket
            assert "encrypted" in found.why
            assert pool.shards[0].server._lines is not None
            assert not pool.shards[0].server._lines.port

    run(main(), 60)
