"""One end of a line, on an asyncio loop: messages out and in, bodies by shared memory where they are large."""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from mempool.errors import InvalidRequest
from mempool.wire.channels.channel import MAX_MESSAGE_BYTES
from mempool.wire.near.framing import COPIED, REPLY, REQUEST, Message, Reader
from mempool.wire.near.memory import ReceivedMemory, SentMemory

SHARED_FROM_BYTES = 16 * 2**10
"""Smaller bodies come with their message: the system copies them while it would be told where they lie."""


class Line(asyncio.Protocol):
    """One end.

    Args:
        sent, received: The memory of both ways.
        on_message: Told each message, its body in memory of this process's own.
        on_lost: Told that the other side is gone, or sends what is no message.
        most_bytes: Of a body that the other side may send.
    """

    def __init__(
        self,
        sent: SentMemory,
        received: ReceivedMemory,
        *,
        on_message: Callable[[Message, bytes], None],
        on_lost: Callable[[], None],
        most_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._sent = sent
        self._received = received
        self._on_message = on_message
        self._on_lost = on_lost
        self._reader = Reader(most_bytes=most_bytes)
        self._extents: dict[tuple[int, int], tuple[int, int]] = {}
        self._transport: asyncio.Transport | None = None
        self._holds: set[str] = set()
        self._held: deque[Message] = deque()
        self._answers = False

    @classmethod
    async def open(
        cls,
        connection: socket.socket,
        sent: SentMemory,
        received: ReceivedMemory,
        *,
        on_message: Callable[[Message, bytes], None],
        on_lost: Callable[[], None],
        most_bytes: int = MAX_MESSAGE_BYTES,
    ) -> "Line":
        """A line on a connection that has been agreed on. Both are closed with it."""
        line = cls(sent, received, on_message=on_message, on_lost=on_lost, most_bytes=most_bytes)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: line, sock=connection)
        return line

    def send(self, message: Message, parts: Sequence[bytes | memoryview] = ()) -> None:
        """Send a message with its body. Nothing happens where the line is lost."""
        transport = self._transport
        if transport is None:
            return
        num_bytes = sum(len(part) for part in parts)
        extent = self._sent.put(parts, num_bytes) if num_bytes >= SHARED_FROM_BYTES else None
        whole = Message(
            message.kind, message.call, message.method, message.timeout_us, num_bytes, extent[0] if extent else None
        )
        if extent is not None:
            self._extents[message.call, message.kind] = extent
            transport.write(whole.header())
        elif num_bytes < SHARED_FROM_BYTES:
            transport.write(b"".join((whole.header(), *parts)))
        else:
            transport.writelines([whole.header(), *parts])

    def hold(self, why: str, held: bool) -> None:
        """[SERVER] take no more messages as long as anybody wants that. Clients take answers at all times: else both
        could wait for the other."""
        self._answers = True
        before = bool(self._holds)
        (self._holds.add if held else self._holds.discard)(why)
        if self._transport is not None and bool(self._holds) != before:
            if held:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
        while self._held and not self._holds:
            self._take(self._held.popleft())

    def close(self) -> None:
        """Repeatable."""
        if self._transport is not None:
            self._transport.abort()

    # For asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                if self._holds:  # what came in one piece with the last that was taken
                    self._held.append(message)
                else:
                    self._take(message)
        except InvalidRequest:
            self.close()

    def pause_writing(self) -> None:
        if self._answers:  # who does not take them gets no more
            self.hold("writing", True)

    def resume_writing(self) -> None:
        if self._answers:
            self.hold("writing", False)

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._sent.close()
        self._on_lost()

    def _take(self, message: Message) -> None:
        body = message.body
        if message.place is not None:
            try:
                body = self._received.copied(message.place, message.num_bytes)
            except InvalidRequest:
                self.close()
                return
            if message.kind == REPLY:
                self.send(Message(COPIED, message.call))
        # What this side sent for the same call is not needed any more.
        gone = self._extents.pop((message.call, REPLY if message.kind == COPIED else REQUEST), None)
        if gone is not None:
            self._sent.give_back(gone)
        if message.kind != COPIED:
            self._on_message(message, body)


def supported() -> bool:
    """Whether this system has all that a line needs."""
    return hasattr(os, "memfd_create") and hasattr(socket, "AF_UNIX") and hasattr(socket, "SO_PEERCRED")
