"""The server's end of lines: clients of this host and user, whose bodies are in shared memory. Calls are as by gRPC.

What one line may have this process hold is bounded: it takes no more messages while that is reached.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from mempool.errors import InvalidRequest, MempoolError, RequestTooLarge, ShardUnavailable
from mempool.observe import Stages
from mempool.server.admission import Admission
from mempool.types.caller import Caller, calling
from mempool.wire.near import handshake
from mempool.wire.near.framing import CANCEL, FAILURE, MOST_REQUEST_BYTES, REPLY, REQUEST, Message
from mempool.wire.near.line import Line
from mempool.wire.near.memory import ReceivedMemory, SentMemory
from mempool.wire.near.methods import METHODS
from mempool.wire.status import to_status

_LOG = logging.getLogger("mempool.server")
_AGAIN_S = 1.0
_MOST_LINES = 64
_MOST_CALLS = 64
"""Of one line at a time."""
_MOST_BYTES = 64 * 2**20
"""Of one line's requests at a time, but for one that is larger."""

Calls = Mapping[str, Callable[[Any], Awaitable[Any]]]


class NearServer:
    """Takes clients of this host.

    Args:
        address: The server's, as clients know it.
        token: The pool's.
        calls: What answers, by a method's path.
        admission: Bounds the bytes of all calls, with gRPC's.
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
        admission: Admission,
        stages: Stages,
        max_message_bytes: int,
    ) -> None:
        self._address = address
        self._token = token
        self._calls = [calls.get(method.path) for method in METHODS]
        self._admission = admission
        self._stages = stages
        self._max_message_bytes = max_message_bytes
        self._lines: set[_Serving] = set()
        self._beginning: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None
        self._taking: asyncio.Task[None] | None = None
        self._begun = 0
        self.closing = False

    @property
    def num_lines(self) -> int:
        """Clients that are connected so."""
        return len(self._lines)

    def start(self) -> None:
        """Wait for clients. Where the name is taken, or there is no such thing here, they all come by gRPC."""
        try:
            self._listening = handshake.listener(handshake.port_of(self._address))
        except OSError as error:
            _LOG.warning("no client of this host gets shared memory: %s", error)
            return
        self._taking = asyncio.get_running_loop().create_task(self._take())

    async def stop(self) -> None:
        """Take no more, and end all lines."""
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])
        if self._listening is not None:
            self._listening.close()
        if self._beginning:
            await asyncio.wait(self._beginning)
        for serving in list(self._lines):
            serving.end()

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
            if len(self._lines) + len(self._beginning) >= _MOST_LINES:
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
        serving = _Serving(self, f"{peer}:{self._begun}")
        self._lines.add(serving)
        await serving.open(connection, sent, received)

    # For its lines

    def lost(self, serving: "_Serving") -> None:
        self._lines.discard(serving)

    async def answer(self, message: Message, body: bytes, peer: str) -> list[bytes | memoryview]:
        """The parts of an answer. Raises what the call raises."""
        call = self._calls[message.method] if message.method < len(METHODS) else None
        if call is None:
            raise InvalidRequest(f"call {message.method} is none that this server answers")
        if self.closing:
            raise ShardUnavailable("this process is ending; try again in a moment")
        method = METHODS[message.method]
        passage = await self._admission.enter("unix", peer)
        try:
            passage.resize(len(body))
            began_s = time.perf_counter()
            request = method.request.decode(body)
            self._stages.record("decode", time.perf_counter() - began_s)
            deadline_s = None if message.timeout_us < 0 else time.monotonic() + message.timeout_us / 1e6
            with calling(Caller(peer, deadline_s)):
                reply = await call(request)
            began_s = time.perf_counter()
            parts = method.reply.parts(reply)
            self._stages.record("encode", time.perf_counter() - began_s)
        finally:
            passage.leave()
        num_bytes = sum(len(part) for part in parts)
        if num_bytes > self._max_message_bytes:
            raise RequestTooLarge(
                f"the answer to {method.name} would have {num_bytes:,} bytes; {self._max_message_bytes:,} are accepted "
                "(max_message_bytes). Ask for fewer bags or rows at a time"
            )
        return parts


class _Serving:
    """One client's line."""

    def __init__(self, server: NearServer, peer: str) -> None:
        self._server = server
        self._peer = peer
        self._line: Line | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._num_bytes = 0

    async def open(self, connection: socket.socket, sent: SentMemory, received: ReceivedMemory) -> None:
        self._line = await Line.open(
            connection, sent, received, on_message=self._take, on_lost=self._lost, most_bytes=MOST_REQUEST_BYTES
        )

    def end(self) -> None:
        if self._line is not None:
            self._line.close()

    def _take(self, message: Message, body: bytes) -> None:
        if message.kind == CANCEL:
            task = self._tasks.get(message.call)
            if task is not None:
                task.cancel()
        elif message.kind == REQUEST and message.call not in self._tasks:
            self._num_bytes += len(body)
            task = asyncio.get_running_loop().create_task(self._serve(message, body))
            self._tasks[message.call] = task
            task.add_done_callback(partial(self._served, message.call, len(body)))
            self._bound()

    async def _serve(self, message: Message, body: bytes) -> None:
        kind = REPLY
        try:
            parts = await self._server.answer(message, body, self._peer)
        except Exception as error:
            kind, parts = FAILURE, [_detail(error, f"call {message.method} of {self._peer}")]
        if self._line is not None:
            self._line.send(Message(kind, message.call), parts)

    def _served(self, call: int, num_bytes: int, task: "asyncio.Task[None]") -> None:
        if task.cancelled() and self._line is not None:  # perhaps before it began
            self._line.send(Message(FAILURE, call))  # the client keeps the request's memory until it is answered
        self._tasks.pop(call, None)
        self._num_bytes -= num_bytes
        self._bound()

    def _bound(self) -> None:
        if self._line is not None:
            self._line.hold("calls", len(self._tasks) >= _MOST_CALLS or self._num_bytes >= _MOST_BYTES)

    def _lost(self) -> None:
        self._line = None
        for task in list(self._tasks.values()):
            task.cancel()
        self._server.lost(self)


def _detail(error: Exception, call: str) -> bytes:
    if not isinstance(error, MempoolError | TimeoutError):
        _LOG.error("%s failed", call, exc_info=error)
    _, _, metadata = to_status(error)
    detail = bytes(metadata[0][1])  # type: ignore[arg-type]
    known: BaseException | None = error
    while known is not None:  # tracebacks hold frames, and these the request
        after = known.__cause__ or known.__context__
        known.__traceback__ = known.__cause__ = known.__context__ = None
        known = after
    return detail
