"""A network that can be cut: a TCP proxy in front of a shard, for the clients of this process."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mempool.wire.channels.grpc_channel import GrpcChannel, GrpcChannels
from mempool.wire.channels.line_channel import LineChannel

_PIECE_BYTES = 2**16
_RESET = struct.pack("ii", 1, 0)
"""Of SO_LINGER: whoever is at the other end hears of a reset."""


class Proxy:
    """Forwards connections to an address. While it is cut nothing passes, and nobody is told.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._open = threading.Event()
        self._open.set()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """From now on nothing passes."""
        self._open.clear()

    def heal(self) -> None:
        """All that was held up passes, and what comes."""
        self._open.set()

    def reset(self) -> None:
        """Break the connections that there are, whatever is on its way; new ones pass."""
        broken, self._sockets = self._sockets, []
        for each in broken:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        self._open.set()
        for each in (self._listening, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                try:
                    there = socket.create_connection((self._target[0], int(self._target[2])))
                except OSError:  # nobody listens there any more
                    here.close()
                    continue
                self._sockets += [here, there]
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                self._open.wait()
                sink.sendall(piece)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class Proxies(dict[str, Proxy]):
    """One in front of every address that is asked for; addresses of controllers too."""

    def __missing__(self, address: str) -> Proxy:
        self[address] = made = Proxy(address)
        return made


@contextmanager
def reached_through(proxies: dict[str, Proxy]) -> Iterator[None]:
    """Clients that are made within reach addresses through these, where there is one; by gRPC alone there, as a line
    would pass them by."""
    dialled = GrpcChannels.__call__

    def through(self: GrpcChannels, address: str, *, shard: int | None = None) -> GrpcChannel:
        try:
            proxy = proxies[address]
        except KeyError:
            return dialled(self, address, shard=shard)
        return dialled(self, proxy.address, shard=shard)

    async def no_line(_: LineChannel) -> None:
        return None

    opened = LineChannel._open_tcp
    GrpcChannels.__call__ = through  # type: ignore[method-assign]
    LineChannel._open_tcp = no_line  # type: ignore[method-assign]
    try:
        yield
    finally:
        GrpcChannels.__call__ = dialled  # type: ignore[method-assign]
        LineChannel._open_tcp = opened  # type: ignore[method-assign]


@contextmanager
def cut_at(proxies: dict[str, Proxy], method: str, victim: Proxy) -> Iterator[threading.Event]:
    """As ``reached_through``; and once armed, the next message of a method cuts one of them before it leaves.

    Yields:
        Set it to arm; it is cleared when the cut is made.
    """
    armed = threading.Event()
    called = GrpcChannel.call

    async def cutting(self: GrpcChannel, asked: Any, request: Any, **options: Any) -> Any:
        if armed.is_set() and asked.name == method:
            victim.cut()
            armed.clear()
        return await called(self, asked, request, **options)

    GrpcChannel.call = cutting  # type: ignore[method-assign]
    try:
        with reached_through(proxies):
            yield armed
    finally:
        GrpcChannel.call = called  # type: ignore[method-assign]
