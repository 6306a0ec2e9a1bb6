"""One end of a line: messages over a socket, large bodies in memory that both ends have, if they have any. One thread
has it at a time.

A client's calls come one after another, and each is answered before the next is asked, so neither side ever waits for
the other to take what it sends.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from mempool.errors import InvalidRequest
from mempool.wire.channels.channel import MAX_MESSAGE_BYTES
from mempool.wire.lines.buffers import Buffers
from mempool.wire.lines.framing import (
    COPIED,
    FAILURE,
    HEADER_BYTES,
    MOST_INLINE_BYTES,
    MOST_REQUEST_BYTES,
    REPLY,
    REQUEST,
    Message,
    header_of,
    parsed,
)
from mempool.wire.lines.memory import MEMORY_BYTES
from mempool.wire.lines.shared import Shared

_KEPT_BYTES = MEMORY_BYTES // 2
"""Of replies that lie where they came as long as their reader has them; others are copied out."""
_LAST_CALL = 2**32
BUFFER_BYTES = 32 * 2**10
"""What is received before it is known how much comes: small messages as a whole."""
_JOINED_BYTES = 16 * 2**10
"""Smaller messages are put together: the system takes one piece faster than many."""
_MOST_PIECES = 256
_TIMEVAL = struct.Struct("ll")
_AT_ONCE = struct.pack("ii", 1, 0)

Body = bytes | memoryview
Parts = Sequence[bytes | memoryview]
Pieces = list[bytes | memoryview]


class Line:
    """One end.

    Args:
        connection: Agreed on; closed with the line.
        shared: The memory that both ends have; None: they have none, and bodies come with their messages.
        buffers: What such bodies are received into.
    """

    def __init__(self, connection: socket.socket, shared: Shared | None = None, buffers: Buffers | None = None) -> None:
        self._socket = connection
        self._shared = shared
        self._buffers = buffers or Buffers(0)
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    @property
    def is_near(self) -> bool:
        """Whether both ends are on one host, and have memory in common."""
        return self._shared is not None

    @property
    def num_extents(self) -> int:
        """Bodies of this side's in that memory which the other one may still read."""
        return 0 if self._shared is None else self._shared.num_extents

    @property
    def _request_bytes(self) -> int:
        """Of a request that comes with its message."""
        return MOST_REQUEST_BYTES if self._shared is None else MOST_INLINE_BYTES

    def cut(self) -> None:
        """Let whoever has it find it ended. Of any thread."""
        with suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it; nobody else has it. Repeatable. The memory goes with the last view of it."""
        self.cut()  # a process that was forked meanwhile has the socket too, and may live for long
        self._socket.close()

    def give_back(self, call: int) -> bool:
        """The other side needs this side's body of that call no more. Returns whether it had one in shared memory."""
        return self._shared is not None and self._shared.give_back(call)

    def _packed(self, message: Message, parts: Parts, most_bytes: int, before: bytes = b"") -> Pieces:
        """What is to be sent of a message, once its body is where it goes.

        Args:
            message, parts: The message and its body.
            most_bytes: Of a body that comes with its message.
            before: Whole messages that go with it.

        Raises:
            InvalidRequest: There is no room for the body in shared memory, and it is too large to come with its
                message.
        """
        num_bytes = sum(map(len, parts))
        place = None if self._shared is None else self._shared.put(message.call, parts, num_bytes)
        if place is not None:
            return [before + header_of(message, num_bytes, place)]
        if num_bytes > most_bytes:
            raise InvalidRequest(f"a body of {num_bytes:,} bytes finds no room in the line, which takes {most_bytes:,}")
        head = before + header_of(message, num_bytes)
        if num_bytes < _JOINED_BYTES or len(parts) > _MOST_PIECES:
            return [b"".join((head, *parts))]
        return [head, *parts]

    def _space(self) -> memoryview:
        """Where more is to be received."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and len(self._buffer) - self._start < HEADER_BYTES:
            rest = self._buffer[self._start : self._end]
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end :]

    def _next(self, most_bytes: int) -> Message:
        """The message whose header is here. most_bytes: Of a body that comes with it. Raises InvalidRequest."""
        message = parsed(self._buffer, self._start, most_inline=most_bytes)
        if message.place is not None and self._shared is None:
            raise InvalidRequest("the body of a message is in shared memory, and there is none")
        self._start += HEADER_BYTES
        return message

    def _begun(self, message: Message) -> tuple[memoryview | None, int]:
        """Where the body goes that comes with a message, and how much of it is there."""
        if message.place is not None or not message.num_bytes:
            return None, 0
        here = min(self._end - self._start, message.num_bytes)
        body = self._buffers.take(message.num_bytes)
        body[:here] = self._view[self._start : self._start + here]
        self._start += here
        return body, here

    def _whole(self, message: Message, body: memoryview | None) -> Body:
        if message.place is not None and self._shared is not None:
            return self._shared.view(message.place, message.num_bytes)
        return b"" if body is None else body


class ClientLine(Line):
    """A client's end: one call after another.

    Attributes:
        is_forked: A process that was forked has replies that lie in this line's memory, and nobody hears when it has
            let go of them: the server is told of none any more, and the line is to end.
    """

    def __init__(self, connection: socket.socket, shared: Shared | None = None, buffers: Buffers | None = None) -> None:
        super().__init__(connection, shared, buffers)
        connection.settimeout(None)
        self._timeouts: dict[int, float] = {}
        self._coming: tuple[Message, memoryview | None, int] | None = None  # an answer, on a loop
        self._bounds: tuple[float | None, float | None] | None = None  # asked for last
        self._call = 0
        self._kept: dict[int, weakref.ref[memoryview]] = {}
        self._num_kept = 0
        self._free: deque[tuple[int, int]] = deque()  # filled by whoever lets go of a body, on any thread
        self.is_forked = False
        _CLIENTS[id(self)] = self

    @property
    def keeps_replies(self) -> bool:
        """Whether any lies in this line's memory, as long as its reader has it."""
        return bool(self._kept)

    def close(self) -> None:
        if self._shared is None:
            # At once, also where the server takes no more just now: else it would not know while it works on that call.
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        super().close()

    def bound(self, *, receive_s: float | None = None, send_s: float | None = None) -> None:
        """How long a blocking call waits for the other side, from now on. None: as before."""
        if (receive_s, send_s) == self._bounds:
            return
        self._bounds = receive_s, send_s
        for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
            if seconds is not None and seconds != self._timeouts.get(option):
                whole = int(seconds)
                self._socket.setsockopt(
                    socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, max(1, int((seconds - whole) * 1e6)))
                )
                self._timeouts[option] = seconds

    def ask(self, method: int, parts: Parts, timeout_us: int) -> None:
        """Ask; ``answer`` must follow.

        Raises:
            OSError: The other side is gone, or does not take it in time.
            InvalidRequest: There is no room for the body in shared memory, and it is too large to come with its
                message; nothing was sent.
        """
        pieces = self._asked(method, parts, timeout_us)
        over: _Over | None = None
        while pieces:
            sent = self._socket.send(pieces[0]) if len(pieces) == 1 else self._socket.sendmsg(pieces)
            if pieces := rest_of(pieces, sent):
                over = over or self._over(socket.SO_SNDTIMEO)
                over.check()

    def answer(self) -> tuple[bool, Body]:
        """Whether it is a reply, and its body; or an ErrorDetail.

        Raises:
            OSError: The other side is gone, or says nothing in time.
            InvalidRequest: It is no message.
        """
        over: _Over | None = None
        while self._end - self._start < HEADER_BYTES:
            if self._end > self._start:
                over = over or self._over(socket.SO_RCVTIMEO)
                over.check()
            num_bytes = came(self._socket.recv_into(self._space()))  # _space may move what is there
            self._end += num_bytes
        message = self._next(MAX_MESSAGE_BYTES)
        body, at = self._begun(message)
        while body is not None and at < message.num_bytes:
            over = over or self._over(socket.SO_RCVTIMEO)
            over.check()
            at += came(self._socket.recv_into(body[at:], 0, socket.MSG_WAITALL))
        return self._answered(message, self._whole(message, body))

    async def call(
        self, method: int, parts: Parts, timeout_us: int, *, timeout_s: float | None = None
    ) -> tuple[bool, Body]:
        """The same on an event loop, both. Raises TimeoutError after ``timeout_s``; who is cut off ends the line.

        The loop's own calls of sockets try each time before anything is there, and are told of it each time anew: that
        took a third of what a small call costs.
        """
        loop = asyncio.get_running_loop()
        end_s = None if timeout_s is None else loop.time() + timeout_s
        await self._sent_on(loop, self._asked(method, parts, timeout_us), end_s)
        answered: asyncio.Future[tuple[bool, Body]] = loop.create_future()
        late = None if end_s is None else loop.call_at(end_s, _end_with, answered, TimeoutError())
        loop.add_reader(descriptor := self._socket.fileno(), self._take_for, answered)
        try:
            return await answered
        finally:
            loop.remove_reader(descriptor)
            if late is not None:
                late.cancel()
            del answered  # its error knows this frame

    async def _sent_on(self, loop: asyncio.AbstractEventLoop, pieces: Pieces, end_s: float | None) -> None:
        try:
            sent = self._socket.sendmsg(pieces, [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        left = rest_of(pieces, sent)
        if left:
            self._socket.setblocking(False)
            async with asyncio.timeout_at(end_s):
                for piece in left:
                    await loop.sock_sendall(self._socket, piece)
            self._socket.settimeout(None)

    def _take_for(self, answered: asyncio.Future[tuple[bool, Body]]) -> None:
        """Something is there for whoever waits on the loop."""
        try:
            if self._coming is None:
                num_bytes = came(self._socket.recv_into(self._space(), 0, socket.MSG_DONTWAIT))
                self._end += num_bytes
                if self._end - self._start < HEADER_BYTES:
                    return
                message = self._next(MAX_MESSAGE_BYTES)
                self._coming = message, *self._begun(message)
            message, body, at = self._coming
            while body is not None and at < message.num_bytes:
                at += came(self._socket.recv_into(body[at:], 0, socket.MSG_DONTWAIT))
                self._coming = message, body, at
            found = self._answered(message, self._whole(message, body))
        except BlockingIOError:
            return
        except (OSError, InvalidRequest) as error:
            _end_with(answered, error)
            return
        self._coming = None
        if not answered.done():
            answered.set_result(found)

    def _asked(self, method: int, parts: Parts, timeout_us: int) -> Pieces:
        self._call = (self._call + 1) % _LAST_CALL
        message = Message(REQUEST, self._call, method, timeout_us)
        return self._packed(message, parts, self._request_bytes, self._copied())

    def _copied(self) -> bytes:
        """What the server is to be told: replies that are not needed any more."""
        told = b""
        while self._free and not self.is_forked:
            call, num_bytes = self._free.popleft()
            self._num_kept -= num_bytes
            told += header_of(Message(COPIED, call))
        return told

    def _answered(self, message: Message, body: Body) -> tuple[bool, Body]:
        if message.call != self._call or message.kind not in (REPLY, FAILURE):
            raise InvalidRequest(f"a message of kind {message.kind} of call {message.call} is no answer")
        self.give_back(message.call)
        if message.place is None:
            return message.kind == REPLY, body
        self._num_kept += message.num_bytes
        if self._num_kept > _KEPT_BYTES or message.kind == FAILURE:
            self._free.append((message.call, message.num_bytes))
            return message.kind == REPLY, memoryview(bytearray(body))  # tensors are made of it: they may be written to
        assert isinstance(body, memoryview)
        self._keep(message.call, body)
        return True, body

    def _keep(self, call: int, body: memoryview) -> None:
        """The body lies where it is until its reader has let go of it."""
        free, kept, entry = self._free, self._kept, (call, len(body))

        def let_go(_: object) -> None:
            kept.pop(call, None)
            free.append(entry)

        kept[call] = weakref.ref(body, let_go)

    def _over(self, option: int) -> _Over:
        return _Over(self._timeouts.get(option))


def _before_fork() -> None:
    """The child is to find in its replies what the parent found there, whatever that asks for from now on."""
    for reference in _CLIENTS.valuerefs():
        if (line := reference()) is not None and line.keeps_replies:
            line.is_forked = True


_CLIENTS: weakref.WeakValueDictionary[int, ClientLine] = weakref.WeakValueDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


def _end_with(answered: asyncio.Future[tuple[bool, Body]], error: BaseException) -> None:
    if not answered.done():
        answered.set_exception(error)


class _Over:
    """The end of so many seconds: the system counts them anew for each piece that comes."""

    __slots__ = ("_end_s",)

    def __init__(self, seconds: float | None) -> None:
        self._end_s = None if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raises TimeoutError once they are over."""
        if self._end_s is not None and time.monotonic() > self._end_s:
            raise TimeoutError("the other side takes, or sends, too slowly")


def came(num_bytes: int) -> int:
    """So many bytes, which are some. Raises ConnectionError where they are none."""
    if not num_bytes:
        raise ConnectionError("the other side has ended the line")
    return num_bytes


def rest_of(pieces: Pieces, num_bytes: int) -> Pieces:
    """Pieces without their first bytes, which were sent."""
    for number, piece in enumerate(pieces):
        if num_bytes < len(piece):
            return [memoryview(piece)[num_bytes:], *pieces[number + 1 :]]
        num_bytes -= len(piece)
    return []


def can_be_served() -> bool:
    """Whether this system has all that a server of lines needs."""
    return hasattr(select, "epoll") and hasattr(os, "eventfd")


def supported() -> bool:
    """Whether it has all that a line needs whose ends have memory in common."""
    return can_be_served() and hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")
