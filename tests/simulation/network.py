"""Simulated links between processes, behind the ``Channel`` protocol: late, lost, repeated, out of order, cut off.

The life of a call: [CLIENT] ``SimulatedChannel.call`` gives it to a link; [SERVER] whoever listens at the address runs
it in a task of its own, under the caller's name and deadline; its answer, or a refusal, comes back by the other link.
As over gRPC: a process that died refuses at once, one that is cut off is silent, and a caller that goes away is told
to the server. What is said is what ``mempool.server.services`` says: the tables of its services are used as they are.
"""

import asyncio
import contextvars
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from mempool.errors import DeadlineExceeded, Internal, MempoolError, Overloaded, PoolUnreachable, ShardUnavailable
from mempool.server.services import Services
from mempool.types import PoolApi, ShardHost
from mempool.types.caller import Caller, calling
from mempool.wire import methods
from mempool.wire.methods import Method
from tests.simulation.loop import ProcessLoop, Scheduler

KEEPALIVE_S = 40.0
"""After so much silence of a connection that is cut off, gRPC ends what waits for it."""
LONGEST_BREAK_S = 3.0
"""When a connection that lost a message is known to be broken, at most."""


@dataclass(slots=True)
class Weather:
    """What links do, all of them. Chances are per message."""

    shortest_s: float = 0.0002
    longest_s: float = 0.002
    slow: float = 0.0
    slowest_s: float = 2.0
    loss: float = 0.0
    repeat: float = 0.0
    longest_repeat_s: float = 20.0


@dataclass(slots=True, eq=False)
class Call:
    """One call: who asks whom for what, and what came of it; the history is made of these."""

    number: int
    process: ProcessLoop
    client: str
    server: str
    method: Method[Any, Any]
    request: Any
    sent_s: float
    reply: Any = None
    error: MempoolError | None = None
    answered_s: float | None = None
    done: bool = False


class Routes(Services):
    """The services of one process as plain functions, by service and method."""

    def __init__(self, *, shard: ShardHost | None, pool: PoolApi) -> None:
        super().__init__(max_message_bytes=2**30, door=None)  # type: ignore[arg-type]
        found: dict[str, Any] = {}
        if shard is not None:
            found |= {
                f"/{methods.MEMORY_SERVICE}/{name}": call for name, call in self.memory(shard, _no_lookup).items()
            }
            found |= {f"/{methods.SHARD_SERVICE}/{name}": call for name, call in self.shard(shard).items()}
        found |= {f"/{methods.POOL_SERVICE}/{name}": call for name, call in self.pool(pool).items()}
        found |= {methods.RESCALE.path: pool.rescale, methods.CHECKPOINT.path: pool.checkpoint}
        object.__setattr__(self, "by_path", found)

    def _of(self, method: Any, call: Any, **_: Any) -> Any:
        return method.name, call


async def _no_lookup(_: object) -> Any:
    raise Internal("lookups are not simulated")


@dataclass(slots=True, eq=False)
class Listener:
    """Who answers at an address."""

    loop: ProcessLoop
    routes: dict[str, Any]
    tasks: "dict[int, list[asyncio.Task[Any]]]" = field(default_factory=dict)
    clients: "dict[int, _Waiting]" = field(default_factory=dict)


class Network:
    """All links.

    Args:
        scheduler: Whose time it is.
        encode: Every request and reply crosses as bytes, by the wire's codecs.

    Attributes:
        weather: Of all links.
        cut: (from, to) of the links that let nothing through.
        late, again, answered_late: Seconds by which a call's request, a copy of it, or its answer, is late; put there
            by who is told of it.
        due_s: When the last message that was sent by now arrives, or is sent again as its link is cut off.
        with_commit: Calls of which a copy comes with the next Commit that their sender has decided.
        on_sent, on_served, on_answered: Told each call when it is sent, when a server has done it and when its answer
            has come.
    """

    def __init__(self, scheduler: Scheduler, *, encode: bool = False) -> None:
        self.weather = Weather()
        self.cut: set[tuple[str, str]] = set()
        self.late: dict[int, float] = {}
        self.again: dict[int, float] = {}
        self.answered_late: dict[int, float] = {}
        self.with_commit: set[int] = set()
        self.due_s = 0.0
        self._kept: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self.calls = 0
        self.on_sent: list[Callable[[Call], None]] = []
        self.on_served: list[Callable[[Call, Any], None]] = []
        self.on_answered: list[Callable[[Call], None]] = []
        self.counts: dict[str, int] = defaultdict(int)
        self.encode = encode
        self._scheduler = scheduler
        self._random: Random = scheduler.random("network")
        self._listeners: dict[str, Listener] = {}

    def listen(self, address: str, loop: ProcessLoop, *, shard: ShardHost | None, pool: PoolApi) -> None:
        """A process answers at an address, in place of whoever did."""
        self._listeners[address] = Listener(loop, Routes(shard=shard, pool=pool).by_path)  # type: ignore[attr-defined]

    def channels(self, loop: ProcessLoop) -> "Callable[..., SimulatedChannel]":
        """What makes connections, for one process."""

        def make(address: str, *, shard: int | None = None) -> SimulatedChannel:
            return SimulatedChannel(self, loop, address, shard)

        return make

    def died(self, loop: ProcessLoop) -> None:
        """Tell those who wait for a process, or serve it, that it is gone, as its machine would."""
        for address, listener in list(self._listeners.items()):
            if listener.loop is loop:
                del self._listeners[address]
                for waiting in list(listener.clients.values()):
                    self._send(loop.name, waiting.loop.name, waiting, waiting.broken, "its process died")
            else:
                for number, waiting in list(listener.clients.items()):
                    if waiting.loop is loop:
                        self._send(loop.name, listener.loop.name, waiting, self._cancel, listener, number)

    # What links do

    def _send(self, source: str, dest: str, waiting: "_Waiting", deliver: Callable[..., None], *args: Any) -> None:
        """Deliver later. A message that is lost breaks its connection; one that is cut off is sent again a while."""
        weather, random = self.weather, self._random
        self.counts["messages"] += 1
        if weather.loss and random.random() < weather.loss:
            self.counts["lost"] += 1
            self._later(random.random() * LONGEST_BREAK_S, waiting.broken, "connection reset")
        else:
            self._deliver(self._delay_s(), source, dest, waiting, deliver, args)

    def _delay_s(self) -> float:
        weather, random = self.weather, self._random
        if weather.slow and random.random() < weather.slow:
            self.counts["slow"] += 1
            return random.random() * weather.slowest_s
        return weather.shortest_s + random.random() * (weather.longest_s - weather.shortest_s)

    def _deliver(
        self,
        delay_s: float,
        source: str,
        dest: str,
        waiting: "_Waiting",
        deliver: Callable[..., None],
        args: tuple[Any, ...],
        silent_s: float = 0.0,
    ) -> None:
        def arrive() -> None:
            if (source, dest) not in self.cut:
                deliver(*args)
            elif silent_s < KEEPALIVE_S:  # as TCP does, with longer and longer pauses
                self.counts["cut"] += 1
                pause_s = min(KEEPALIVE_S - silent_s, max(0.2, silent_s))
                self._deliver(pause_s, source, dest, waiting, deliver, args, silent_s + pause_s)
            else:
                waiting.broken("keepalive watchdog timeout")

        due_s = self._scheduler.now_s + delay_s
        if due_s > self.due_s:
            self.due_s = due_s
        self._later(delay_s, arrive)

    def _later(self, after_s: float, do: Callable[..., None], *args: Any) -> None:
        self._scheduler.world.call_later(after_s, do, *args, context=contextvars.Context())

    def request(self, waiting: "_Waiting", address: str) -> None:
        """Send a request to whoever listens."""
        client = waiting.loop.name
        for observer in self.on_sent:
            observer(waiting.call)
        late_s, again_s = self.late.pop(waiting.call.number, None), self.again.pop(waiting.call.number, None)
        if late_s is None:
            self._send(client, _machine(address), waiting, self._arrived, waiting, address)
        else:
            self._deliver(late_s, client, _machine(address), waiting, self._arrived, (waiting, address))
        if waiting.call.method is methods.COMMIT and not waiting.call.request.decided:
            for send in self._kept.pop(client, ()):
                send()
        if again_s is None and self.weather.repeat and self._random.random() < self.weather.repeat:
            again_s = self._random.random() * self.weather.longest_repeat_s
        if again_s is not None:
            self._send_again(again_s, waiting, address)
        if waiting.call.number in self.with_commit:
            self.with_commit.discard(waiting.call.number)
            self._kept[client].append(lambda: self._send_again(self._delay_s(), waiting, address))

    def _send_again(self, after_s: float, waiting: "_Waiting", address: str) -> None:
        """As a try that its client gave up and made again: the first arrives all the same."""
        self.counts["repeated"] += 1
        copy = _Waiting(self, waiting.loop, waiting.call, waiting.frame, waiting.timeout_s, lost=True)
        self._deliver(after_s, waiting.loop.name, _machine(address), copy, self._arrived, (copy, address))

    def _arrived(self, waiting: "_Waiting", address: str) -> None:
        listener = self._listeners.get(address)
        if listener is None:
            self._send(_machine(address), waiting.loop.name, waiting, waiting.refused)
            return
        number = self._scheduler.number()
        listener.clients[number] = waiting
        waiting.at.append((listener, number))
        listener.loop.call_soon(self._serve, listener, number, waiting, context=contextvars.Context())

    def _serve(self, listener: Listener, number: int, waiting: "_Waiting") -> None:
        task = listener.loop.create_task(self._answer(listener, waiting))
        listener.tasks[number] = [task]
        if waiting.timeout_s is not None:
            timer = listener.loop.call_later(max(0.0, waiting.timeout_s), task.cancel)
            task.add_done_callback(lambda _: timer.cancel())
        task.add_done_callback(lambda done: self._answered(listener, number, waiting, done))

    async def _answer(self, listener: Listener, waiting: "_Waiting") -> Any:
        call, method = waiting.call, waiting.call.method
        request = method.request.decode(waiting.frame) if waiting.frame is not None else call.request
        deadline_s = None if waiting.timeout_s is None else listener.loop.time() + waiting.timeout_s
        route = listener.routes.get(method.path)
        if route is None:
            raise Internal(f"nobody serves {method.path}")
        with calling(Caller(waiting.loop.name, deadline_s)):
            if method.streams:
                count = 0
                async for report in route(request):
                    self._send(listener.loop.name, waiting.loop.name, waiting, waiting.reported, count, report)
                    count += 1
                return count
            reply = await route(request)
        for observer in self.on_served:
            observer(call, reply)
        return method.decode_reply(method.reply.encode(reply)) if self.encode else reply

    def _answered(self, listener: Listener, number: int, waiting: "_Waiting", done: "asyncio.Task[Any]") -> None:
        listener.tasks.pop(number, None)
        listener.clients.pop(number, None)
        if done.cancelled():
            return
        error = done.exception()
        answer = waiting.failed if error is not None else waiting.replied
        value = done.result() if error is None else error
        late_s = self.answered_late.pop(waiting.call.number, None)
        if late_s is None:
            self._send(listener.loop.name, waiting.loop.name, waiting, answer, value)
        else:
            self._deliver(late_s, listener.loop.name, waiting.loop.name, waiting, answer, (value,))

    def cancel(self, waiting: "_Waiting") -> None:
        """A client went away: its server is told."""
        for listener, number in waiting.at:
            self._send(waiting.loop.name, listener.loop.name, waiting, self._cancel, listener, number)

    def _cancel(self, listener: Listener, number: int) -> None:
        for task in listener.tasks.get(number, []):
            listener.loop.call_soon(task.cancel, context=contextvars.Context())


_END = object()


def _machine(address: str) -> str:
    return address.rpartition(":")[0]


class _Waiting:
    """The client's half of one call; what arrives for it goes to its process's loop."""

    def __init__(
        self,
        network: Network,
        loop: ProcessLoop,
        call: Call,
        frame: bytes | None,
        timeout_s: float | None,
        *,
        lost: bool = False,
        shard: int | None = None,
        address: str = "",
    ) -> None:
        self.loop = loop
        self.call = call
        self.frame = frame
        self.timeout_s = timeout_s
        self.at: list[tuple[Listener, int]] = []
        self._network = network
        self._lost = lost
        self._shard = shard
        self._address = address
        self._reports: dict[int, Any] = {}
        self._next_report = 0
        self._arrived: deque[tuple[str, Any]] = deque()
        self.inbox: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def replied(self, reply: Any) -> None:
        if self.call.method.streams:
            self.reported(reply, _END)  # after all that was sent before
        else:
            self._put("reply", reply)

    def reported(self, number: int, report: Any) -> None:
        """A part of a stream, which comes in order."""
        self._reports[number] = report
        while self._next_report in self._reports:
            report = self._reports.pop(self._next_report)
            self._next_report += 1
            self._put("reply" if report is _END else "report", report)

    def failed(self, error: BaseException) -> None:
        self._put("error", self._crossed(error))

    def refused(self) -> None:
        error = self._unavailable("connection refused: nobody listens at that port")
        error.refused = True  # type: ignore[attr-defined]
        self._put("error", error)

    def broken(self, why: str) -> None:
        self._put("error", self._unavailable(why))

    def _put(self, kind: str, value: Any) -> None:
        if not self._lost:
            self._arrived.append((kind, value))
            self.loop.call_soon(self._take_in, context=contextvars.Context())

    def _take_in(self) -> None:
        """The next that arrived: what is ready on a loop runs in no order, and a stream has one."""
        self.inbox.put_nowait(self._arrived.popleft())

    def _unavailable(self, why: str) -> MempoolError:
        kind = PoolUnreachable if self._shard is None else ShardUnavailable
        return kind(f"{self._address} does not answer ({why})", shard=self._shard, address=self._address)

    def _crossed(self, error: BaseException) -> MempoolError:
        """The error as it is after it went over the wire."""
        if isinstance(error, MempoolError):
            shard = self._shard if error.shard is None else error.shard
            crossed = type(error)(error.message, shard=shard, address=error.address or self._address)
            if isinstance(error, Overloaded) and isinstance(crossed, Overloaded):
                crossed.retry_after_s = error.retry_after_s
            return crossed
        if isinstance(error, TimeoutError):
            return DeadlineExceeded("the call's time is over on the server; repeating it is safe")
        return Internal(f"a bug in mempool, please report it: {type(error).__name__}: {error}")


class SimulatedChannel:
    """A connection of one process to an address; a ``Channel``."""

    def __init__(self, network: Network, loop: ProcessLoop, address: str, shard: int | None) -> None:
        self.address = address
        self._network = network
        self._loop = loop
        self._shard = shard
        self._waiting: dict[int, _Waiting] = {}
        self._closed = False

    async def call(
        self,
        method: Method[Any, Any],
        request: Any,
        *,
        timeout_s: float | None = None,
        narrow_ids: bool = False,  # noqa: ARG002
    ) -> Any:
        waiting = self._begin(method, request, timeout_s)
        call = waiting.call
        try:
            _, value = await self._next(waiting, timeout_s)
        except MempoolError as error:
            call.error = error
            raise
        else:
            call.reply, call.done = value, True
            return value
        finally:
            self._end(waiting)

    async def stream(
        self, method: Method[Any, Any], request: Any, *, timeout_s: float | None = None
    ) -> AsyncIterator[Any]:
        waiting = self._begin(method, request, timeout_s)
        try:
            while True:
                kind, value = await self._next(waiting, timeout_s)
                if kind == "reply":
                    waiting.call.done = True
                    return
                yield value
        finally:
            self._end(waiting)

    async def close(self) -> None:
        self._closed = True
        for waiting in self._waiting.values():
            waiting.broken("the connection was closed on this side")

    def _begin(self, method: Method[Any, Any], request: Any, timeout_s: float | None) -> _Waiting:
        network = self._network
        if self._closed:
            raise ShardUnavailable(f"{self.address}: the connection was closed on this side", shard=self._shard)
        if timeout_s is not None and timeout_s <= 0.0:
            raise DeadlineExceeded("the call's time is over; nothing was sent", shard=self._shard)
        network.calls += 1
        now_s = network._scheduler.now_s
        call = Call(network.calls, self._loop, self._loop.name, _machine(self.address), method, request, now_s)
        frame = bytes(method.request.encode(request)) if network.encode else None
        waiting = _Waiting(network, self._loop, call, frame, timeout_s, shard=self._shard, address=self.address)
        self._waiting[call.number] = waiting
        network.request(waiting, self.address)
        return waiting

    async def _next(self, waiting: _Waiting, timeout_s: float | None) -> tuple[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                kind, value = await waiting.inbox.get()
            if kind == "error":
                raise value
            return kind, value
        except TimeoutError as error:
            if isinstance(error, MempoolError):
                raise
            raise DeadlineExceeded(
                f"{self.address} did not answer in time; whether the call took effect is not known",
                shard=self._shard,
                address=self.address,
            ) from None

    def _end(self, waiting: _Waiting) -> None:
        call, network = waiting.call, self._network
        self._waiting.pop(call.number, None)
        if not call.done and call.error is None:
            network.cancel(waiting)
        call.answered_s = network._scheduler.now_s
        for observer in network.on_answered:
            observer(call)
