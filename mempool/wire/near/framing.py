"""Messages of a line: a header of fixed size, and a body behind it or in shared memory. Pure."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mempool.errors import InvalidRequest
from mempool.wire.channels.channel import MAX_MESSAGE_BYTES

REQUEST, REPLY, FAILURE, CANCEL, COPIED = range(1, 6)
"""Kinds. FAILURE: the body is an ErrorDetail. COPIED: the body of that reply is not needed in shared memory any more;
that of a request is not as soon as it is answered."""
Kind = Literal[1, 2, 3, 4, 5]
MOST_REQUEST_BYTES = 16 * 2**20
"""Larger requests go by gRPC: a server may have to hold as much for each line."""
_INLINE, _SHARED = 0, 1
_HEADER = struct.Struct("<IBBHQQq")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        kind: What it is.
        call: Its number, of the client's.
        method: Which call, in ``methods``.
        timeout_us: What is left of the caller's time, microseconds; negative: no end.
        num_bytes: Of the body.
        place: Where the body lies in the sender's shared memory; None: it comes with the message.
        body: Where it came with the message.
    """

    kind: int
    call: int
    method: int = 0
    timeout_us: int = -1
    num_bytes: int = 0
    place: int | None = None
    body: bytes = b""

    def header(self) -> bytes:
        """The bytes before the body."""
        where = _INLINE if self.place is None else _SHARED
        return _HEADER.pack(self.call, self.kind, where, self.method, self.num_bytes, self.place or 0, self.timeout_us)


class Reader:
    """Cuts a stream of bytes into messages.

    Args:
        most_bytes: Of a body.
    """

    def __init__(self, *, most_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._data = bytearray()
        self._waits_for = HEADER_BYTES

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole by now.

        Raises:
            InvalidRequest: It is none; nothing that follows can be read.
        """
        if not self._data and len(data) == HEADER_BYTES:  # nearly all
            message = self._parsed(data)
            if message.place is not None or not message.num_bytes:
                yield message
                return
        self._data += data
        at = 0
        while len(self._data) - at >= self._waits_for:
            message = self._parsed(self._data, at)
            inline = 0 if message.place is not None else message.num_bytes
            if len(self._data) - at < HEADER_BYTES + inline:
                self._waits_for = HEADER_BYTES + inline
                break
            self._waits_for = HEADER_BYTES
            begin, at = at + HEADER_BYTES, at + HEADER_BYTES + inline
            yield message if not inline else _with_body(message, bytes(memoryview(self._data)[begin:at]))
        if at:
            del self._data[:at]

    def _parsed(self, data: bytes | bytearray, at: int = 0) -> Message:
        call, kind, where, method, num_bytes, place, timeout_us = _HEADER.unpack_from(data, at)
        if not REQUEST <= kind <= COPIED or where > _SHARED or num_bytes > self._most_bytes:
            raise InvalidRequest(f"no message: kind {kind}, where {where}, {num_bytes:,} bytes")
        return Message(kind, call, method, timeout_us, num_bytes, place if where == _SHARED else None)


def _with_body(message: Message, body: bytes) -> Message:
    return Message(message.kind, message.call, message.method, message.timeout_us, message.num_bytes, None, body)
