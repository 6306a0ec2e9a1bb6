"""[ECHO] Bare servers that answer with as many bytes as they are asked for: what a look-up's bytes cost by themselves.

A request begins with the length of its answer; over the Unix socket its own length comes first. Loads neither torch nor
mempool's own servers.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading

from mempool.bench.processes.child import Parent

#: How long the answer shall be, before a request's other bytes.
WANTED = struct.Struct("<Q")
#: Over the socket: how long the request is, and its answer.
LENGTHS = struct.Struct("<QQ")
GRPC_METHOD = "/bench.Echo/Exchange"
GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_FILL = b"e"


def answer(num_bytes: int) -> bytes:
    """What a server answers."""
    return _FILL * num_bytes


def serve_grpc(parent: Parent) -> None:
    """grpc.aio, on a loop in the main thread, with a handler of bytes."""
    import grpc
    import grpc.aio

    answers: dict[int, bytes] = {}

    async def exchange(request: bytes, _: object) -> bytes:
        (wanted,) = WANTED.unpack_from(request)
        made = answers.get(wanted)
        if made is None:
            made = answers[wanted] = answer(wanted)
        return made

    class Handler(grpc.GenericRpcHandler):
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
            return grpc.unary_unary_rpc_method_handler(exchange) if call.method == GRPC_METHOD else None

    async def serve() -> None:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        server.add_generic_rpc_handlers([Handler()])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        parent.say(f"127.0.0.1:{port}")
        ended, loop = asyncio.Event(), asyncio.get_running_loop()

        def wait() -> None:
            parent.wait()
            loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=wait, daemon=True).start()
        await ended.wait()
        await server.stop(0)

    asyncio.run(serve())


def serve_unix(parent: Parent, *, path: str) -> None:
    """A blocking Unix socket, a thread for each connection."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    threading.Thread(target=_accept, args=(listening,), daemon=True).start()
    parent.say(path)
    parent.wait()


def _accept(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=_exchange, args=(connection,), daemon=True).start()


def _exchange(connection: socket.socket) -> None:
    request, made = memoryview(bytearray()), b""
    head = memoryview(bytearray(LENGTHS.size))
    with connection:
        while receive(connection, head):
            length, wanted = LENGTHS.unpack(head)
            if len(request) != length:
                request = memoryview(bytearray(length))
            if len(made) != wanted:
                made = answer(wanted)
            if not receive(connection, request):
                return
            connection.sendall(made)


def receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill a buffer. False: the other end is gone."""
    while len(into):
        count = connection.recv_into(into)
        if not count:
            return False
        into = into[count:]
    return True
