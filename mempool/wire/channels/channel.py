"""The seam of transports: ``Channel``, one connection to one address, and gRPC's options of both its ends.

Leaves how messages cross to ``grpc_channel``, or another behind the same protocol; routing and retries to ``client``.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from mempool.wire.methods import Method

MAX_MESSAGE_BYTES = 256 * 2**20
"""Of any message. Answers may have so much: only who asks for it holds it."""
MAX_ANSWER_BYTES = 4 * 2**20
"""Of values, scores and rows that a client asks for: all of a shard stands still while gRPC copies a message. Clients
ask for more by several messages. A row that is larger travels by itself."""
MAX_REQUEST_BYTES = (128 + 16) * 2**20
"""Of what a server reads: a server holds it for anyone who sends it. 65,536 bags of 128 pairs, or a head's keys."""
MAX_CONCURRENT_STREAMS = 256
"""Calls at a time of one connection; more wait at the client."""

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
Options = list[tuple[str, Any]]

_LOOKAHEAD_BYTES = 2 * 2**20
_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000


class Channel(Protocol):
    """One connection. Made, used and closed on the IO loop (``mempool.wire.channels.loop``)."""

    @property
    def address(self) -> str:
        """Where it leads, for messages."""

    async def call(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        narrow_ids: bool = False,
    ) -> ReplyT:
        """One call, tried once.

        Args:
            method: One of ``mempool.wire.methods`` that does not stream.
            request: Its request.
            timeout_s: The call's deadline, known to the server too.
            narrow_ids: Send slot ids as uint32; the caller knows that they fit.

        Raises:
            MempoolError: As the server raised it, or what the transport's failure means.
        """

    def begin(
        self,
        method: Method[RequestT, ReplyT],
        request: RequestT,
        *,
        timeout_s: float,
        narrow_ids: bool = False,
        alone: bool = True,
    ) -> Callable[[], ReplyT | None] | None:
        """As ``call``, on this thread, not the loop's: it waits for the answer by calling what is returned, once.

        None, of either: it could not be asked, or was not answered with a reply; ``call`` says why.

        Args:
            alone: The caller waits for this at once. False: it asks others meanwhile.
        """

    def stream(
        self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float | None = None
    ) -> AsyncIterator[ReplyT]:
        """The messages of a call that streams. Raises as ``call``; ending the iteration cancels the call."""

    async def close(self) -> None:
        """Ends the connection; calls under way end with Unavailable. Repeatable."""


class Channels(Protocol):
    """Makes connections of one kind, with what their calls carry: the pool's secrets, limits, encryption."""

    def __call__(self, address: str, *, shard: int | None = None) -> Channel:
        """A connection to an address; ``shard``: the shard there, for error messages, None for the pool.

        Raises:
            Unauthenticated: No pool has such a token.
        """


def client_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES, server_name: str | None = None) -> Options:
    """Channel options of a client. server_name: what the servers' certificates are checked for, not their address."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", min(max_message_bytes, MAX_REQUEST_BYTES)),
        # Else channels of one process to one address share a single TCP connection.
        ("grpc.use_local_subchannel_pool", 1),
        # Retries are the client's, inside one deadline.
        ("grpc.enable_retries", 0),
        # Shards come back within seconds; do not sit out gRPC's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A host that vanished without a word is noticed within 40 s of a call's wait.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # Addresses of shards are inside the cluster; a web proxy of the environment is not meant for them.
        ("grpc.enable_http_proxy", 0),
        *([("grpc.ssl_target_name_override", server_name)] if server_name else []),
    ]


def server_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Options:
    """Options of a server that go with ``client_options``."""
    return [
        ("grpc.max_receive_message_length", min(max_message_bytes, MAX_REQUEST_BYTES)),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        # So much of a message may come before the call is let in. By its own estimate gRPC lets 16 MiB a call come,
        # read or not: a gibibyte of 64 connections that wait.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _LOOKAHEAD_BYTES),
        # Two servers on one port must fail, not share its connections.
        ("grpc.so_reuseport", 0),
        # Below the client's keepalive, or the server would end connections for "too many pings".
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 3),
        ("grpc.keepalive_time_ms", 2 * _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ]
