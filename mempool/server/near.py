"""The server's end of lines: clients of this host and user, whose bodies are in shared memory. Calls are as by gRPC.

Each line has a thread, which waits for requests and for their answers: what the shard can answer at once is answered
there, without an event loop. What one line may have this process hold is bounded: it brings one request at a time.
"""

import asyncio
import logging
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mempool.errors import InvalidRequest, MempoolError, RequestTooLarge, ShardUnavailable
from mempool.observe import Stages
from mempool.server.services import AtOnce
from mempool.types.caller import Caller, calling
from mempool.wire import methods
from mempool.wire.methods import Method
from mempool.wire.near import handshake
from mempool.wire.near.framing import COPIED, FAILURE, REPLY, REQUEST, Message
from mempool.wire.near.line import Body, Line, Parts
from mempool.wire.near.memory import ReceivedMemory, SentMemory
from mempool.wire.near.methods import GATHER, METHODS, UPDATE
from mempool.wire.status import to_status

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOG = logging.getLogger("mempool.server")
_AGAIN_S = 1.0
_MOST_LINES = 64
_SEND_TIMEOUT_S = 30.0
"""For a client to take an answer; it has nothing else to do."""
_END_TIMEOUT_S = 2.0
_LONGEST_TURN_S = 60.0
_IN_PLACE = (GATHER, UPDATE)
"""Calls whose tensors are read where they came: the shard copies what it keeps of them."""

Calls = Mapping[str, Callable[[Any], Awaitable[Any]]]


class NearServer:
    """Takes clients of this host.

    Args:
        address: The server's, as clients know it.
        token: The pool's.
        calls: What answers, by a method's path.
        at_once: Answers gathers and updates on the thread that asks.
        stages: Where the stages of calls are timed.
        max_message_bytes: Larger answers are refused.

    Attributes:
        closing: No call is let in any more.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None,
        calls: Calls,
        stages: Stages,
        max_message_bytes: int,
        at_once: AtOnce | None = None,
    ) -> None:
        self._address = address
        self._token = token
        self._calls = [calls.get(method.path) for method in METHODS]
        self._at_once = at_once
        self._stages = stages
        self._max_message_bytes = max_message_bytes
        self._loop = asyncio.get_running_loop()
        self._lines: set[_Serving] = set()
        self._beginning: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None
        self._taking: asyncio.Task[None] | None = None
        self._begun = 0
        self.closing = False

    @property
    def num_lines(self) -> int:
        """Clients that are connected so: a line is one call at a time, and a process has several."""
        return len(self._lines)

    @property
    def num_clients(self) -> int:
        """Processes that have lines."""
        return len({serving.peer.rpartition(":")[0] for serving in list(self._lines)})

    def start(self) -> None:
        """Wait for clients. Where the name is taken, or there is no such thing here, they all come by gRPC."""
        try:
            self._listening = handshake.listener(handshake.port_of(self._address))
        except OSError as error:
            _LOG.warning("no client of this host gets shared memory: %s", error)
            return
        self._taking = asyncio.get_running_loop().create_task(self._take())

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no more, let calls under way end for so long, and end all lines."""
        self.closing = True
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])
        if self._listening is not None:
            self._listening.close()
        if self._beginning:
            await asyncio.wait(self._beginning)
        end_s = self._loop.time() + grace_s
        while any(serving.busy for serving in list(self._lines)) and self._loop.time() < end_s:
            await asyncio.sleep(0.01)
        for serving in list(self._lines):
            serving.end()
        end_s = self._loop.time() + _END_TIMEOUT_S
        while self._lines and self._loop.time() < end_s:
            await asyncio.sleep(0.01)

    async def _take(self) -> None:
        assert self._listening is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listening)
            except OSError as error:  # too many open files, say
                _LOG.warning("no client of this host gets shared memory for a moment: %s", error)
                await asyncio.sleep(_AGAIN_S)
                continue
            if len(self._lines) + len(self._beginning) >= _MOST_LINES:
                connection.close()
                continue
            task = loop.create_task(self._begin(connection))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _begin(self, connection: socket.socket) -> None:
        try:
            sent, received, peer = await asyncio.to_thread(handshake.answer, connection, self._address, self._token)
        except (OSError, MempoolError) as error:
            connection.close()
            _LOG.info("a client of this host gets no shared memory: %s", error)
            return
        self._begun += 1
        serving = _Serving(self, f"{peer}:{self._begun}", connection, sent, received)
        self._lines.add(serving)  # before it may end
        serving.start()

    # For its lines, on their threads

    def lost(self, serving: "_Serving") -> None:
        self._lines.discard(serving)

    def answer(self, message: Message, body: Body, serving: "_Serving") -> Parts:
        """The parts of an answer. Raises what the call raises."""
        call = self._calls[message.method] if message.method < len(METHODS) else None
        if call is None:
            raise InvalidRequest(f"call {message.method} is none that this server answers")
        if self.closing:
            raise ShardUnavailable("this process is ending; try again in a moment")
        method = METHODS[message.method]
        timeout_s = None if message.timeout_us < 0 else message.timeout_us / 1e6
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        began_s = time.perf_counter()
        in_place = message.place is not None and method in _IN_PLACE
        request = method.request.decode(body if in_place or message.place is None else bytes(body))
        if in_place:
            request = _with_own_numbers(request)
        self._stages.record("decode", time.perf_counter() - began_s)
        reply = self._at_once_reply(METHODS[message.method], request, serving, timeout_s)
        if reply is None:
            reply = serving.wait_for(_called(call, request, Caller(serving.peer, deadline_s)), self._loop)
        began_s = time.perf_counter()
        parts: Parts = method.reply.parts(reply)
        self._stages.record("encode", time.perf_counter() - began_s)
        num_bytes = sum([len(part) for part in parts])
        if num_bytes > self._max_message_bytes:
            raise RequestTooLarge(
                f"the answer to {method.name} would have {num_bytes:,} bytes; {self._max_message_bytes:,} are accepted "
                "(max_message_bytes). Ask for fewer bags or rows at a time"
            )
        return parts

    def _at_once_reply(
        self, method: Method[Any, Any], request: Any, serving: "_Serving", timeout_s: float | None
    ) -> Any:
        """What needs no event loop; None where that is to be asked."""
        at_once = self._at_once
        if at_once is None:
            return None
        timeout_s = _LONGEST_TURN_S if timeout_s is None else min(timeout_s, _LONGEST_TURN_S)
        try:
            if method is methods.PREPARE:
                return at_once.prepare(request, caller=serving.peer, timeout_s=timeout_s)
            if method is methods.COMMIT:
                return at_once.commit(request, caller=serving.peer, timeout_s=timeout_s)
            if method is GATHER:
                return at_once.gather(request, caller=serving.peer, timeout_s=timeout_s, space=serving.space)
            if method is UPDATE:
                return at_once.update(request, caller=serving.peer, timeout_s=timeout_s, space=serving.space)
            return None
        except MempoolError:
            return None


class _Serving:
    """One client's line, and its thread."""

    def __init__(
        self, server: NearServer, peer: str, connection: socket.socket, sent: SentMemory, received: ReceivedMemory
    ) -> None:
        self.peer = peer
        self.busy = False
        self._server = server
        self._line = Line(connection, sent, received)
        self._waiting: Future[Any] | None = None
        self._answered_in: int | None = None
        self._ended = False

    def start(self) -> None:
        """Serve on a thread of its own. Where there is none for it the line is ended."""
        try:
            threading.Thread(target=self._serve, name=f"mempool near {self.peer}", daemon=True).start()
        except RuntimeError as error:
            _LOG.warning("a client of this host gets no shared memory: %s", error)
            self._line.close()
            self._server.lost(self)

    def end(self) -> None:
        """On the loop: whatever it is at."""
        self._ended = True
        self._line.cut()
        waiting = self._waiting
        if waiting is not None:
            waiting.cancel()

    def wait_for(self, call: Any, loop: asyncio.AbstractEventLoop) -> Any:
        """What a call answers that runs on the loop. Raises what it raises."""
        try:
            self._waiting = asyncio.run_coroutine_threadsafe(call, loop)
        except RuntimeError:
            call.close()
            raise ShardUnavailable("this process is ending; try again in a moment") from None
        try:
            if self._ended:
                self._waiting.cancel()
            return self._waiting.result()
        except CancelledError:
            raise ShardUnavailable("this process is ending; try again in a moment") from None
        finally:
            self._waiting = None

    def _serve(self) -> None:
        line = self._line
        try:
            line.bound(send_s=_SEND_TIMEOUT_S)
            while not self._ended:
                message, body = line.receive()
                if message.kind == COPIED:
                    line.give_back(message.call)
                    continue
                if message.kind != REQUEST:
                    break
                self.busy = True
                self._answer(message, body)
                self.busy = False
                del body
        except (OSError, InvalidRequest):
            pass  # it is gone, or no client of ours
        except Exception:
            _LOG.exception("the line of %s has ended", self.peer)
        finally:
            line.close()
            self._server.lost(self)

    def _answer(self, message: Message, body: Body) -> None:
        try:
            parts = self._server.answer(message, body, self)
        except Exception as error:
            self._line.send(Message(FAILURE, message.call), [_detail(error, f"call {message.method} of {self.peer}")])
            return
        finally:
            answered, self._answered_in = self._answered_in, None
        if answered is not None and _address(parts[-1]) == answered:
            self._line.send_space(Message(REPLY, message.call), parts)
        else:
            self._line.drop_space()
            self._line.send(Message(REPLY, message.call), parts)

    def space(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor | None":
        """Memory that the answer may be written to."""
        import torch

        memory = self._line.space(math.prod(shape) * dtype.itemsize)
        if memory is None:
            return None
        self._answered_in = _address(memory)
        return torch.frombuffer(memory, dtype=dtype).view(shape)


def _address(memory: bytes | memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0]) if len(memory) else 0


async def _called(call: Callable[[Any], Awaitable[Any]], request: Any, caller: Caller) -> Any:
    with calling(caller):
        return await call(request)


def _with_own_numbers(request: Any) -> Any:
    """The request with ids and offsets that nobody else can write to: they are checked, and then relied on. ids that
    came as uint32 are copied when they are checked."""
    ids, offsets = request.ids, request.offsets
    if ids is None or offsets is None:
        return request
    if ids.dtype.itemsize == 8:
        ids = ids.clone()
    return replace(request, ids=ids, offsets=offsets.clone())


def _detail(error: Exception, call: str) -> bytes:
    if not isinstance(error, MempoolError | TimeoutError):
        _LOG.error("%s failed", call, exc_info=error)
    _, _, metadata = to_status(error)
    detail = bytes(metadata[0][1])  # type: ignore[arg-type]
    known: BaseException | None = error
    while known is not None:  # tracebacks hold frames, and these the request
        after = known.__cause__ or known.__context__
        known.__traceback__ = known.__cause__ = known.__context__ = None
        known = after
    return detail
