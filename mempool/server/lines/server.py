"""Takes clients of this host and agrees with them on lines; on the event loop, which knows nothing of their calls."""

import asyncio
import logging
import socket

from mempool.errors import MempoolError
from mempool.observe import Stages
from mempool.server.lines.answering import Answering, Calls
from mempool.server.lines.serving import Serving
from mempool.server.lines.thread import Lines
from mempool.server.services import AtOnce
from mempool.wire.lines import handshake
from mempool.wire.lines.served import ServedLine

_LOG = logging.getLogger("mempool.server")
_AGAIN_S = 1.0
MOST_LINES = 256
"""Of all clients together; each client process has up to eight of a shard."""
_END_TIMEOUT_S = 2.0
_LOOK_S = 0.01


class LineServer:
    """Takes clients of this host.

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
        self._lines = Lines(self._answering, name=f"mempool lines {handshake.port_of(address)}")
        self._beginning: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None
        self._taking: asyncio.Task[None] | None = None
        self._begun = 0

    @property
    def closing(self) -> bool:
        """Whether no call is let in any more."""
        return self._answering.closing

    @closing.setter
    def closing(self, closing: bool) -> None:
        self._answering.closing = closing

    @property
    def num_lines(self) -> int:
        """Clients that are connected so: a line is one call at a time, and a process has several."""
        return len(self._lines.servings)

    @property
    def num_clients(self) -> int:
        """Processes that have lines."""
        return len({serving.peer.rpartition(":")[0] for serving in self._lines.servings})

    def start(self) -> None:
        """Wait for clients. Where the name is taken, or there is no such thing here, they all come by gRPC."""
        try:
            self._listening = handshake.listener(handshake.port_of(self._address))
        except OSError as error:
            _LOG.warning("no client of this host gets shared memory: %s", error)
            return
        self._taking = asyncio.get_running_loop().create_task(self._take())

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no more, let calls under way end for so long, and end all lines."""
        self.closing = True
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])
        if self._listening is not None:
            self._listening.close()
        if self._beginning:
            await asyncio.wait(self._beginning)
        end_s = self._loop.time() + grace_s
        while self._lines.is_busy and self._loop.time() < end_s:
            await asyncio.sleep(_LOOK_S)
        self._lines.end()
        end_s = self._loop.time() + _END_TIMEOUT_S
        while not self._lines.ended and self._loop.time() < end_s:
            await asyncio.sleep(_LOOK_S)

    async def _take(self) -> None:
        assert self._listening is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listening)
            except OSError as error:  # too many open files, say
                _LOG.warning("no client of this host gets shared memory for a moment: %s", error)
                await asyncio.sleep(_AGAIN_S)
                continue
            if self._lines.ended:  # a line that is agreed on and then ended would cost each call its time
                connection.close()
                self._listening.close()
                return
            if self.num_lines + len(self._beginning) >= MOST_LINES:
                connection.close()
                continue
            task = loop.create_task(self._begin(connection))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _begin(self, connection: socket.socket) -> None:
        try:
            sent, received, peer = await asyncio.to_thread(handshake.answer, connection, self._address, self._token)
        except (OSError, MempoolError) as error:
            connection.close()
            _LOG.info("a client of this host gets no shared memory: %s", error)
            return
        self._begun += 1
        try:
            self._lines.add(Serving(f"{peer}:{self._begun}", ServedLine(connection, sent, received)))
        except RuntimeError as error:
            connection.close()
            _LOG.warning("a client of this host gets no shared memory: %s", error)
