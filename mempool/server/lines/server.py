"""Takes clients and agrees with them on lines; on the event loop, which knows nothing of their calls.

Those of this host come by a socket of their user's, and get memory that both have. Others come by TCP, with a ticket
that they were given over gRPC.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from mempool.errors import MempoolError, Overloaded
from mempool.observe import Stages
from mempool.server.lines.answering import Answering, Calls
from mempool.server.lines.serving import Serving
from mempool.server.lines.thread import Lines
from mempool.server.services import AtOnce
from mempool.wire.codecs.lines import OpenedLine, OpenLine
from mempool.wire.lines import handshake, tcp
from mempool.wire.lines.buffers import LARGEST_BYTES, Buffers
from mempool.wire.lines.framing import VERSION
from mempool.wire.lines.served import ServedLine
from mempool.wire.lines.shared import Shared

_LOG = logging.getLogger("mempool.server")
_AGAIN_S = 1.0
MOST_LINES = 256
"""Of each kind, of all clients together; each client process has up to eight of a shard."""
_MOST_BEGINNING = 64
"""Connections of a kind that have shown nothing yet: whoever reaches the port, or is of this user, may have some."""
_AGREEING_THREADS = 8
"""That wait for what clients of this host say: silent ones hold up no other work of the process."""
BODIES_BYTES = 16 * LARGEST_BYTES
"""Of requests of all lines that are coming or being answered, of those that come with their messages."""
ANSWERS_BYTES = 256 * 2**20
"""Of answers of all lines that are not taken yet, beside what the system holds of them."""
_KEPT_BUFFERS = 8
_END_TIMEOUT_S = 2.0
_LOOK_S = 0.01

Begin = Callable[[socket.socket], Awaitable[None]]


class LineServer:
    """Takes clients.

    Args:
        address: The server's, as clients know it.
        token: The pool's.
        calls: What answers, by a method's path.
        at_once: Answers gathers and updates on the thread that asks.
        stages: Where the stages of calls are timed.
        max_message_bytes: Larger answers are refused.

    Attributes:
        closing: No call is let in any more.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None,
        calls: Calls,
        stages: Stages,
        max_message_bytes: int,
        at_once: AtOnce | None = None,
    ) -> None:
        self._address = address
        self._token = token
        self._loop = asyncio.get_running_loop()
        self._answering = Answering(
            calls=calls, at_once=at_once, stages=stages, max_message_bytes=max_message_bytes, loop=self._loop
        )
        self._lines = Lines(
            self._answering,
            name=f"mempool lines {handshake.port_of(address)}",
            bodies_bytes=BODIES_BYTES,
            answers_bytes=ANSWERS_BYTES,
        )
        self._buffers = Buffers(_KEPT_BUFFERS)
        self._tickets = tcp.Tickets()
        self._port = 0
        self._no_port = "they are switched off, or the pool is encrypted, which they are not"
        self._beginning: dict[asyncio.Task[None], socket.socket] = {}
        self._agreeing = ThreadPoolExecutor(_AGREEING_THREADS, "mempool-agreeing")
        self._listening: list[socket.socket] = []
        self._taking: list[asyncio.Task[None]] = []
        self._begun = 0

    @property
    def closing(self) -> bool:
        """Whether no call is let in any more."""
        return self._answering.closing

    @closing.setter
    def closing(self, closing: bool) -> None:
        self._answering.closing = closing

    @property
    def port(self) -> int:
        """Of lines over TCP; 0: there are none."""
        return self._port

    @property
    def num_lines(self) -> int:
        """Lines of both kinds: each is one call at a time, and a process has several."""
        return len(self._lines.servings)

    def num_clients(self, *, near: bool) -> int:
        """Processes that have lines of a kind."""
        return len({serving.process for serving in self._lines.servings if serving.line.is_near == near})

    def start(self) -> None:
        """Wait for clients of this host. Where the name is taken, or there is no such thing here, they all come as
        those of other hosts do."""
        try:
            listening = handshake.listener(handshake.port_of(self._address))
        except OSError as error:
            _LOG.warning("no client of this host gets shared memory: %s", error)
            return
        self._wait_at(listening, near=True)

    def listen(self, host: str, ports: Iterable[int]) -> None:
        """Wait for clients that have tickets, at the first of these ports that is free (0: any). Where that cannot be
        had they all come by gRPC."""
        if not tcp.possible():
            self._no_port = "this host has another byte order"
            return
        try:
            listening = tcp.listener(host, ports)
        except OSError as error:
            self._no_port = f"it cannot listen: {error}"
            _LOG.warning("no client of another host gets a line, all come by gRPC: %s", error)
            return
        self._port = listening.getsockname()[1]
        self._wait_at(listening, near=False)

    async def open_line(self, request: OpenLine) -> OpenedLine:
        """What a client that gRPC has let in may have.

        Raises:
            Overloaded: Too many ask at once. It comes again soon, as it does not where there is no line.
        """
        if self._lines.ended or self.closing:
            return OpenedLine(why="this process is ending")
        if not self._port:
            return OpenedLine(why=f"this shard has no lines over TCP: {self._no_port}")
        if request.version != VERSION:
            return OpenedLine(why=f"this shard's lines are of version {VERSION}, not {request.version}")
        ticket = self._tickets.give(request.client)
        if ticket is None:
            raise Overloaded(
                "too many clients ask for lines just now; ask again in some seconds", retry_after_s=_AGAIN_S
            )
        return OpenedLine(port=self._port, ticket=ticket.ticket, answer=ticket.answer)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no more, let calls under way end for so long, and end all lines."""
        self.closing = True
        for task in self._taking:
            task.cancel()
        if self._taking:
            await asyncio.wait(self._taking)
        for listening in self._listening:
            listening.close()
        for connection in self._beginning.values():
            with suppress(OSError):  # it has gone by itself
                connection.shutdown(socket.SHUT_RDWR)  # what is waited for there does not come
        if self._beginning:
            await asyncio.wait(self._beginning)
        self._agreeing.shutdown(wait=False)
        end_s = self._loop.time() + grace_s
        while self._lines.is_busy and self._loop.time() < end_s:
            await asyncio.sleep(_LOOK_S)
        self._lines.end()
        end_s = self._loop.time() + _END_TIMEOUT_S
        while not self._lines.ended and self._loop.time() < end_s:
            await asyncio.sleep(_LOOK_S)

    def _wait_at(self, listening: socket.socket, *, near: bool) -> None:
        self._listening.append(listening)
        self._taking.append(self._loop.create_task(self._take(listening, near=near)))

    async def _take(self, listening: socket.socket, *, near: bool) -> None:
        kind = "shared memory" if near else "a line over TCP"
        begin = self._begin_near if near else self._begin_tcp
        beginning: set[asyncio.Task[None]] = set()
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listening)
            except OSError as error:  # too many open files, say
                _LOG.warning("no client gets %s for a moment: %s", kind, error)
                await asyncio.sleep(_AGAIN_S)
                continue
            if self._lines.ended:  # a line that is agreed on and then ended would cost each call its time
                connection.close()
                listening.close()
                return
            lines = sum([serving.line.is_near == near for serving in self._lines.servings])
            if lines + len(beginning) >= MOST_LINES or len(beginning) >= _MOST_BEGINNING:
                connection.close()
                continue
            task = self._loop.create_task(begin(connection))
            self._beginning[task] = connection
            beginning.add(task)
            task.add_done_callback(self._beginning.pop)
            task.add_done_callback(beginning.discard)

    async def _begin_near(self, connection: socket.socket) -> None:
        try:
            sent, received, peer = await self._loop.run_in_executor(
                self._agreeing, handshake.answer, connection, self._address, self._token
            )
        except (OSError, MempoolError) as error:
            connection.close()
            _LOG.info("a client of this host gets no shared memory: %s", error)
            return
        self._begin(connection, Shared(sent, received), peer, ":")

    async def _begin_tcp(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            ticket = await tcp.answer(connection, self._tickets)
            host = _host_of(connection)
        except (OSError, MempoolError) as error:
            connection.close()
            _LOG.info("a connection gets no line: %s", error)
            return
        except BaseException:
            connection.close()
            raise
        self._begin(connection, None, f"{host}:{ticket.client}", "/")

    def _begin(self, connection: socket.socket, shared: Shared | None, process: str, between: str) -> None:
        self._begun += 1
        try:
            line = ServedLine(connection, shared, self._buffers)
            self._lines.add(Serving(f"{process}{between}{self._begun}", line, process=process))
        except RuntimeError as error:
            connection.close()
            _LOG.warning("a client gets no line: %s", error)


def _host_of(connection: socket.socket) -> str:
    """Where it comes from, as gRPC has it: the calls of one host share what there is, whatever way they come."""
    host: str = connection.getpeername()[0]
    mapped = host.removeprefix("::ffff:")
    return f"ipv6:%5B{host}%5D" if ":" in mapped else f"ipv4:{mapped}"
