"""Calls through shared memory: answered, refused, given up and broken off as those by gRPC are, and nothing is left."""

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import torch

from mempool.errors import DeadlineExceeded, Internal, InvalidRequest, NotFound, RequestTooLarge, ShardUnavailable
from mempool.observe import Stages
from mempool.server.lines import server as near_server
from mempool.server.lines.server import LineServer
from mempool.types import (
    Envelope,
    GatherReply,
    GatherRequest,
    HeartbeatReply,
    HeartbeatRequest,
    ReadRowsReply,
    ReadRowsRequest,
    Stamp,
)
from mempool.types.caller import current_caller
from mempool.wire import methods
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.line_channel import MOST_LINES, MOST_REQUEST_BYTES, LineChannel
from mempool.wire.channels.loop import run
from mempool.wire.lines import handshake
from mempool.wire.lines.framing import MOST_INLINE_BYTES, REQUEST, Message, header_of
from mempool.wire.lines.line import _KEPT_BYTES, ClientLine, supported
from mempool.wire.lines.memory import MEMORY_BYTES
from mempool.wire.lines.shared import SHARED_FROM_BYTES

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
async def serving(
    token: str | None = None, at_once: Any = None, max_message_bytes: int = 2**22, **calls: Call
) -> AsyncIterator[LineServer]:
    """A server that nobody reaches by gRPC."""
    known = {methods.READ_ROWS.path: calls.get("rows", rows)}
    known |= {
        method.path: calls[name]
        for name, method in (("heartbeat", methods.HEARTBEAT), ("gather", methods.GATHER))
        if name in calls
    }
    server = LineServer(
        f"127.0.0.1:{10**6 * os.getpid() + next(_ports)}",  # no port of any server
        token=token,
        calls=known,
        at_once=at_once,
        stages=Stages(),
        max_message_bytes=max_message_bytes,
    )
    server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: LineServer, token: str | None = None, address: str = "") -> AsyncIterator[LineChannel]:
    channel = LineChannel(GrpcChannel(address or server._address, shard=0), token=token)
    await opened(channel)
    try:
        async with asyncio.timeout(10):
            while channel.is_near and server._beginning:  # it has its end a moment later
                await asyncio.sleep(0.01)
        yield channel
    finally:
        await channel.close()


async def opened(channel: LineChannel, lines: int = 1) -> None:
    """Let the channel have so many lines, or none."""
    for _ in range(lines):
        channel._open_soon()
        assert channel._opening is not None
        await asyncio.wait([channel._opening])


def line_of(channel: LineChannel) -> ClientLine:
    (line,) = channel._lines
    return line


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


def go(coroutine: Any) -> None:
    run(coroutine, timeout_s=60)


def test_bodies_of_any_size_come_as_they_were_sent_and_leave_nothing() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            (there,) = server._lines.servings
            for count in (0, 1, 300, SHARED_FROM_BYTES // 8, 2**17, 250_000):
                reply = await channel.call(methods.READ_ROWS, asked(count), timeout_s=20)
                assert torch.equal(reply.rows[:, 3], torch.arange(count, dtype=torch.float32))
            await opened(channel, 3)
            for first in range(0, 200, 4):
                some = range(first, first + 4)
                replies = await asyncio.gather(
                    *(channel.call(methods.READ_ROWS, asked(100 * number)) for number in some)
                )
                assert [len(reply.rows) for reply in replies] == [100 * number for number in some]
            del reply, replies
            await channel.call(methods.READ_ROWS, asked(1))
            for line in channel._lines:
                channel._free.remove(line)
                channel._free.append(line)  # each is asked once more, and tells what it needs no more
                await channel.call(methods.READ_ROWS, asked(1))
                assert not line.num_extents
                assert not line._kept
            await until(lambda: not any(each.line.num_extents for each in server._lines.servings))
            assert there in server._lines.servings

    go(main())


def test_answers_lie_where_they_came_until_they_are_let_go_and_are_the_readers_own() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            line, (there,) = line_of(channel), server._lines.servings
            replies = [await channel.call(methods.READ_ROWS, asked(2**16)) for _ in range(12)]  # a MiB each
            assert line._num_kept <= _KEPT_BYTES + 2**20
            assert there.line.num_extents <= _KEPT_BYTES // 2**20 + 1, "the rest was copied out"
            for number, reply in enumerate(replies):
                reply.rows.add_(number)
            for number, reply in enumerate(replies):
                assert torch.equal(reply.rows[:, 0], torch.arange(2**16, dtype=torch.float32) + number)
            replies.clear()
            del reply
            await channel.call(methods.READ_ROWS, asked(1))
            await until(lambda: not there.line.num_extents)

    go(main())


def test_a_request_that_is_larger_than_any_goes_by_grpc_and_one_that_says_so_ends_the_line() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            with pytest.raises(ShardUnavailable):  # there is none
                await channel.call(methods.READ_ROWS, asked(MOST_REQUEST_BYTES // 8 + 1), timeout_s=0.5)
            assert channel.is_near
            line_of(channel)._socket.sendall(header_of(Message(REQUEST, 1), MOST_INLINE_BYTES + 1))
            await until(lambda: not server.num_lines)
            with pytest.raises(ShardUnavailable, match="its process died"):
                await channel.call(methods.READ_ROWS, asked(1))
            assert not channel.is_near

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
                await channel.call(methods.READ_ROWS, asked(300_000))

    go(main())


def test_who_is_late_or_gives_up_ends_the_line_and_no_answer_is_taken_for_another() -> None:
    deadlines: list[float | None] = []

    async def waits(_: object) -> ReadRowsReply:
        deadlines.append(current_caller().remaining_s())
        await asyncio.sleep(0.5)
        return await rows(asked(1))

    async def main() -> None:
        async with serving(rows=waits) as server, connected(server) as channel:
            with pytest.raises(DeadlineExceeded, match="did not answer in time"):
                await channel.call(methods.READ_ROWS, asked(3), timeout_s=0.1)
            assert not channel.is_near
            await opened(channel)
            task = asyncio.ensure_future(channel.call(methods.READ_ROWS, asked(2**15)))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not channel.is_near
            assert deadlines[0] is not None
            assert 0.0 < deadlines[0] <= 0.1
            assert deadlines[1] is None
            await until(lambda: not server.num_lines)

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
            assert not server.num_lines
            with pytest.raises(ShardUnavailable, match=r"does not answer \(its process died"):
                await task
            assert not channel.is_near
            with pytest.raises(ShardUnavailable):
                await channel.call(methods.READ_ROWS, asked(3), timeout_s=0.5)

    go(main())


def test_a_thread_asks_and_waits_itself_and_is_told_nothing_of_what_fails() -> None:
    async def some_fail(request: ReadRowsRequest) -> ReadRowsReply:
        if len(request.ids) == 1:
            raise NotFound("no such table", shard=0)
        return await rows(request)

    async def main() -> None:
        async with serving(rows=some_fail) as server, connected(server) as channel:

            def asks(count: int) -> ReadRowsReply | None:
                wait = channel.begin(methods.READ_ROWS, asked(count), timeout_s=5.0)
                return None if wait is None else wait()

            for count in (3, 2**17):
                reply = await asyncio.to_thread(asks, count)
                assert reply is not None
                assert torch.equal(reply.rows[:, 0], torch.arange(count, dtype=torch.float32))
            assert await asyncio.to_thread(asks, 1) is None
            assert channel.is_near, "an answer is an answer"
            assert await asyncio.to_thread(asks, MOST_REQUEST_BYTES // 8 + 1) is None
            assert channel.is_near
            await server.stop()
            assert await asyncio.to_thread(asks, 3) is None
            assert await asyncio.to_thread(asks, 3) is None
            assert not channel.is_near

    go(main())


def test_threads_beside_each_other_have_a_line_each_and_never_anothers_answer() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            found: list[int] = []

            def asks(number: int) -> None:
                for turn in range(60):
                    count = 1 + 97 * number + 13 * turn
                    reply = None
                    while reply is None:  # for a line to be opened
                        wait = channel.begin(methods.READ_ROWS, asked(count), timeout_s=5.0, alone=False)
                        reply = None if wait is None else wait()
                        time.sleep(0.001)
                    assert len(reply.rows) == count
                    found.append(count)

            await asyncio.gather(*(asyncio.to_thread(asks, number) for number in range(4)))
            assert len(found) == 4 * 60
            assert 1 < len(channel._lines) <= MOST_LINES

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


def test_memory_that_is_refused_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file of this process may have its number by the second time."""
    closed: list[int] = []
    close = os.close

    def counted(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    def refused(descriptor: int, **_: bool) -> None:
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
            line_of(channel)._socket.sendall(header_of(Message(REQUEST, 1), 2**20, 2**40))
            await until(lambda: not server.num_lines)

    go(main())


def test_lines_are_bounded_and_all_calls_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    most, now, all_here = 0, 0, asyncio.Event()

    async def counts(request: ReadRowsRequest) -> ReadRowsReply:
        nonlocal most, now
        now += 1
        most = max(most, now)
        if most == MOST_LINES:
            all_here.set()
        await asyncio.wait_for(all_here.wait(), 20.0)
        await asyncio.sleep(0.01)
        now -= 1
        return await rows(request)

    async def main() -> None:
        async with serving(rows=counts) as server, connected(server) as channel, AsyncExitStack() as stack:
            await opened(channel, MOST_LINES - 1)
            for _ in range(20):
                await asyncio.gather(*(channel.call(methods.READ_ROWS, asked(5000)) for _ in range(MOST_LINES)))
            assert most == MOST_LINES == server.num_lines
            monkeypatch.setattr(near_server, "MOST_LINES", 2 * MOST_LINES)
            await opened(await stack.enter_async_context(connected(server)), MOST_LINES - 1)
            await until(lambda: server.num_lines == 2 * MOST_LINES)
            async with connected(server) as other:
                assert not other.is_near

    go(main())


def test_a_client_that_is_killed_leaves_nothing() -> None:
    script = (
        "import asyncio, sys; from mempool.wire.channels.line_channel import LineChannel\n"
        "from mempool.wire.channels.grpc_channel import GrpcChannel; from mempool.wire import methods\n"
        "from mempool.types import HeartbeatRequest\n"
        "async def main():\n"
        "    channel = LineChannel(GrpcChannel(sys.argv[1], shard=0), token=None)\n"
        "    channel._open_soon(); await asyncio.wait([channel._opening])\n"
        "    await channel.call(methods.HEARTBEAT, HeartbeatRequest(incarnation=1, group='g', rank=0))\n"
        "asyncio.run(main())\n"
    )
    came = asyncio.Event()

    async def waits(_: HeartbeatRequest) -> HeartbeatReply:
        came.set()
        await asyncio.sleep(0.5)
        return HeartbeatReply(lease_s=1.0, updates_held=0)

    async def main() -> None:
        async with serving(heartbeat=waits) as server:
            descriptors = len(os.listdir("/proc/self/fd"))
            child = subprocess.Popen([sys.executable, "-c", script, server._address])
            try:
                async with asyncio.timeout(40):
                    await came.wait()
                    assert server.num_lines == 1
                    child.send_signal(signal.SIGKILL)
                    while server.num_lines:
                        await asyncio.sleep(0.01)
            finally:
                child.kill()
                await asyncio.to_thread(child.wait)
            assert len(os.listdir("/proc/self/fd")) <= descriptors

    go(main())


class Written:
    """A shard that answers at once, in the memory that it is given, or beside it.

    Attributes:
        where: "there", "beside", or "late": it has taken the memory, and then cannot answer.
        given: What it was given, each time.
    """

    def __init__(self) -> None:
        self.where = "there"
        self.given: list[torch.Tensor | None] = []

    def gather(self, request: GatherRequest, *, space: Any, **_: object) -> GatherReply | None:
        count = request.ids.shape[0]
        memory = space((count, 8), torch.float32)
        self.given.append(memory)
        if self.where == "late":
            return None
        values = torch.empty(count, 8) if memory is None or self.where == "beside" else memory
        values[:] = request.ids.to(torch.float32)[:, None]
        return GatherReply(stamp=STAMP, blocks=tuple(range(request.lookup_id)), values=values)

    def update(self, *_: object, **__: object) -> None:
        return None

    def line_up_gather(self, request: GatherRequest, *, space: Any, tell: Any, **_: object) -> Any:
        memory = space((request.ids.shape[0], 8), torch.float32)
        self.given.append(memory)
        tell(None, None)
        return lambda: None

    def take_turn(self) -> bool:
        return False

    def hand_over(self) -> None:
        pass


@pytest.mark.parametrize("num_blocks", [1, 2, 2000])
@pytest.mark.parametrize("where", ["there", "beside", "late"])
def test_answers_are_written_where_they_are_sent_from(where: str, num_blocks: int) -> None:
    shard = Written()

    async def gathered(request: GatherRequest) -> GatherReply:
        values = request.ids.to(torch.float32)[:, None].expand(-1, 8).contiguous()
        return GatherReply(stamp=STAMP, blocks=tuple(range(request.lookup_id)), values=values)

    def asks(count: int) -> GatherRequest:
        ids = torch.arange(count)
        offsets = torch.arange(count + 1)
        return GatherRequest(
            envelope=ENVELOPE, lookup_id=num_blocks, ids=ids, weights=None, offsets=offsets, remember=False
        )

    async def main() -> None:
        async with serving(gather=gathered, at_once=shard) as server, connected(server) as channel:
            (there,) = server._lines.servings
            for turn in range(30):
                shard.where = where if turn % 3 else "there"
                count = (1, 40_000, 3, 100_000)[turn % 4]
                reply = await channel.call(methods.GATHER, asks(count), timeout_s=20)
                assert reply.blocks == tuple(range(num_blocks))
                assert torch.equal(reply.values, torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 8))
                assert (shard.given[-1] is None) == (count < 1000)
            del reply
            shard.given.clear()
            shard.where = "there"
            await channel.call(methods.GATHER, asks(1), timeout_s=20)
            await channel.call(methods.GATHER, asks(1), timeout_s=20)
            assert there.line.num_extents == 0
            free = there.line._shared._sent._extents._free
            assert free == [(0, MEMORY_BYTES)], "nothing of it is taken any more"

    go(main())
