"""A server's end of a line, for a thread that has many: it takes what is there, sends what fits, and never waits."""

import socket

from mempool.wire.channels.channel import MAX_MESSAGE_BYTES
from mempool.wire.lines.buffers import Buffers
from mempool.wire.lines.framing import HEADER_BYTES, Message, header_of
from mempool.wire.lines.line import BUFFER_BYTES, Body, Line, Parts, Pieces, came, rest_of
from mempool.wire.lines.shared import SHARED_FROM_BYTES, Shared

_MOST_AT_A_TIME_BYTES = 2**20
"""Of one client, before others are looked at: it may send as fast as this end reads."""


class ServedLine(Line):
    """See ``Line``.

    Attributes:
        wanted_bytes: Of a body that comes with its message, and is large: ``take`` goes no further until whoever has
            room for it sets this to 0.
    """

    def __init__(self, connection: socket.socket, shared: Shared | None = None, buffers: Buffers | None = None) -> None:
        super().__init__(connection, shared, buffers)
        connection.setblocking(False)
        self.wanted_bytes = 0
        self._space_taken: memoryview | None = None
        self._coming: Message | None = None
        self._body: memoryview | None = None
        self._at = 0
        self._unsent: Pieces = []

    def fileno(self) -> int:
        """Of its connection."""
        return self._socket.fileno()

    @property
    def has_rest(self) -> bool:
        """Whether more was received than has been taken."""
        return self._end > self._start

    @property
    def is_within(self) -> bool:
        """Whether a message has come in part, or gone in part."""
        return self._coming is not None or self._end > self._start or bool(self._unsent)

    @property
    def is_sending(self) -> bool:
        """Whether a message has gone in part."""
        return bool(self._unsent)

    def take(self) -> tuple[Message, Body] | None:
        """The next message, if it is here as a whole; its body in memory of this process's own, or where it lies.

        Raises:
            OSError: The other side is gone.
            InvalidRequest: It is no message.
        """
        if self._coming is None:
            while self._end - self._start < HEADER_BYTES:
                num_bytes = self._received_into(self._space())
                if not num_bytes:
                    return None
                self._end += num_bytes
            self._coming = self._next(self._request_bytes)
            if self._coming.place is None and self._coming.num_bytes > BUFFER_BYTES:
                self.wanted_bytes = self._coming.num_bytes
        if self.wanted_bytes:
            return None
        message = self._coming
        if self._body is None:
            self._body, self._at = self._begun(message)
        body, began = self._body, self._at
        while body is not None and self._at < message.num_bytes:
            num_bytes = self._received_into(body[self._at :])
            self._at += num_bytes
            if not num_bytes or (self._at - began > _MOST_AT_A_TIME_BYTES and self._at < message.num_bytes):
                return None
        self._coming = self._body = None
        return message, self._whole(message, body)

    def send(self, message: Message, parts: Parts = ()) -> bool:
        """Send a message with its body; whether all of it is gone: ``flush`` sends the rest, when it can be written.

        Raises:
            OSError: The other side is gone.
            InvalidRequest: As of ``Line``; nothing was sent.
        """
        self._unsent += self._packed(message, parts, MAX_MESSAGE_BYTES)
        return self.flush()

    def send_space(self, message: Message, parts: Parts) -> bool:
        """As ``send``, of a body whose last part lies in the memory that was taken."""
        assert self._space_taken is not None, "it was taken"
        if self._shared is not None:
            *head, last = parts
            before = sum(map(len, head))
            place = self._shared.put_before_space(message.call, head, before)
            if place is not None:
                self._space_taken = None
                self._unsent.append(header_of(message, before + len(last), place))
                return self.flush()
        sent = self.send(message, parts)
        self.drop_space()
        return sent

    def flush(self) -> bool:
        """Send what is still to be sent, as far as it is taken; whether that is all. Raises OSError likewise."""
        while self._unsent:
            pieces = self._unsent
            try:
                sent = self._socket.send(pieces[0]) if len(pieces) == 1 else self._socket.sendmsg(pieces)
            except BlockingIOError:
                return False
            self._unsent = rest_of(pieces, sent)
        return True

    def space(self, num_bytes: int) -> memoryview | None:
        """Memory that a body of this side's may end with, until the next message is sent; None: there is none now."""
        if self._space_taken is not None:
            self.drop_space()
        if num_bytes < SHARED_FROM_BYTES:
            return None
        self._space_taken = self._buffers.take(num_bytes) if self._shared is None else self._shared.space(num_bytes)
        return self._space_taken

    def drop_space(self) -> None:
        """It is not needed."""
        self._space_taken = None
        if self._shared is not None:
            self._shared.drop_space()

    def _received_into(self, memory: memoryview) -> int:
        """How many bytes were there; 0: none yet."""
        try:
            return came(self._socket.recv_into(memory))
        except BlockingIOError:
            return 0
