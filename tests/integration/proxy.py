"""A network that can be cut: a TCP proxy in front of one shard, for the clients of this process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mempool.wire.channels.grpc_channel import GrpcChannel, GrpcChannels

_PIECE_BYTES = 2**16


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
                there = socket.create_connection((self._target[0], int(self._target[2])))
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


@contextmanager
def cut_at(proxies: dict[str, Proxy], method: str, victim: Proxy) -> Iterator[threading.Event]:
    """Clients that are made within reach shards through proxies, by address; once armed, the next message of a method
    cuts one of them before it leaves.

    Yields:
        Set it to arm; it is cleared when the cut is made.
    """
    armed = threading.Event()
    dialled, called = GrpcChannels.__call__, GrpcChannel.call

    def through(self: GrpcChannels, address: str, *, shard: int | None = None) -> GrpcChannel:
        proxy = proxies.get(address)
        return dialled(self, address if proxy is None else proxy.address, shard=shard)

    async def cutting(self: GrpcChannel, asked: Any, request: Any, **options: Any) -> Any:
        if armed.is_set() and asked.name == method:
            victim.cut()
            armed.clear()
        return await called(self, asked, request, **options)

    GrpcChannels.__call__, GrpcChannel.call = through, cutting  # type: ignore[method-assign]
    try:
        yield armed
    finally:
        GrpcChannels.__call__, GrpcChannel.call = dialled, called  # type: ignore[method-assign]
