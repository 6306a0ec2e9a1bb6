"""Messages of a line: a header of fixed size, and a body behind it or in shared memory. Pure."""

import struct
from typing import NamedTuple

from mempool.errors import InvalidRequest

REQUEST, REPLY, FAILURE, COPIED = range(1, 5)
"""Kinds. FAILURE: the body is an ErrorDetail. COPIED: the body of that reply is not needed in shared memory any more;
that of a request is not as soon as it is answered."""
VERSION = 5
"""Of messages, and of what ``plain`` makes of gathers and updates: both ends of a line are of the same."""
MOST_INLINE_BYTES = 2**20
"""Of a request that comes with its message, of a line that has memory for bodies: the server has to hold it."""
MOST_REQUEST_BYTES = 4 * 2**20
"""Of any request; larger ones go by gRPC: memory that is shared has room for few, and a server that is sent one has to
hold it."""
_INLINE, _SHARED = 0, 1
_HEADER = struct.Struct("<IBBHQQq")
HEADER_BYTES = _HEADER.size


class Message(NamedTuple):
    """One message.

    Attributes:
        kind: What it is.
        call: Its number, of the client's.
        method: Which call, in ``methods``.
        timeout_us: What is left of the caller's time, microseconds; negative: no end.
        num_bytes: Of the body.
        place: Where the body lies in the sender's shared memory; None: it comes with the message.
    """

    kind: int
    call: int
    method: int = 0
    timeout_us: int = -1
    num_bytes: int = 0
    place: int | None = None


def header_of(message: Message, num_bytes: int = 0, place: int | None = None) -> bytes:
    """The bytes before the body, of which this says how long it is and where it lies."""
    where = _INLINE if place is None else _SHARED
    return _HEADER.pack(message.call, message.kind, where, message.method, num_bytes, place or 0, message.timeout_us)


def parsed(data: bytes | bytearray | memoryview, at: int = 0, *, most_inline: int = MOST_INLINE_BYTES) -> Message:
    """The message whose header is at ``at``. Raises InvalidRequest where it is none, or its body, which comes with it,
    is larger than that; nothing that follows can be read then."""
    call, kind, where, method, num_bytes, place, timeout_us = _HEADER.unpack_from(data, at)
    if not REQUEST <= kind <= COPIED or where > _SHARED or (where == _INLINE and num_bytes > most_inline):
        raise InvalidRequest(f"no message: kind {kind}, where {where}, {num_bytes:,} bytes")
    return Message(kind, call, method, timeout_us, num_bytes, place if where == _SHARED else None)
