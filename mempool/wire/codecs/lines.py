"""Request and reply of ``OpenLine``, by which a client is given a line over TCP, and their codecs."""

from __future__ import annotations

from dataclasses import dataclass, field

from mempool.wire.codecs.codec import ProtoCodec
from mempool.wire.codecs.mirror import Mirror
from mempool.wire.v1 import data_pb2 as pb

_MOST_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLine:
    """Asks for a line. version: Of the messages, as the client knows them. client: A number that it has drawn."""

    version: int
    client: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedLine:
    """Where to connect to, and the secrets of it (``wire.lines.tcp``); port 0: there is none, and ``why``."""

    port: int = 0
    ticket: bytes = field(default=b"", repr=False)
    answer: bytes = field(default=b"", repr=False)
    why: str = ""


OPEN_LINE_REQUEST = ProtoCodec(Mirror(pb.OpenLineRequest, OpenLine), _MOST_BYTES)
OPEN_LINE_REPLY = ProtoCodec(Mirror(pb.OpenLineReply, OpenedLine), _MOST_BYTES)
