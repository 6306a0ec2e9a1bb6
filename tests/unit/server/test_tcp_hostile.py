"""Whoever reaches the port of lines over TCP: nothing of what is said there is believed, and what one may have the
server hold, or have others wait for, is bounded."""

import asyncio
import socket
import struct
import time

import pytest
import torch

from mempool.errors import Unauthenticated
from mempool.server.lines import server as line_server
from mempool.server.lines import thread
from mempool.server.lines.room import Room
from mempool.types import ReadRowsReply, ReadRowsRequest
from mempool.wire import methods
from mempool.wire.lines import tcp
from mempool.wire.lines.buffers import LARGEST_BYTES, Buffers
from mempool.wire.lines.framing import (
    COPIED,
    MOST_REQUEST_BYTES,
    REPLY,
    REQUEST,
    VERSION,
    Message,
    header_of,
    parsed,
)
from mempool.wire.lines.line import can_be_served
from mempool.wire.lines.methods import METHODS, NUMBERS

from .tcp_clients import connected_by_tcp, ended, hand, ticket_of
from .test_near import asked, go, rows, serving, until

pytestmark = pytest.mark.skipif(not can_be_served(), reason="this system serves no lines")


def hello(ticket: bytes, *, version: int = VERSION, magic: bytes = b"mempool\0") -> bytes:
    return struct.pack("<8sII32s", magic, version, 0, ticket)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: example\r\nUser-Agent: somebody\r\nAccept: */*\r\n\r\n",
        bytes(48),
        hello(bytes(32)),
        hello(b"\xff" * 32),
        hello(bytes(32), version=VERSION + 1),
        hello(bytes(32), magic=b"mempool\n"),
        hello(bytes(32)) + header_of(Message(REQUEST, 1), 100),
    ],
)
def test_who_shows_no_ticket_gets_nothing(said: bytes) -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with hand(server, agreed=False) as ours:
                ours.sendall(said)
                assert await ended(ours)
            assert not server.num_lines
            async with connected_by_tcp(server) as channel:
                assert channel.is_tcp

    go(main())


def test_a_ticket_is_good_once_and_not_for_long() -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            port, ticket, answer = await ticket_of(server)
            connection = await asyncio.to_thread(tcp.call, "127.0.0.1", port, ticket, answer)
            async with hand(server, agreed=False) as again:
                again.sendall(hello(ticket))
                assert await ended(again)
            connection.close()
            now_s = time.monotonic()
            server._tickets._clock = lambda: now_s
            port, ticket, answer = await ticket_of(server)
            now_s += tcp.TICKET_S
            async with hand(server, agreed=False) as late:
                late.sendall(hello(ticket))
                assert await ended(late)

    go(main())


def test_tickets_are_bounded_and_all_differ() -> None:
    now_s = 0.0
    tickets = tcp.Tickets(lambda: now_s)
    given = [tickets.give(1) for _ in range(tcp.MOST_TICKETS)]
    secrets = {secret for one in given if one is not None for secret in (one.ticket, one.answer)}
    assert len(secrets) == 2 * tcp.MOST_TICKETS
    assert tickets.give(1) is None
    assert given[3] is not None
    assert tickets.take(given[3].ticket) is given[3]
    with pytest.raises(Unauthenticated):
        tickets.take(given[3].ticket)
    assert tickets.give(1) is not None
    now_s = tcp.TICKET_S
    assert tickets.give(1) is not None
    assert len(tickets._given) == 1


def test_connections_that_show_nothing_are_few_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(line_server, "_MOST_BEGINNING", 3)

    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            port, ticket, _ = await ticket_of(server)
            began_s = time.monotonic()
            connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
            for connection in connections:
                connection.settimeout(10.0)
                connection.sendall(hello(ticket)[:47])  # all but its end
            assert await ended(connections[3])
            assert await ended(connections[4])
            assert len(server._beginning) == 3
            while len(server._beginning):
                connections[0].sendall(b"") if time.monotonic() < began_s + 5.0 else pytest.fail("it waits still")
                await asyncio.sleep(0.05)
            for connection in connections:
                connection.close()
            async with connected_by_tcp(server) as channel:
                assert channel.is_tcp

    go(main())


READ_ROWS = NUMBERS[methods.READ_ROWS.path]


@pytest.mark.parametrize(
    "said",
    [
        b"\xff" * 32,
        header_of(Message(REQUEST, 1, READ_ROWS), MOST_REQUEST_BYTES + 1),
        header_of(Message(REQUEST, 1, READ_ROWS), 2**63),
        header_of(Message(REQUEST, 1, READ_ROWS), 2**16, 0),
        header_of(Message(COPIED, 1)),
        header_of(Message(COPIED, 1), 2**16) + bytes(2**16),
        header_of(Message(REPLY, 1)),
    ],
    ids=["no message", "too large", "far too large", "in memory", "told of a body", "with a body", "a reply"],
)
def test_what_is_no_message_ends_the_line_and_gives_its_room_back(said: bytes) -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with hand(server) as ours:
                ours.sendall(said)
                assert await ended(ours)
            await until(lambda: not server.num_lines and not server._lines._room.used_bytes)
            await until(lambda: not server._lines._room._used_by)

    go(main())


def test_a_body_that_is_nothing_is_refused_and_the_line_goes_on() -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with hand(server) as ours:
                for body in (b"", b"\xff" * 100, b"\xff" * (1 << 17)):
                    ours.sendall(header_of(Message(REQUEST, 5, READ_ROWS), len(body)) + body)
                    answer = parsed(await asyncio.to_thread(ours.recv, 32, socket.MSG_WAITALL), most_inline=2**20)
                    assert (answer.kind, answer.call) == (3, 5)
                    await asyncio.to_thread(ours.recv, answer.num_bytes, socket.MSG_WAITALL)
                await until(lambda: not server._lines._room.used_bytes)

    go(main())


def test_who_ends_half_of_it_ends_the_line() -> None:
    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with hand(server) as ours:
                ours.sendall(header_of(Message(REQUEST, 1, READ_ROWS), 2**20) + bytes(100))
                ours.shutdown(socket.SHUT_WR)
                assert await ended(ours)
            await until(lambda: not server.num_lines and not server._lines._room.used_bytes)

    go(main())


def test_answers_that_are_not_taken_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_server, "ANSWERS_BYTES", 3 * 2**20)
    body = METHODS[READ_ROWS].request.encode(asked(2**17))  # which 2 MiB answer
    request = header_of(Message(REQUEST, 1, READ_ROWS), len(body)) + body

    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            lines = server._lines
            async with hand(server) as patient, hand(server) as other:
                for there in lines.servings:
                    there.line._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
                for ours in (patient, other):
                    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
                await asyncio.to_thread(patient.sendall, request)
                await until(lambda: lines._answers_room.used_bytes > 2**20)
                await asyncio.to_thread(other.sendall, request)
                await until(lambda: server.num_lines == 1)
                left = parsed(await asyncio.to_thread(patient.recv, 32), most_inline=2**22).num_bytes
                while left:
                    left -= len(await asyncio.to_thread(patient.recv, left))
                await until(lambda: not lines._answers_room.used_bytes)
                await asyncio.to_thread(patient.sendall, request)
                await until(lambda: lines._answers_room.used_bytes > 2**20)
            await until(lambda: not server.num_lines)
            assert not lines._answers_room.used_bytes
            assert not lines._answers_room._used_by

    go(main())


def test_who_stops_in_the_middle_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "STALLED_S", 0.2)
    monkeypatch.setattr(thread, "_LOOK_S", 0.05)

    async def main() -> None:
        async with serving() as server:
            server.listen("127.0.0.1", [0])
            async with hand(server) as within, hand(server) as idle:
                within.sendall(header_of(Message(REQUEST, 1, READ_ROWS), 2**20) + bytes(2**18))
                assert await ended(within)
                await until(lambda: server.num_lines == 1)
                idle.sendall(b"\0" * 31)
                assert await ended(idle)

    go(main())


def test_bodies_find_room_or_wait_and_who_waits_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room is for one large body: the second waits for the answer to the first, the third gives up."""
    monkeypatch.setattr(line_server, "BODIES_BYTES", 5 * 2**20)
    monkeypatch.setattr(thread, "STALLED_S", 0.3)  # of who sends too slowly, which they do not
    monkeypatch.setattr(thread, "_LOOK_S", 0.05)
    count = 3 * 2**17

    async def main() -> None:
        go_on, begun = asyncio.Event(), 0

        async def waits(request: ReadRowsRequest) -> ReadRowsReply:
            nonlocal begun
            begun += 1
            if len(request.ids) == count:
                await go_on.wait()
            return await rows(request)

        async with serving(rows=waits, max_message_bytes=2**24) as server, asyncio.timeout(20):
            server.listen("127.0.0.1", [0])
            room = server._lines._room
            async with (
                connected_by_tcp(server) as first,
                connected_by_tcp(server) as second,
                connected_by_tcp(server) as third,
                connected_by_tcp(server) as small,
            ):
                asking = [asyncio.ensure_future(one.call(methods.READ_ROWS, asked(count))) for one in (first,)]
                await until(lambda: begun == 1)
                asking += [asyncio.ensure_future(one.call(methods.READ_ROWS, asked(count))) for one in (second, third)]
                await until(lambda: len(server._lines._held_up) == 2)
                assert room.used_bytes < 5 * 2**20
                reply = await small.call(methods.READ_ROWS, asked(100), timeout_s=10)
                assert len(reply.rows) == 100
                await asyncio.sleep(0.5)
                assert server.num_lines == 4, "whoever waits for room has not stalled"
                asking.pop().cancel()
                await until(lambda: server.num_lines == 3)
                assert begun == 2
                go_on.set()
                for reply in await asyncio.gather(*asking):
                    assert torch.equal(reply.rows[:, 0], torch.arange(count, dtype=torch.float32))
                await until(lambda: not room.used_bytes)
                assert not server._lines._held_up

    go(main())


def test_a_host_leaves_room_for_another() -> None:
    room = Room(100, 20)
    assert room.take("a", 80)
    assert not room.take("a", 1)
    assert room.take("b", 20)
    assert not room.take("b", 1)
    room.give_back("a", 80)
    assert room.take("b", 60)
    assert not room.take("b", 1)
    room.give_back("b", 60)
    room.give_back("b", 20)
    assert not room.used_bytes
    assert not room._used_by
    assert room.take("c", 1000), "one alone always finds room"


def test_memory_is_used_again_when_the_last_view_of_it_is_gone() -> None:
    buffers = Buffers(1)
    first = buffers.take(2**20)
    place = torch.frombuffer(first, dtype=torch.uint8).data_ptr()
    view = torch.frombuffer(first[100:], dtype=torch.uint8).view(1, -1)
    del first
    other = buffers.take(2**20)
    assert torch.frombuffer(other, dtype=torch.uint8).data_ptr() != place
    assert buffers.num_lent == 2
    del view
    again = buffers.take(2**20 - 5)
    assert len(again) == 2**20 - 5
    assert torch.frombuffer(again, dtype=torch.uint8).data_ptr() == place
    del again, other
    assert len(buffers._free) == 1
    assert len(buffers.take(LARGEST_BYTES + 1)) == LARGEST_BYTES + 1
    assert len(buffers.take(100)) == 100
    small = buffers.take(2**16)
    assert len(small) == 2**16
    assert not buffers._free, "what was much too large was let go"
