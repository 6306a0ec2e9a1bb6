"""One end of a line: messages over a Unix socket, large bodies in shared memory. One thread has it at a time.

A client's calls come one after another, and each is answered before the next is asked, so neither side ever waits for
the other to take what it sends.
"""

import asyncio
import os
import socket
import struct
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from mempool.errors import InvalidRequest
from mempool.wire.channels.channel import MAX_MESSAGE_BYTES
from mempool.wire.near.framing import (
    COPIED,
    FAILURE,
    HEADER_BYTES,
    MOST_INLINE_BYTES,
    REPLY,
    REQUEST,
    Message,
    header_of,
    parsed,
)
from mempool.wire.near.memory import MEMORY_BYTES, ReceivedMemory, SentMemory

SHARED_FROM_BYTES = 16 * 2**10
"""Smaller bodies come with their message: the system copies them while it would be told where they lie."""
_KEPT_BYTES = MEMORY_BYTES // 2
"""Of replies that lie where they came as long as their reader has them; others are copied out."""
_LAST_CALL = 2**32
_BUFFER_BYTES = 64 * 2**10
_TIMEVAL = struct.Struct("ll")

Body = bytes | memoryview
Parts = Sequence[bytes | memoryview]


class Line:
    """One end.

    Args:
        connection: Agreed on; closed with the line.
        sent, received: The memory of both ways.
    """

    most_sent = MAX_MESSAGE_BYTES
    most_received = MOST_INLINE_BYTES
    """Of a body that comes with its message."""

    def __init__(self, connection: socket.socket, sent: SentMemory, received: ReceivedMemory) -> None:
        self._socket = connection
        self._sent = sent
        self._received = received
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._coming: tuple[Message, memoryview | None, int] | None = None
        self._extents: dict[int, tuple[int, int]] = {}  # by call, of what this side sends
        sent.close()  # the other side has it, and what is mapped stays

    @property
    def num_extents(self) -> int:
        """Bodies of this side's that the other one may still read."""
        return len(self._extents)

    def cut(self) -> None:
        """Let whoever has it find it ended. Of any thread."""
        with suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it; nobody else has it. Repeatable. The memory goes with the last view of it."""
        self._socket.close()
        self._sent.close()

    def give_back(self, call: int) -> bool:
        """The other side needs this side's body of that call no more. Returns whether it had one."""
        extent = self._extents.pop(call, None)
        if extent is not None:
            self._sent.give_back(extent)
        return extent is not None

    def take(self) -> tuple[Message, Body] | None:
        """The next message, if it is here as a whole; its body in memory of this process's own, or where it lies.
        Nobody is waited for.

        Raises:
            OSError: The other side is gone.
            InvalidRequest: It is no message.
        """
        while self._coming is None:
            if self._end - self._start >= HEADER_BYTES:
                self._coming = self._begun()
                break
            num_bytes = self._received_into(self._space())
            if not num_bytes:
                return None
            self._end += num_bytes
        message, body, at = self._coming
        while body is not None and at < message.num_bytes:
            num_bytes = self._received_into(body[at:])
            if not num_bytes:
                self._coming = message, body, at
                return None
            at += num_bytes
        self._coming = None
        return message, self._whole(message, body)

    def _packed(self, message: Message, parts: Parts, before: bytes = b"") -> bytes:
        """What is to be sent of a message, once its body is where it goes; before: of whole messages that go with it.

        Raises:
            InvalidRequest: There is no room for the body in shared memory, and it is too large to come with its
                message.
        """
        num_bytes = sum(map(len, parts))
        extent = self._sent.put(parts, num_bytes) if num_bytes >= SHARED_FROM_BYTES else None
        if extent is not None:
            self._extents[message.call] = extent
            return before + header_of(message, num_bytes, extent[0])
        if num_bytes > self.most_sent:
            raise InvalidRequest(f"a body of {num_bytes:,} bytes finds no room in the memory that is shared")
        return b"".join((before, header_of(message, num_bytes), *parts))

    def _space(self) -> memoryview:
        """Where more is to be received."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and len(self._buffer) - self._start < HEADER_BYTES:
            rest = self._buffer[self._start : self._end]
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end :]

    def _received_into(self, memory: memoryview) -> int:
        """How many bytes were there; 0: none yet."""
        try:
            return came(self._socket.recv_into(memory, 0, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return 0

    def _begun(self) -> tuple[Message, memoryview | None, int]:
        """The message whose header is here; where its body goes that comes with it, and how much of it is there."""
        message = parsed(self._buffer, self._start, most_inline=self.most_received)
        self._start += HEADER_BYTES
        if message.place is not None or not message.num_bytes:
            return message, None, 0
        here = min(self._end - self._start, message.num_bytes)
        body = memoryview(bytearray(message.num_bytes))
        body[:here] = self._view[self._start : self._start + here]
        self._start += here
        return message, body, here

    def _whole(self, message: Message, body: memoryview | None) -> Body:
        if message.place is not None:
            return self._received.view(message.place, message.num_bytes)
        return b"" if body is None else body


class ClientLine(Line):
    """A client's end: one call after another."""

    most_sent, most_received = Line.most_received, Line.most_sent

    def __init__(self, connection: socket.socket, sent: SentMemory, received: ReceivedMemory) -> None:
        super().__init__(connection, sent, received)
        connection.settimeout(None)
        self._timeouts: dict[int, float] = {}
        self._call = 0
        self._kept: dict[int, weakref.ref[memoryview]] = {}
        self._num_kept = 0
        self._free: deque[tuple[int, int]] = deque()  # filled by whoever lets go of a body, on any thread

    def bound(self, *, receive_s: float | None = None, send_s: float | None = None) -> None:
        """How long a blocking call waits for the other side, from now on. None: as before."""
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
        self._socket.sendall(self._asked(method, parts, timeout_us))

    def answer(self) -> tuple[bool, Body]:
        """Whether it is a reply, and its body; or an ErrorDetail.

        Raises:
            OSError: The other side is gone, or says nothing in time.
            InvalidRequest: It is no message.
        """
        while self._end - self._start < HEADER_BYTES:
            num_bytes = came(self._socket.recv_into(self._space()))  # _space may move what is there
            self._end += num_bytes
        message, body, at = self._begun()
        while body is not None and at < message.num_bytes:
            at += came(self._socket.recv_into(body[at:]))
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
        answered: asyncio.Future[tuple[Message, Body]] = loop.create_future()
        late = None if end_s is None else loop.call_at(end_s, _end_with, answered, TimeoutError())
        loop.add_reader(descriptor := self._socket.fileno(), self._take_for, answered)
        try:
            return self._answered(*await answered)
        finally:
            loop.remove_reader(descriptor)
            if late is not None:
                late.cancel()
            del answered  # its error knows this frame

    async def _sent_on(self, loop: asyncio.AbstractEventLoop, asked: bytes, end_s: float | None) -> None:
        try:
            num_bytes = self._socket.send(asked, socket.MSG_DONTWAIT)
        except BlockingIOError:
            num_bytes = 0
        if num_bytes < len(asked):
            self._socket.setblocking(False)
            async with asyncio.timeout_at(end_s):
                await loop.sock_sendall(self._socket, asked[num_bytes:])
            self._socket.settimeout(None)

    def _take_for(self, answered: "asyncio.Future[tuple[Message, Body]]") -> None:
        """Something is there for whoever waits on the loop."""
        try:
            found = self.take()
        except (OSError, InvalidRequest) as error:
            _end_with(answered, error)
        else:
            if found is not None and not answered.done():
                answered.set_result(found)

    def _asked(self, method: int, parts: Parts, timeout_us: int) -> bytes:
        self._call = (self._call + 1) % _LAST_CALL
        return self._packed(Message(REQUEST, self._call, method, timeout_us), parts, self._copied())

    def _copied(self) -> bytes:
        """What the server is to be told: replies that are not needed any more."""
        told = b""
        while self._free:
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


def _end_with(answered: "asyncio.Future[tuple[Message, Body]]", error: BaseException) -> None:
    if not answered.done():
        answered.set_exception(error)


def came(num_bytes: int) -> int:
    """So many bytes, which are some. Raises ConnectionError where they are none."""
    if not num_bytes:
        raise ConnectionError("the other side has ended the line")
    return num_bytes


def supported() -> bool:
    """Whether this system has all that a line needs."""
    return hasattr(os, "memfd_create") and hasattr(socket, "AF_UNIX") and hasattr(socket, "SO_PEERCRED")
