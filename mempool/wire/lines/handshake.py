"""How two processes agree on a line: same host, same network namespace, same user, the pool's token, the same server.

The client connects to an abstract socket (which is no file, and gone with its server) whose name has the server's port.
Blocking calls with a bound; for a thread.
"""

import hmac
import json
import os
import socket
import struct
import time
from typing import Any

from mempool.errors import InvalidRequest, ShardUnavailable, Unauthenticated
from mempool.wire.lines.framing import VERSION
from mempool.wire.lines.memory import ReceivedMemory, SentMemory

TIMEOUT_S = 2.0
_MOST_BYTES = 16 * 2**10
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def name_of(port: int) -> str:
    """Of the socket of the server that has this port."""
    return f"\0mempool-near-{port}"


def port_of(address: str) -> int:
    """Of "host:port"; 0 where it has none."""
    port = address.rpartition(":")[2]
    return int(port) if port.isdecimal() else 0


def listener(port: int) -> socket.socket:
    """A socket that waits for clients of the server that has this port. Raises OSError where the name is taken."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(name_of(port))
        listening.listen(64)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


def call(
    address: str, token: str | None, *, timeout_s: float = TIMEOUT_S
) -> tuple[socket.socket, SentMemory, ReceivedMemory]:
    """[CLIENT] connect to the server at an address, where that is one of this host and user.

    Raises:
        OSError: There is none, or it says nothing in time.
        ShardUnavailable: It is another server, another user's, or speaks another version.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sent: SentMemory | None = None
    try:
        connection.settimeout(timeout_s)
        connection.connect(name_of(port_of(address)))
        _require_own(connection)
        sent = SentMemory()
        _send(connection, {"version": VERSION, "address": address, "token": token}, sent.descriptor)
        answer, descriptor = _receive(connection, timeout_s)
        if answer.get("version") != VERSION or not answer.get("agreed") or descriptor is None:
            raise ShardUnavailable(f"no shared memory with {address}: {answer.get('why', 'it did not agree')}")
        received = _received(descriptor)
    except BaseException:
        connection.close()
        if sent is not None:
            sent.close()
        raise
    return connection, sent, received


def answer(connection: socket.socket, address: str, token: str | None) -> tuple[SentMemory, ReceivedMemory, str]:
    """[SERVER] agree with a client; and what to call it.

    Raises:
        OSError: It is gone.
        MempoolError: It is no client of this server; it was told so.
    """
    connection.settimeout(TIMEOUT_S)
    pid = _require_own(connection)
    asked, descriptor = _receive(connection, TIMEOUT_S)
    sent: SentMemory | None = None
    try:
        if asked.get("version") != VERSION:
            raise InvalidRequest(f"version {asked.get('version')}, and this is {VERSION}")
        if asked.get("address") != address:
            raise InvalidRequest(f"this is {address}, not {asked.get('address')}")
        said = str(asked.get("token")).encode(errors="replace")
        if token is not None and not hmac.compare_digest(said, token.encode()):
            raise Unauthenticated("the token is not this pool's")
        if descriptor is None:
            raise InvalidRequest("no memory came along")
        handed, descriptor = descriptor, None  # closed there, whatever comes of it
        received = _received(handed)
        sent = SentMemory()
        _send(connection, {"version": VERSION, "agreed": True}, sent.descriptor)
    except (InvalidRequest, Unauthenticated) as error:
        if descriptor is not None:
            os.close(descriptor)
        if sent is not None:
            sent.close()
        _send(connection, {"version": VERSION, "agreed": False, "why": error.message})
        raise
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        if sent is not None:
            sent.close()
        raise
    return sent, received, f"unix:{pid}"


def _require_own(connection: socket.socket) -> int:
    """The pid of the other side. Raises ShardUnavailable where it is another user's."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(found)
    if user != os.geteuid():
        raise ShardUnavailable(f"no shared memory with a process of user {user}")
    return int(pid)


def _send(connection: socket.socket, said: dict[str, Any], descriptor: int | None = None) -> None:
    data = json.dumps(said).encode() + b"\n"
    socket.send_fds(connection, [data], [] if descriptor is None else [descriptor])


def _receive(connection: socket.socket, timeout_s: float) -> tuple[dict[str, Any], int | None]:
    """What was said, and a descriptor that came along, which is the caller's to close."""
    data, descriptor = b"", None
    end_s = time.monotonic() + timeout_s  # of all of it, however slowly it comes
    try:
        while not data.endswith(b"\n"):
            connection.settimeout(max(1e-3, end_s - time.monotonic()))
            some, came, _, _ = socket.recv_fds(connection, _MOST_BYTES, 1)
            for one in came:
                if descriptor is None:
                    descriptor = one
                else:  # however many come: none is held
                    os.close(one)
            data += some
            if not some or len(data) > _MOST_BYTES:
                raise InvalidRequest("the handshake was not ended")
        said = json.loads(data)
        if not isinstance(said, dict):
            raise InvalidRequest("the handshake is no mapping")
    except (InvalidRequest, ValueError, RecursionError) as error:
        if descriptor is not None:
            os.close(descriptor)
        raise InvalidRequest(f"no handshake: {error}") from None
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    return said, descriptor


def _received(descriptor: int) -> ReceivedMemory:
    try:
        return ReceivedMemory(descriptor)
    finally:
        os.close(descriptor)
