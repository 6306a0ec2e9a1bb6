"""Calls through shared memory: answered, refused, given up and broken off as those by gRPC are, and nothing is left."""

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from mempool.errors import DeadlineExceeded, Internal, InvalidRequest, NotFound, RequestTooLarge, ShardUnavailable
from mempool.observe import Stages
from mempool.server.admission import Admission
from mempool.server.near import _MOST_CALLS, _MOST_LINES, NearServer
from mempool.types import Envelope, HeartbeatReply, HeartbeatRequest, ReadRowsReply, ReadRowsRequest, Stamp
from mempool.types.caller import current_caller
from mempool.wire import methods
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.loop import run
from mempool.wire.channels.near_channel import NearChannel
from mempool.wire.near import handshake
from mempool.wire.near.framing import MOST_REQUEST_BYTES, REQUEST, Message
from mempool.wire.near.line import SHARED_FROM_BYTES, supported

pytestmark = pytest.mark.skipif(not supported(), reason="this system has no such memory")

STAMP = Stamp(shard=0, incarnation=1, epoch=1, table_version=0)
ENVELOPE = Envelope(table_id=1, epoch=1, incarnation=1)
_ports = itertools.count(1)
Call = Callable[[Any], Awaitable[Any]]


async def rows(request: ReadRowsRequest) -> ReadRowsReply:
    """As many rows of four as ids, each its id."""
    found = request.ids.to(torch.float32)[:, None].expand(-1, 4).contiguous()
    return ReadRowsReply(stamp=STAMP, blocks=(0,), rows=found)


def asked(count: int) -> ReadRowsRequest:
    return ReadRowsRequest(envelope=ENVELOPE, array="values", ids=torch.arange(count))


@asynccontextmanager
async def serving(token: str | None = None, **calls: Call) -> AsyncIterator[NearServer]:
    """A server that nobody reaches by gRPC."""
    known = {methods.READ_ROWS.path: calls.get("rows", rows)}
    if "heartbeat" in calls:
        known[methods.HEARTBEAT.path] = calls["heartbeat"]
    server = NearServer(
        f"127.0.0.1:{10**6 * os.getpid() + next(_ports)}",  # no port of any server
        token=token,
        calls=known,
        admission=Admission(budget_bytes=2**30, message_bytes=2**28),
        stages=Stages(),
        max_message_bytes=2**22,
    )
    server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: NearServer, token: str | None = None, address: str = "") -> AsyncIterator[NearChannel]:
    channel = NearChannel(GrpcChannel(address or server._address, shard=0), token=token)
    channel._open_soon()
    assert channel._opening is not None
    await asyncio.wait([channel._opening])
    try:
        async with asyncio.timeout(10):
            while channel.is_near and server._beginning:  # it has its end a moment later
                await asyncio.sleep(0.01)
        yield channel
    finally:
        await channel.close()


def go(coroutine: Any) -> None:
    run(coroutine, timeout_s=60)


def test_bodies_of_any_size_come_as_they_were_sent_and_leave_nothing() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            assert channel.is_near
            line, (there,) = channel._line, server._lines
            assert line is not None
            assert there._line is not None
            for count in (0, 1, 300, SHARED_FROM_BYTES // 8, 2**17, 250_000):
                reply = await channel.call(methods.READ_ROWS, asked(count), timeout_s=20)
                assert torch.equal(reply.rows[:, 3], torch.arange(count, dtype=torch.float32))
            many = [channel.call(methods.READ_ROWS, asked(100 * number)) for number in range(200)]
            for number, reply in enumerate(await asyncio.gather(*many)):
                assert len(reply.rows) == 100 * number
            async with asyncio.timeout(10):
                while line._extents or there._line._extents or there._tasks or server._admission.active:
                    await asyncio.sleep(0.01)

    go(main())


def test_a_request_that_is_larger_than_any_goes_by_grpc_and_one_that_says_so_ends_the_line() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            with pytest.raises(ShardUnavailable):  # there is none
                await channel.call(methods.READ_ROWS, asked(MOST_REQUEST_BYTES // 8 + 1), timeout_s=0.5)
            assert channel.is_near
            line = channel._line
            assert line is not None
            assert line._transport is not None
            line._transport.write(Message(REQUEST, 1, num_bytes=MOST_REQUEST_BYTES + 1).header())
            async with asyncio.timeout(10):
                while channel.is_near or server.num_lines:
                    await asyncio.sleep(0.01)

    go(main())


def test_errors_are_told_as_by_grpc() -> None:
    async def fails(request: ReadRowsRequest) -> ReadRowsReply:
        raise [NotFound("no such table", shard=0), KeyError("a bug")][len(request.ids)]

    async def main() -> None:
        async with serving(rows=fails) as server, connected(server) as channel:
            with pytest.raises(NotFound, match="no such table") as told:
                await channel.call(methods.READ_ROWS, asked(0))
            assert told.value.shard == 0
            with pytest.raises(Internal, match="KeyError"):
                await channel.call(methods.READ_ROWS, asked(1))
        async with serving() as server, connected(server) as channel:
            with pytest.raises(RequestTooLarge, match="the answer to ReadRows would have"):
                await channel.call(methods.READ_ROWS, asked(2**20))

    go(main())


def test_who_is_late_or_gives_up_is_told_to_the_server() -> None:
    ended: list[str] = []
    deadlines: list[float | None] = []

    async def waits(_: object) -> ReadRowsReply:
        deadlines.append(current_caller().remaining_s())
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        raise AssertionError

    async def main() -> None:
        async with serving(rows=waits) as server, connected(server) as channel:
            with pytest.raises(DeadlineExceeded, match="did not answer in time"):
                await channel.call(methods.READ_ROWS, asked(3), timeout_s=0.1)
            task = asyncio.ensure_future(channel.call(methods.READ_ROWS, asked(2**15)))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.1)
            assert ended == ["cancelled"] * 2
            assert deadlines[0] is not None
            assert 0.0 < deadlines[0] <= 0.1
            assert deadlines[1] is None
            assert channel._line is not None
            assert not channel._line._extents, "the memory of what was given up is free again"

    go(main())


def test_a_server_that_ends_ends_its_calls_and_grpc_is_asked_then() -> None:
    async def waits(_: object) -> ReadRowsReply:
        await asyncio.sleep(60)
        raise AssertionError

    async def main() -> None:
        async with serving(rows=waits) as server, connected(server) as channel:
            task = asyncio.ensure_future(channel.call(methods.READ_ROWS, asked(3)))
            await asyncio.sleep(0.1)
            await server.stop()
            with pytest.raises(ShardUnavailable, match=r"does not answer \(its process died"):
                await task
            assert not channel.is_near
            with pytest.raises(ShardUnavailable):
                await channel.call(methods.READ_ROWS, asked(3), timeout_s=0.5)

    go(main())


@pytest.mark.parametrize(("token", "address"), [("another", ""), (None, ""), ("right", "10.1.2.3:{port}")])
def test_who_is_no_client_of_it_gets_no_line(token: str | None, address: str) -> None:
    async def main() -> None:
        async with serving("right") as server:
            port = server._address.rpartition(":")[2]
            async with connected(server, token, address.format(port=port)) as channel:
                assert not channel.is_near
                assert server.num_lines == 0
            async with connected(server, "right") as channel:
                assert channel.is_near
                await channel.call(methods.READ_ROWS, asked(1))
                assert server.num_lines == 1

    go(main())


def test_a_call_that_is_given_up_before_it_began_leaves_no_memory_taken() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            line = channel._line
            assert line is not None
            task = asyncio.ensure_future(channel.call(methods.READ_ROWS, asked(2**15)))
            await asyncio.sleep(0)  # it is sent, and in the same piece what gives it up
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(10):
                while line._extents:
                    await asyncio.sleep(0.01)

    go(main())


def test_memory_that_is_refused_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file of this process may have its number by the second time."""
    closed: list[int] = []
    close = os.close

    def counted(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    def refused(descriptor: int) -> None:
        raise InvalidRequest(f"memory {descriptor} cannot be shared")

    ours, theirs = socket.socketpair(socket.AF_UNIX)
    descriptor = os.memfd_create("test")
    said = json.dumps({"version": handshake.VERSION, "address": "a:1", "token": None}).encode() + b"\n"
    socket.send_fds(theirs, [said], [descriptor])
    monkeypatch.setattr(handshake, "ReceivedMemory", refused)
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", counted)
        with pytest.raises(InvalidRequest, match="cannot be shared"):
            handshake.answer(ours, "a:1", None)
    assert len(closed) == 1
    assert b"cannot be shared" in theirs.recv(1000)
    close(descriptor)
    ours.close()
    theirs.close()


def test_a_body_that_is_not_in_the_memory_ends_the_line() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            line = channel._line
            assert line is not None
            assert line._transport is not None
            line._transport.write(Message(REQUEST, 1, num_bytes=2**20, place=2**40).header())
            async with asyncio.timeout(10):
                while channel.is_near or server.num_lines:
                    await asyncio.sleep(0.01)

    go(main())


def test_lines_and_calls_at_a_time_are_bounded_and_all_are_answered() -> None:
    most = now = 0

    async def counts(request: ReadRowsRequest) -> ReadRowsReply:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return await rows(request)

    async def main() -> None:
        async with serving(rows=counts) as server, connected(server) as channel:
            await asyncio.gather(*(channel.call(methods.READ_ROWS, asked(5000)) for _ in range(300)))
            assert most <= _MOST_CALLS
            server._lines.update(object() for _ in range(_MOST_LINES - 1))  # type: ignore[misc]
            async with connected(server) as other:
                assert not other.is_near
            server._lines.clear()

    go(main())


def test_a_client_that_is_killed_leaves_nothing() -> None:
    script = (
        "import asyncio, sys; from mempool.wire.channels.near_channel import NearChannel\n"
        "from mempool.wire.channels.grpc_channel import GrpcChannel; from mempool.wire import methods\n"
        "from mempool.types import HeartbeatRequest\n"
        "async def main():\n"
        "    channel = NearChannel(GrpcChannel(sys.argv[1], shard=0), token=None)\n"
        "    channel._open_soon(); await asyncio.wait([channel._opening])\n"
        "    await channel.call(methods.HEARTBEAT, HeartbeatRequest(incarnation=1, group='g', rank=0))\n"
        "asyncio.run(main())\n"
    )
    came, ended = asyncio.Event(), asyncio.Event()

    async def waits(_: HeartbeatRequest) -> HeartbeatReply:
        came.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        raise AssertionError

    async def main() -> None:
        async with serving(heartbeat=waits) as server:
            descriptors = len(os.listdir("/proc/self/fd"))
            child = subprocess.Popen([sys.executable, "-c", script, server._address])
            try:
                async with asyncio.timeout(40):
                    await came.wait()
                    assert server.num_lines == 1
                    child.send_signal(signal.SIGKILL)
                    await ended.wait()
                    while server.num_lines:
                        await asyncio.sleep(0.01)
            finally:
                child.kill()
                await asyncio.to_thread(child.wait)
            assert len(os.listdir("/proc/self/fd")) <= descriptors

    go(main())
