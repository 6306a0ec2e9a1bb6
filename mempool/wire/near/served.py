"""A server's end of a line, for a thread that has many: it takes what is there, sends what fits, and never waits."""

import socket

from mempool.wire.near.framing import Message, header_of
from mempool.wire.near.line import SHARED_FROM_BYTES, Line, Parts
from mempool.wire.near.memory import ReceivedMemory, SentMemory

_HEAD_BYTES = 4096
"""Room before the memory that is given for the end of a body."""


class ServedLine(Line):
    """See ``Line``."""

    def __init__(self, connection: socket.socket, sent: SentMemory, received: ReceivedMemory) -> None:
        super().__init__(connection, sent, received)
        connection.setblocking(False)
        self._space_taken: tuple[int, int] | None = None
        self._unsent: list[bytes | memoryview] = []

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

    def send(self, message: Message, parts: Parts = ()) -> bool:
        """Send a message with its body; whether all of it is gone: ``flush`` sends the rest, when it can be written.

        Raises:
            OSError: The other side is gone.
            InvalidRequest: As of ``Line``; nothing was sent.
        """
        self._unsent.append(self._packed(message, parts))
        return self.flush()

    def send_space(self, message: Message, parts: Parts) -> bool:
        """As ``send``, of a body whose last part lies in the memory that was taken."""
        assert self._space_taken is not None, "it was taken"
        *head, last = parts
        before, num_bytes = sum([len(part) for part in head]), len(last)
        if before > _HEAD_BYTES:
            sent = self.send(message, parts)
            self.drop_space()
            return sent
        extent, self._space_taken = self._space_taken, None
        place = extent[0] + _HEAD_BYTES - before
        self._sent.write(place, head)
        self._extents[message.call] = extent
        self._unsent.append(header_of(message, before + num_bytes, place))
        return self.flush()

    def flush(self) -> bool:
        """Send what is still to be sent, as far as it is taken; whether that is all. Raises OSError likewise."""
        while self._unsent:
            try:
                num_bytes = self._socket.send(self._unsent[0])
            except BlockingIOError:
                return False
            rest = memoryview(self._unsent[0])[num_bytes:]
            self._unsent[:1] = [rest] if len(rest) else []
        return True

    def space(self, num_bytes: int) -> memoryview | None:
        """Memory that a body of this side's may end with, until the next message is sent; None: there is none now."""
        self.drop_space()
        if num_bytes < SHARED_FROM_BYTES:
            return None
        self._space_taken = self._sent.take(_HEAD_BYTES + num_bytes)
        if self._space_taken is None:
            return None
        begin = self._space_taken[0] + _HEAD_BYTES
        return self._sent.view(begin, begin + num_bytes)

    def drop_space(self) -> None:
        """It is not needed."""
        if self._space_taken is not None:
            self._sent.give_back(self._space_taken)
            self._space_taken = None
