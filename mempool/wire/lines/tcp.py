"""How two processes, of any hosts, agree on a line over TCP: by a ticket that the client was given over gRPC, once.

The ticket shows that the client was let in there, and the answer to it that this is that server. Both are secrets of
ten seconds. What comes before is anyone's: it has a size and a time, and is compared in constant time.
"""

import asyncio
import hmac
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from mempool.errors import InvalidRequest, ShardUnavailable, Unauthenticated
from mempool.wire.lines.framing import VERSION

TIMEOUT_S = 2.0
"""For the whole of it, at either end."""
SECRET_BYTES = 32
TICKET_S = 10.0
MOST_TICKETS = 64
"""That were given out and are still good."""
_HELLO = struct.Struct("<8sII32s")
_MAGIC = b"mempool\0"
_BACKLOG = 64
# A host that vanished without a word is known to be gone within a minute, whoever waits for whom.
_IDLE_S, _PROBE_S, _PROBES, _UNTAKEN_MS = 30, 10, 3, 30_000


def possible() -> bool:
    """Whether this process may be an end: messages have the byte order of most hosts."""
    return sys.byteorder == "little"


@dataclass(frozen=True, slots=True)
class Ticket:
    """Secrets of one line to come, ``SECRET_BYTES`` each. client: Whose it is, a number that it has drawn."""

    ticket: bytes
    answer: bytes
    client: int
    end_s: float


class Tickets:
    """Tickets that are good still: each once, for ten seconds.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._given: list[Ticket] = []

    def give(self, client: int) -> Ticket | None:
        """A new one; None where too many are out."""
        self._forget()
        if len(self._given) >= MOST_TICKETS:
            return None
        ticket = Ticket(
            secrets.token_bytes(SECRET_BYTES), secrets.token_bytes(SECRET_BYTES), client, self._clock() + TICKET_S
        )
        self._given.append(ticket)
        return ticket

    def take(self, shown: bytes) -> Ticket:
        """The one that was shown, which is good no more. Raises Unauthenticated where there is none."""
        self._forget()
        found = [ticket for ticket in self._given if hmac.compare_digest(ticket.ticket, shown)]
        if not found:
            raise Unauthenticated("the ticket is none, was used, or is over")
        self._given.remove(found[0])
        return found[0]

    def _forget(self) -> None:
        now_s = self._clock()
        self._given = [ticket for ticket in self._given if ticket.end_s > now_s]


def listener(host: str, ports: Iterable[int]) -> socket.socket:
    """A socket that waits for clients at the first port of these that is free (0: any). Raises OSError."""
    host = host.strip("[]")
    family, _, _, _, address = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    failed: OSError = OSError("there is no port to listen at")
    for port in ports:
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A server that is started again takes the port of connections that are still ending.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((address[0], port, *address[2:]))
            listening.listen(_BACKLOG)
            listening.setblocking(False)
        except OSError as error:
            listening.close()
            failed = error
        else:
            return listening
    raise failed


def call(host: str, port: int, ticket: bytes, answer: bytes, *, timeout_s: float = TIMEOUT_S) -> socket.socket:
    """[CLIENT] connect, show the ticket, and look whether it is that server. Blocking; for a thread.

    Raises:
        OSError: Nobody is there, or says nothing in time.
        ShardUnavailable: It is somebody else.
    """
    end_s = time.monotonic() + timeout_s
    connection = socket.create_connection((host.strip("[]"), port), timeout_s)
    try:
        configure(connection)
        connection.settimeout(max(1e-3, end_s - time.monotonic()))
        connection.sendall(_hello(ticket))
        data = b""
        while len(data) < _HELLO.size:
            connection.settimeout(max(1e-3, end_s - time.monotonic()))
            some = connection.recv(_HELLO.size - len(data))
            if not some:
                raise ShardUnavailable(f"{host}:{port} takes no ticket")
            data += some
        if not hmac.compare_digest(_secret_of(data), answer):
            raise ShardUnavailable(f"{host}:{port} is another server")
    except InvalidRequest as error:
        connection.close()
        raise ShardUnavailable(f"{host}:{port} is no server of lines: {error.message}") from None
    except BaseException:
        connection.close()
        raise
    return connection


async def answer(connection: socket.socket, tickets: Tickets) -> Ticket:
    """[SERVER] look at the ticket of a connection that does not block, and answer it; on an event loop.

    Raises:
        OSError: It is gone, or says nothing in time.
        InvalidRequest: It speaks another language, or version.
        Unauthenticated: It has no ticket that is good.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(TIMEOUT_S):
        data = b""
        while len(data) < _HELLO.size:
            some = await loop.sock_recv(connection, _HELLO.size - len(data))
            if not some:
                raise ConnectionError("it has shown no ticket")
            data += some
        ticket = tickets.take(_secret_of(data))
        configure(connection)
        await loop.sock_sendall(connection, _hello(ticket.answer))
    return ticket


def configure(connection: socket.socket) -> None:
    """Messages leave at once, and a peer that vanished is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_KEEPIDLE", _IDLE_S),
        ("TCP_KEEPINTVL", _PROBE_S),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", _UNTAKEN_MS),
    )
    for name, value in options:
        if (option := getattr(socket, name, None)) is not None:
            with suppress(OSError):  # the system has its own
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _hello(secret: bytes) -> bytes:
    return _HELLO.pack(_MAGIC, VERSION, 0, secret)


def _secret_of(data: bytes) -> bytes:
    magic, version, _, secret = _HELLO.unpack(data)
    if magic != _MAGIC:
        raise InvalidRequest("it says something else")
    if version != VERSION:
        raise InvalidRequest(f"version {version}, and this is {VERSION}")
    return bytes(secret)
