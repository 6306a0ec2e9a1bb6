"""Clients of this host that keep to no rule, and errors on the thread that has all lines: others are answered, and what
one may have the server hold is bounded."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from mempool.errors import InvalidRequest, ShardUnavailable
from mempool.server.lines.server import LineServer
from mempool.server.lines.thread import Lines
from mempool.types import GatherReply, GatherRequest, ReadRowsReply, ReadRowsRequest
from mempool.wire import methods
from mempool.wire.lines import handshake
from mempool.wire.lines.framing import COPIED, REQUEST, Message, header_of
from mempool.wire.lines.line import supported
from mempool.wire.lines.methods import GATHER, NUMBERS

from .test_near import STAMP, asked, connected, go, rows, serving, until
from .test_near_deaths import gather

pytestmark = pytest.mark.skipif(not supported(), reason="this system has no such memory")

LARGE = torch.zeros(3 * 2**18)
"""Of three MiB: the memory that is shared has room for two."""


class AnswersMuch:
    """A shard that answers each gather at once, by much."""

    answers = 0

    def gather(self, _: GatherRequest, **__: object) -> GatherReply:
        self.answers += 1
        return GatherReply(stamp=STAMP, blocks=(0,), values=LARGE)


async def never(_: object) -> None:
    raise AssertionError


@asynccontextmanager
async def connection(server: LineServer) -> AsyncIterator[socket.socket]:
    """Of a client that does what it wants."""
    before = server.num_lines
    found, sent, _ = await asyncio.to_thread(handshake.call, server._address, None)
    await until(lambda: server.num_lines > before)
    try:
        yield found
    finally:
        found.close()
        sent.close()


def gathers(number: int) -> bytes:
    body = GATHER.request.encode(gather())
    method = NUMBERS[methods.GATHER.path]
    return b"".join(header_of(Message(REQUEST, call, method), len(body)) + body for call in range(number))


def test_who_asks_on_and_takes_no_answers_is_not_answered_on() -> None:
    shard = AnswersMuch()

    async def main() -> None:
        async with serving(gather=never, at_once=shard) as server, connection(server) as ours:
            (there,) = server._lines.servings
            ours.sendall(gathers(100))
            await until(lambda: sum(len(part) for part in there.line._unsent) > 2**20)
            ours.shutdown(socket.SHUT_WR)
            await until(lambda: there.closed)
        assert shard.answers == 3, "the rest of the third would wait for each further one"

    go(main())


def test_who_tells_of_bodies_that_it_did_not_get_ends_the_line() -> None:
    """Without end it would be listened to, and to nobody else."""

    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            await channel.call(methods.READ_ROWS, asked(2**15), timeout_s=20)
            await channel.call(methods.READ_ROWS, asked(1), timeout_s=20)
            async with connection(server) as ours:
                assert server.num_lines == 2
                ours.sendall(header_of(Message(COPIED, 1)))
                await until(lambda: server.num_lines == 1)
                assert not ours.recv(1)
            await channel.call(methods.READ_ROWS, asked(1), timeout_s=20)

    go(main())


class LeavesIt:
    """A shard that says, before it is asked to go on, that a call on the loop has the answer."""

    def gather(self, _: GatherRequest, **__: object) -> None:
        return None

    def line_up_gather(self, _: GatherRequest, *, tell: Any, **__: object) -> Any:
        tell(None, None)
        return lambda: None

    def take_turn(self) -> bool:
        return False

    def hand_over(self) -> None:
        pass


def test_a_call_that_a_shard_has_left_to_the_loop_ends_with_its_client() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        begun, ended = asyncio.Event(), asyncio.Event()

        async def waits(_: object) -> None:
            begun.set()
            try:
                await loop.create_future()
            finally:
                ended.set()

        async with serving(gather=waits, at_once=LeavesIt()) as server, asyncio.timeout(10):
            async with connection(server) as ours:
                ours.sendall(gathers(1))
                await begun.wait()
            await ended.wait()

    go(main())


class Refusing:
    """An epoll that takes no more."""

    def __init__(self, lines: Lines) -> None:
        self._epoll = lines._epoll

    def register(self, *_: int) -> None:
        raise OSError(28, "as many as this user may have")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def test_a_line_that_cannot_be_watched_ends_alone() -> None:
    async def main() -> None:
        async with serving() as server, connected(server) as channel:
            await channel.call(methods.READ_ROWS, asked(1), timeout_s=20)
            before = server._lines._epoll
            server._lines._epoll = Refusing(server._lines)  # type: ignore[assignment]
            found, sent, _ = await asyncio.to_thread(handshake.call, server._address, None)
            assert not await asyncio.to_thread(found.recv, 1)
            found.close()
            sent.close()
            server._lines._epoll = before
            await channel.call(methods.READ_ROWS, asked(1), timeout_s=20)
            async with connected(server) as other:
                await other.call(methods.READ_ROWS, asked(1), timeout_s=20)

    go(main())


def test_where_lines_are_served_no_more_nobody_agrees_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Lines) -> None:
        raise ZeroDivisionError

    async def second_waits(request: ReadRowsRequest) -> ReadRowsReply:
        await asyncio.sleep(60.0 * (len(request.ids) - 1))
        return await rows(request)

    async def main() -> None:
        async with serving(rows=second_waits) as server, connected(server) as channel:
            await channel.call(methods.READ_ROWS, asked(1), timeout_s=20)
            monkeypatch.setattr(Lines, "_round", fails)
            with pytest.raises(ShardUnavailable, match="its process died"):  # and its line is ended
                await channel.call(methods.READ_ROWS, asked(2), timeout_s=20)
            await until(lambda: server._lines.ended)
            assert server.num_lines == 0
            with pytest.raises((ConnectionError, InvalidRequest)):
                await asyncio.to_thread(handshake.call, server._address, None)
            await until(lambda: all(task.done() for task in server._taking))
            with pytest.raises(ConnectionRefusedError):
                await asyncio.to_thread(handshake.call, server._address, None)

    go(main())
