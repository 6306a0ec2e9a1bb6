"""Lines whose clients say odd things, or end before they were begun: nothing of theirs is left at the server."""

import asyncio
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
import torch

from mempool.types import GatherReply, GatherRequest
from mempool.wire import methods
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.line_channel import MOST_LINES, LineChannel
from mempool.wire.lines import handshake
from mempool.wire.lines.line import supported
from mempool.wire.lines.memory import SentMemory

from .test_near import ENVELOPE, STAMP, connected, go, line_of, opened, serving, until

pytestmark = pytest.mark.skipif(not supported(), reason="this system has no such memory")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_client_that_is_gone_when_its_line_begins_takes_nobodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = handshake.answer

    def answered_then_gone(connection: socket.socket, address: str, token: str | None) -> object:
        agreed = answer(connection, address, token)
        connection.shutdown(socket.SHUT_RDWR)
        return agreed

    async def main() -> None:
        async with serving() as server:
            monkeypatch.setattr(handshake, "answer", answered_then_gone)
            for _ in range(20):
                connection, sent, _ = await asyncio.to_thread(handshake.call, server._address, None)
                connection.close()
                sent.close()
            await until(lambda: not server._beginning and not server.num_lines)
            assert server._begun == 20

    go(main())


def test_a_line_that_comes_back_after_the_end_is_closed() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            line = channel._taken()
            assert line is not None
            await channel.close()
            channel._give_back(line)
            assert line._socket.fileno() == -1
            assert not channel._lines

    go(main())


def test_servers_that_are_silent_share_the_time_of_a_call() -> None:
    """As those that were stopped: each is asked, and the second is not waited for as long again."""
    never = asyncio.Event()

    async def silent(_: object) -> None:
        await never.wait()

    def asks(first: LineChannel, second: LineChannel) -> None:
        line = line_of(second)
        waits = [channel.begin(methods.GATHER, gather(), timeout_s=0.4) for channel in (first, second)]
        for wait in waits:
            assert wait is not None
            assert wait() is None
        assert line._timeouts[socket.SO_RCVTIMEO] < 0.2

    async def main() -> None:
        async with (
            serving(gather=silent) as one,
            serving(gather=silent) as other,
            connected(one) as first,
            connected(other) as second,
        ):
            await asyncio.to_thread(asks, first, second)

    go(main())


def test_a_server_that_does_not_agree_takes_part_of_a_calls_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was stopped: the thread that would open a line asks by gRPC, while there is time."""
    given: list[float] = []
    left: list[float] = []
    agrees = handshake.call

    def call(address: str, token: str | None, *, timeout_s: float) -> object:
        given.append(timeout_s)
        return agrees(address, token, timeout_s=timeout_s)

    async def main() -> None:
        address = f"127.0.0.1:{10**6 * os.getpid() + 999}"
        with handshake.listener(handshake.port_of(address)):
            channel = LineChannel(GrpcChannel(address, shard=0), token=None)
            monkeypatch.setattr(handshake, "call", call)
            monkeypatch.setattr(
                channel._grpc, "begin", lambda *_, timeout_s, **__: left.append(timeout_s), raising=False
            )
            await asyncio.to_thread(channel.begin, methods.GATHER, gather(), timeout_s=0.4)
            await channel.close()

    go(main())
    assert given == [0.1]
    assert len(left) == 1
    assert left[0] <= 0.3


def test_threads_that_open_lines_at_once_open_no_more_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    agrees, together = handshake.call, threading.Barrier(3 * MOST_LINES)

    def call(*args: Any, **options: Any) -> object:
        time.sleep(0.1)  # until each of them has found none free
        return agrees(*args, **options)

    async def answers(_: object) -> GatherReply:
        return GatherReply(stamp=STAMP, blocks=(0,), values=torch.ones(1, 4))

    async def main() -> None:
        async with serving(gather=answers) as server:
            channel = LineChannel(GrpcChannel(server._address, shard=0), token=None)
            monkeypatch.setattr(handshake, "call", call)

            def asks() -> bool:
                together.wait(10)
                wait = channel.begin(methods.GATHER, gather(), timeout_s=5.0, alone=False)
                return wait is not None and wait() is not None

            with ThreadPoolExecutor(together.parties) as threads:
                loop = asyncio.get_running_loop()
                answered = await asyncio.gather(*(loop.run_in_executor(threads, asks) for _ in range(together.parties)))
            assert any(answered)
            assert 0 < len(channel._lines) <= MOST_LINES
            await channel.close()

    go(main())


def gather(lookup_id: int = 1) -> GatherRequest:
    offsets = torch.tensor([0, 1])
    return GatherRequest(
        envelope=ENVELOPE, lookup_id=lookup_id, ids=torch.tensor([1]), weights=None, offsets=offsets, remember=False
    )


@pytest.mark.parametrize(
    "said",
    [
        json.dumps({"version": handshake.VERSION, "address": "a:1", "token": "\ud800"}),
        "[" * 16_000,
        json.dumps([handshake.VERSION]),
    ],
    ids=["a token that is no text", "too deep", "no mapping"],
)
def test_what_is_no_handshake_leaves_no_descriptor(said: str) -> None:
    before = descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    memory = SentMemory()
    socket.send_fds(theirs, [said.encode() + b"\n"], [memory.descriptor])
    memory.close()
    del memory  # its mapping has a descriptor, too
    with suppress(Exception):  # it is told, or its line ends
        handshake.answer(ours, "a:1", "right")
    ours.close()
    theirs.close()
    assert descriptors() <= before


def test_a_handshake_that_comes_slowly_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep one of a few threads, and whoever ends the server."""
    monkeypatch.setattr(handshake, "TIMEOUT_S", 0.2)

    async def main() -> None:
        async with serving() as server:
            port = handshake.port_of(server._address)

            def drips() -> int:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.connect(handshake.name_of(port))
                sent = 0
                with connection, suppress(OSError):
                    while sent < 200:
                        connection.send(b"x")
                        sent += 1
                        time.sleep(0.05)
                return sent

            assert await asyncio.to_thread(drips) < 200

    go(main())


def silent(server: object) -> socket.socket:
    """A client that says nothing."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(handshake.name_of(handshake.port_of(server._address)))  # type: ignore[attr-defined]
    return connection


def test_clients_that_say_nothing_hold_up_neither_the_end_nor_other_work_of_the_process() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(serving())
            connections = [silent(server) for _ in range(40)]
            await until(lambda: len(server._beginning) == 40)
            async with asyncio.timeout(handshake.TIMEOUT_S / 2):
                await asyncio.to_thread(int)  # the loop's own threads are free
                await stack.aclose()
            for connection in connections:
                connection.close()

    go(main())


def test_descriptors_that_come_with_a_handshake_are_not_kept_but_one() -> None:
    async def main() -> None:
        async with serving() as server:
            connection, given = silent(server), os.open("/dev/null", os.O_RDONLY)
            await until(lambda: len(server._beginning) == 1)
            before, most = descriptors(), 0
            for _ in range(100):
                socket.send_fds(connection, [b" "], [given])
                await asyncio.sleep(0.002)
                most = max(most, descriptors() - before)
            assert most < 20
            connection.close()
            os.close(given)

    go(main())


def test_a_child_finds_in_its_replies_what_was_there_when_it_was_forked() -> None:
    async def gather(request: GatherRequest) -> GatherReply:
        return GatherReply(stamp=STAMP, blocks=(0,), values=torch.full((64, 256), float(request.lookup_id)))

    def asked(number: int) -> GatherRequest:
        ids, offsets = torch.arange(4), torch.tensor([0, 4])
        return GatherRequest(
            envelope=ENVELOPE, lookup_id=number, ids=ids, weights=None, offsets=offsets, remember=False
        )

    async def main() -> None:
        async with serving(gather=gather) as server, connected(server) as channel:
            line = line_of(channel)
            values = (await channel.call(methods.GATHER, asked(1), timeout_s=5)).values
            assert line.keeps_replies
            here, there = os.pipe()
            go_on, goes_on = os.pipe()
            if (child := os.fork()) == 0:  # it only reads, and is gone
                os.read(go_on, 1)
                os.write(there, bytes([int(values.numpy().min()), int(values.numpy().max())]))
                os._exit(0)
            try:
                del values
                await opened(channel)
                channel._free.rotate()  # whose turn is next is the first one
                for number in (2, 3, 4):
                    await channel.call(methods.GATHER, asked(number), timeout_s=5)
            finally:
                os.write(goes_on, b".")
                found = os.read(here, 2)
                os.waitpid(child, 0)
                for descriptor in (here, there, go_on, goes_on):
                    os.close(descriptor)
            assert found == bytes([1, 1])
            assert line not in channel._lines  # what it still held is given back with it
            assert channel.is_near

    go(main())
