"""Whose work the IO loop does next, where many calls are in: hosts take turns at decoding and encoding, and the large
answers to one host leave time to the calls of others.

Without it a loop works through whatever came in the order it came, and one host's hundred connections stand before
every other's call, at each of its steps. Leaves bytes to ``admission`` and the work of shards to their engine's queue.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

FEW_CALLS = 4
"""With so many calls in nobody waits long, and nobody lines up."""
LARGE_BYTES = 256 * 2**10
"""Smaller answers wait for their turn alone."""
ON_THE_WAY_BYTES = 4 * 2**20
"""A host to which so much is on its way gets no further large answer: it is read as fast as it is made."""
_STALLED_S = 0.25
"""An answer that is not taken for so long holds up no other any more: its reader may have stopped."""
_REST = 5.0
"""After a large answer its host's next one rests for so many times as long as it took, where hosts without large ones
have calls: gRPC copies and sends a message as a whole, and nobody is served meanwhile."""
_OTHERS_S = 1.0
"""A host has calls that had one so long ago, and large answers."""
_MAX_HOSTS = 1024

_Waiting = deque[asyncio.Future[None]]


class Turns:
    """One piece of work in each round of the loop: a host's turn, and of a host its connections'."""

    def __init__(self) -> None:
        self._hosts: dict[str, dict[str, _Waiting]] = {}  # in the order of their turns
        self._running = False
        self._seen: dict[str, float] = {}  # when hosts had a call last, the latest at the end
        self._had_large: dict[str, float] = {}  # when hosts had a large answer last, likewise
        self._rests_until: dict[str, float] = {}  # large answers, by host
        self._alarms: dict[str, asyncio.TimerHandle] = {}
        self._on_the_way: dict[str, int] = {}  # bytes of large answers, by host
        self._to_send: dict[str, _Waiting] = {}

    async def take(self, host: str, connection: str) -> None:
        """Wait for this connection's turn to work on the loop, until the next ``await``.

        Args:
            host: Who asks, without its port.
            connection: Who asks, with its port.
        """
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._hosts.setdefault(host, {}).setdefault(connection, deque()).append(turn)
        if not self._running:
            self._running = True
            loop.call_soon(self._next)
        await turn  # where it is cancelled, its turn is passed over

    def saw(self, host: str) -> None:
        """A client's host has a call."""
        _note(self._seen, host)

    async def room(self, host: str, num_bytes: int) -> None:
        """Wait until an answer of so many bytes may be made for a host."""
        if num_bytes < LARGE_BYTES:
            return
        if host not in self._to_send and not self._left_s(host):
            self._rests_until[host] = time.perf_counter() + _STALLED_S  # until it is known how long it took
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._to_send.setdefault(host, deque()).append(turn)
        self._call_next(host)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._call_next(host)
            raise

    def answers(self, host: str, num_bytes: int, *, since_s: float) -> Callable[[], None]:
        """An answer is on its way.

        Args:
            host: To whom.
            num_bytes: Of the answer.
            since_s: When the loop began to make it, by ``time.perf_counter``.

        Returns:
            To be called when it was taken.
        """
        if num_bytes < LARGE_BYTES:
            return _nothing
        _note(self._had_large, host)
        loop = asyncio.get_running_loop()
        loop.call_soon(self._made, host, since_s)  # in the next round: gRPC has copied it and begun to send
        self._on_the_way[host] = self._on_the_way.get(host, 0) + num_bytes
        counted = True

        def taken() -> None:
            nonlocal counted
            if counted:
                counted = False
                stalled.cancel()
                left = self._on_the_way.pop(host) - num_bytes
                if left:
                    self._on_the_way[host] = left
                self._call_next(host)

        stalled = loop.call_later(_STALLED_S, taken)
        return taken

    def _made(self, host: str, since_s: float) -> None:
        now_s = time.perf_counter()
        self._rests_until[host] = now_s + _REST * (now_s - since_s)
        if len(self._rests_until) > _MAX_HOSTS:
            self._rests_until = {name: until_s for name, until_s in self._rests_until.items() if until_s > now_s}
        self._call_next(host)

    def _left_s(self, host: str) -> float:
        """How long a host's next large answer waits still; as long as none is taken: for good."""
        if self._on_the_way.get(host, 0) >= ON_THE_WAY_BYTES:
            return math.inf
        return max(0.0, self._rests_until.get(host, 0.0) - time.perf_counter()) if self._others(host) else 0.0

    def _others(self, host: str) -> bool:
        """Whether another host has calls, and no large answers: hosts that have take turns as all do."""
        after_s = time.perf_counter() - _OTHERS_S
        for other in reversed(self._seen):
            if self._seen[other] <= after_s:
                return False
            if other != host and self._had_large.get(other, 0.0) <= after_s:
                return True
        return False

    def _call_next(self, host: str) -> None:
        waiting = self._to_send.get(host)
        if waiting is None:
            return
        while waiting and waiting[0].done():
            waiting.popleft()
        if waiting and not (left_s := self._left_s(host)):
            self._rests_until[host] = time.perf_counter() + _STALLED_S
            waiting.popleft().set_result(None)
            left_s = self._left_s(host)
        if (alarm := self._alarms.pop(host, None)) is not None:
            alarm.cancel()
        if not waiting:
            del self._to_send[host]
        elif left_s < math.inf:
            self._alarms[host] = asyncio.get_running_loop().call_later(left_s, self._call_next, host)

    def _next(self) -> None:
        while self._hosts:
            turn = self._pop()
            if not turn.done():
                turn.set_result(None)  # its work is done in the loop's next round, as is the next call of this
                asyncio.get_running_loop().call_soon(self._next)
                return
        self._running = False

    def _pop(self) -> "asyncio.Future[None]":
        host = next(iter(self._hosts))
        connections = self._hosts.pop(host)
        connection = next(iter(connections))
        waiting = connections.pop(connection)
        turn = waiting.popleft()
        if waiting:
            connections[connection] = waiting  # last now, as is the host
        if connections:
            self._hosts[host] = connections
        return turn


def _note(moments: dict[str, float], host: str) -> None:
    moments.pop(host, None)
    moments[host] = time.perf_counter()
    if len(moments) > _MAX_HOSTS:
        del moments[next(iter(moments))]


def _nothing() -> None:
    pass
