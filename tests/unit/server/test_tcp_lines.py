"""Calls by lines over TCP: answered, refused, given up and broken off as those by gRPC are, whatever the system takes
at a time; and what happens where there is no such line."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from mempool.errors import DeadlineExceeded, Internal, NotFound, RequestTooLarge, ShardUnavailable
from mempool.types import GatherReply, GatherRequest, ReadRowsReply, ReadRowsRequest
from mempool.wire import methods
from mempool.wire.channels import line_channel
from mempool.wire.channels.grpc_channel import GrpcChannel, GrpcChannels
from mempool.wire.channels.line_channel import LineChannel, LineChannels
from mempool.wire.channels.tls import ClientTls
from mempool.wire.codecs.lines import OpenedLine, OpenLine
from mempool.wire.lines import tcp
from mempool.wire.lines.buffers import LARGEST_BYTES
from mempool.wire.lines.framing import MOST_REQUEST_BYTES, VERSION
from mempool.wire.lines.line import can_be_served, supported

from .tcp_clients import Asked, connected_by_tcp, hand
from .test_near import STAMP, asked, connected, go, opened, rows, serving, until
from .test_near_deaths import gather

pytestmark = pytest.mark.skipif(not can_be_served(), reason="this system serves no lines")

COUNTS = (0, 1, 300, 3000, 2**17, 250_000, MOST_REQUEST_BYTES // 8 - 100)
"""Of ids; each is answered by twice as many bytes."""


def is_right(reply: ReadRowsReply | None, count: int) -> bool:
    return reply is not None and torch.equal(
        reply.rows, torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 4)
    )


@pytest.mark.parametrize("buffer_bytes", [None, 4096])
def test_bodies_of_any_size_come_as_they_were_sent_and_leave_nothing(buffer_bytes: int | None) -> None:
    """Also where the system takes little at a time, so that all of it goes and comes in parts."""

    async def main() -> None:
        async with serving(max_message_bytes=2**24) as server:
            server.listen("127.0.0.1", [0])
            async with connected_by_tcp(server) as channel:
                (line,), (there,) = channel._lines, server._lines.servings
                if buffer_bytes is not None:
                    for end in (line._socket, there.line._socket):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
                assert line._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert there.line._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

                def asks(count: int) -> Any:
                    wait = channel.begin(methods.READ_ROWS, asked(count), timeout_s=20.0)
                    return None if wait is None else wait()

                for count in COUNTS if buffer_bytes is None else (300, 2**14):
                    assert is_right(await channel.call(methods.READ_ROWS, asked(count), timeout_s=20), count)
                    assert is_right(await asyncio.to_thread(asks, count), count)
                assert not channel.is_near
                assert server.num_clients(near=False) == 1
                assert server.num_clients(near=True) == 0
                await until(lambda: not server._lines._room.used_bytes and not server._buffers.num_lent)
                await until(lambda: not channel._buffers.num_lent)
                assert all(len(kept) <= LARGEST_BYTES for kept in (*server._buffers._free, *channel._buffers._free))

    go(main())


def test_replies_are_the_readers_own() -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with connected_by_tcp(server) as channel:
                replies = [await channel.call(methods.READ_ROWS, asked(2**14)) for _ in range(5)]
                for number, reply in enumerate(replies):
                    reply.rows.add_(number)
                right = torch.arange(2**14, dtype=torch.float32)
                for number, reply in enumerate(replies):
                    assert torch.equal(reply.rows[:, 1], right + number)

    go(main())


def test_threads_beside_each_other_have_a_line_each_and_never_anothers_answer() -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with connected_by_tcp(server) as channel:
                found: list[int] = []

                def asks(number: int) -> None:
                    for turn in range(40):
                        count = 1 + 997 * number + 13 * turn
                        reply = None
                        while reply is None:  # for a line to be opened
                            wait = channel.begin(methods.READ_ROWS, asked(count), timeout_s=5.0, alone=False)
                            reply = None if wait is None else wait()
                            time.sleep(0.001)
                        assert is_right(reply, count)
                        found.append(count)

                await asyncio.gather(*(asyncio.to_thread(asks, number) for number in range(4)))
                assert len(found) == 4 * 40
                assert 1 < len(channel._lines) <= line_channel.MOST_LINES
                assert server.num_clients(near=False) == 1, "they are one process's"

    go(main())


def test_errors_are_told_as_by_grpc() -> None:
    async def fails(request: ReadRowsRequest) -> ReadRowsReply:
        if len(request.ids) == 300_000:
            return await rows(request)
        raise [NotFound("no such table", shard=0), KeyError("a bug")][len(request.ids)]

    async def main() -> None:
        async with serving(rows=fails) as server:
            server.listen("127.0.0.1", [0])
            async with connected_by_tcp(server) as channel:
                with pytest.raises(NotFound, match="no such table"):
                    await channel.call(methods.READ_ROWS, asked(0))
                with pytest.raises(Internal, match="KeyError"):
                    await channel.call(methods.READ_ROWS, asked(1))
                with pytest.raises(RequestTooLarge, match="the answer to ReadRows would have"):
                    await channel.call(methods.READ_ROWS, asked(300_000))
                with pytest.raises(ShardUnavailable, match="by gRPC nobody"):  # larger ones go that way
                    await channel.call(methods.READ_ROWS, asked(MOST_REQUEST_BYTES // 8 + 1))
                assert channel.is_tcp

    go(main())


def test_who_is_late_or_gives_up_ends_the_line_and_its_call() -> None:
    async def main() -> None:
        begun, over = asyncio.Event(), asyncio.Event()

        async def waits(_: object) -> ReadRowsReply:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                over.set()
            raise AssertionError

        async with serving(rows=waits) as server, asyncio.timeout(20):
            server.listen("127.0.0.1", [0])
            async with connected_by_tcp(server) as channel:
                with pytest.raises(DeadlineExceeded, match="did not answer in time"):
                    await channel.call(methods.READ_ROWS, asked(2**15), timeout_s=0.2)
                assert not channel.is_tcp
                await over.wait()
                begun.clear(), over.clear()
                await opened(channel)
                task = asyncio.ensure_future(channel.call(methods.READ_ROWS, asked(2**15)))
                await begun.wait()
                task.cancel()
                await over.wait()
                await until(lambda: not server.num_lines and not server._lines._room.used_bytes)

    go(main())


def test_who_lets_go_of_an_answer_before_it_has_come_leaves_no_line_that_is_nobodys() -> None:
    """As a thread does that was interrupted while it waited for another shard's: after eight there would be none."""

    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with connected_by_tcp(server) as channel:

                def asks() -> None:
                    assert channel.begin(methods.READ_ROWS, asked(2**14), timeout_s=20.0) is not None

                await asyncio.to_thread(asks)
                assert not channel._lines
                await until(lambda: not server.num_lines and not server._lines._room.used_bytes)
                await opened(channel)
                assert is_right(await channel.call(methods.READ_ROWS, asked(3)), 3)

    go(main())


def test_more_clients_at_once_than_there_are_tickets_for_come_again_soon() -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            now_s = 0.0
            server._tickets._clock = lambda: now_s
            for _ in range(tcp.MOST_TICKETS):
                assert (await server.open_line(OpenLine(version=VERSION, client=1))).port
            channel = LineChannel(Asked(server), token=None, near=False)
            await opened(channel)
            assert not channel.is_tcp
            assert channel._tcp_from_s < time.monotonic() + 10.0
            now_s, channel._tcp_from_s = tcp.TICKET_S, 0.0
            await opened(channel)
            assert channel.is_tcp
            await channel.close()

    go(main())


class Written:
    """A shard that answers at once, in the memory that it is given, and remembers where that was."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def gather(self, request: GatherRequest, *, space: Any, **_: object) -> GatherReply:
        values = space((request.lookup_id, 256), torch.float32)
        assert values is not None
        self.places.append(values.data_ptr())
        values[:] = float(len(self.places))
        return GatherReply(stamp=STAMP, blocks=(0,), values=values)


def test_answers_are_written_to_the_same_memory_again() -> None:
    """What is new from the system costs a fault for each page."""
    shard = Written()

    async def main() -> None:
        async with serving(gather=rows, at_once=shard) as server:
            server.listen("127.0.0.1", [0])
            async with connected_by_tcp(server) as channel:
                received: set[int] = set()
                for number in range(1, 20):
                    request = gather(lookup_id=1000)
                    reply = await channel.call(methods.GATHER, request, timeout_s=20)
                    assert (reply.values == float(number)).all()
                    received.add(reply.values.data_ptr())
                    del reply
                assert len(received) == 1

    go(main())
    assert len(set(shard.places)) <= 2


def test_a_server_that_is_killed_ends_its_calls() -> None:
    script = (  # it agrees, and answers nothing
        "import socket, sys\n"
        "listening = socket.create_server(('127.0.0.1', 0))\n"
        "print(listening.getsockname()[1], flush=True)\n"
        "connection, _ = listening.accept()\n"
        "connection.recv(48, socket.MSG_WAITALL)\n"
        "connection.sendall(bytes.fromhex(sys.argv[1]))\n"
        "connection.recv(1)\n"
        "print('asked', flush=True)\n"
        "connection.recv(10**6)\n"
        "input()\n"
    )
    secret = bytes(range(tcp.SECRET_BYTES))

    async def main(child: "subprocess.Popen[str]") -> None:
        assert child.stdout is not None
        port = int(await asyncio.to_thread(child.stdout.readline))
        async with serving() as server:
            grpc = Asked(server)
            grpc.given = OpenedLine(port=port, ticket=secret, answer=secret)
            channel = LineChannel(grpc, token=None, near=False)
            await opened(channel)
            task = asyncio.ensure_future(channel.call(methods.READ_ROWS, asked(MOST_REQUEST_BYTES // 8 - 100)))
            assert await asyncio.to_thread(child.stdout.readline) == "asked\n"
            child.send_signal(signal.SIGKILL)
            with pytest.raises(ShardUnavailable, match="its process died"):
                await task
            assert not channel.is_tcp
            await channel.close()

    command = [sys.executable, "-S", "-c", script, tcp._hello(secret).hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            go(main(child))
        finally:
            child.kill()


@pytest.mark.parametrize(
    "what", ["closed port", "silent", "another server", "no lines", "unknown call", "other version"]
)
def test_where_there_is_no_line_it_is_asked_once_and_much_later(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "TIMEOUT_S", 0.2)

    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            grpc = Asked(server)
            grpc.given = await given(server)
            channel = LineChannel(grpc, token=None, near=False)
            for _ in range(5):
                with pytest.raises(ShardUnavailable, match="by gRPC"):
                    await channel.call(methods.READ_ROWS, asked(1), timeout_s=1.0)
                assert channel.begin(methods.READ_ROWS, asked(1), timeout_s=1.0) is None
                await asyncio.sleep(0.01)
                if channel._opening is not None:
                    await asyncio.wait([channel._opening])
            assert grpc.asked == 1
            assert channel._tcp_from_s > time.monotonic() + 60.0
            channel._tcp_from_s, grpc.given = time.monotonic(), None
            await opened(channel)
            assert channel.is_tcp
            await channel.close()

    async def given(server: Any) -> Any:
        line = await server.open_line(OpenLine(version=VERSION, client=1))
        if what == "closed port":
            with socket.create_server(("127.0.0.1", 0)) as closed:
                return OpenedLine(port=closed.getsockname()[1], ticket=line.ticket, answer=line.answer)
        if what == "silent":
            listening.listen()
            return OpenedLine(port=listening.getsockname()[1], ticket=line.ticket, answer=line.answer)
        if what == "another server":
            return OpenedLine(port=line.port, ticket=line.ticket, answer=bytes(32))
        if what == "unknown call":
            return Internal("it does not know this call")
        if what == "other version":
            return await server.open_line(OpenLine(version=VERSION + 1, client=1))
        return OpenedLine(why="it has none")

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        go(main())


def test_with_encryption_there_are_no_lines() -> None:
    async def main() -> None:
        tls = ClientTls(authority=b"none that is used")
        channel = LineChannels(grpc=GrpcChannels(tls=tls), near=False)("127.0.0.1:1", shard=0)
        assert isinstance(channel, GrpcChannel)
        await channel.close()
        channel = LineChannels(grpc=GrpcChannels(tls=tls))("127.0.0.1:1", shard=0)
        assert isinstance(channel, LineChannel)
        assert channel._tcp_from_s == float("inf")
        await channel.close()

    go(main())


def test_a_child_process_is_another_client() -> None:
    pid = os.fork()
    if not pid:
        os._exit(int(line_channel.client_number() == before_fork))
    assert os.waitpid(pid, 0)[1] == 0
    assert line_channel.client_number() == before_fork


before_fork = line_channel.client_number()


def test_a_child_process_keeps_no_line_alive_that_its_parent_has_ended() -> None:
    """As a DataLoader's worker does, which lives as long as the training."""

    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with connected_by_tcp(server) as by_tcp, connected(server) as near:
                lines = [*by_tcp._lines, *near._lines]
                assert [line.is_near for line in lines] == [False, True][: 1 + supported()]
                of_child = [os.dup(line._socket.fileno()) for line in lines]
                try:
                    by_tcp._end_free()
                    near._end_free()
                    await until(lambda: not server.num_lines)
                finally:
                    for descriptor in of_child:
                        os.close(descriptor)

    go(main())


def test_lines_that_nobody_ended_are_none_after_the_server() -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with hand(server) as ours:
                await server.stop()
                assert not ours.recv(1)
            given = await server.open_line(OpenLine(version=VERSION, client=1))
            assert not given.port
            assert "ending" in given.why

    go(main())
