"""Whose work the IO loop does next, where many calls are in: hosts take turns at decoding and encoding, and the large
messages and answers of one host leave time to the calls of others.

Without it a loop works through whatever came in the order it came, and one host's hundred connections stand before
every other's call, at each of its steps. Leaves bytes to ``admission`` and the work of shards to their engine's queue.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from mempool.errors import ShardUnavailable

T = TypeVar("T")

FEW_CALLS = 4
"""With so many calls in nobody waits long, and nobody lines up."""
LARGE_BYTES = 512 * 2**10
"""Smaller messages and answers wait for their turn alone."""
ON_THE_WAY_BYTES = 4 * 2**20
"""A host to which so much is on its way gets no further large answer: it is read as fast as it is made."""
_STALLED_S = 0.25
"""An answer that is not taken for so long holds up no other any more: its reader may have stopped."""
_REST = 5.0
"""After a large answer its host's next one rests for so many times as long as it took, where hosts without large ones
have calls: gRPC copies and sends a message as a whole, and nobody is served meanwhile."""
_READ_S = 1e-9
"""Per byte of a message: gRPC copies it twice, to memory that is touched for the first time."""
_LONGEST_WAIT_S = 2.0
"""Of a message, until it is read."""
_OTHERS_S = 1.0
"""A host has calls that had one so long ago, and large messages or answers."""
_MAX_HOSTS = 1024
_MAX_RESTING = 4096
"""Calls whose messages rest; they cost some kilobytes each."""

_Waiting = deque[asyncio.Future[None]]


class Turns:
    """One piece of work in each round of the loop: a host's turn, and of a host its connections'."""

    def __init__(self) -> None:
        self._hosts: dict[str, dict[str, _Waiting]] = {}  # in the order of their turns
        self._running = False
        self._seen: dict[str, float] = {}  # when hosts had a call last, the latest at the end
        self._had_large: dict[str, float] = {}  # when hosts had a large message or answer last, likewise
        self._large_messages: dict[str, tuple[float, int]] = {}  # by sender: when it sent the last, and its bytes
        self._reads_from: dict[str, float] = {}  # by host: until then it has had its share of reading
        self._num_resting = 0
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
        _note(self._seen, host, time.perf_counter())

    async def to_read(self, host: str, sender: str) -> float:
        """Wait until the next message may be read. How large it is shows only then; where its sender's last was large a
        moment ago it is taken to be, and its host's messages rest as its large answers do.

        Args:
            host: Who asks, without its port.
            sender: The connection, and what it asks for: messages of one kind are of like sizes.

        Returns:
            What was reserved, in seconds, for ``has_read`` or ``gives_back``.

        Raises:
            ShardUnavailable: Too many rest already.
        """
        now_s = time.perf_counter()
        last_s, num_bytes = self._large_messages.get(sender, (-math.inf, 0))
        if last_s <= now_s - _OTHERS_S - _LONGEST_WAIT_S or not self._others(host):
            return 0.0
        free_s = max(now_s, self._reads_from.get(host, 0.0))
        starts_s = min(free_s, now_s + _LONGEST_WAIT_S)
        if starts_s > now_s and self._num_resting >= _MAX_RESTING:
            raise ShardUnavailable(f"{self._num_resting:,} calls rest here already; try again in a moment")
        reserved_s = max(0.0, starts_s + _reading_s(num_bytes) - free_s)
        _note(self._reads_from, host, free_s + reserved_s)
        if starts_s > now_s:
            self._num_resting += 1
            try:
                await asyncio.sleep(starts_s - now_s)
            except asyncio.CancelledError:
                self.gives_back(host, reserved_s)
                raise
            finally:
                self._num_resting -= 1
        return reserved_s

    def has_read(self, host: str, sender: str, num_bytes: int, *, reserved_s: float = 0.0) -> None:
        """A message of so many bytes is here; reserved_s: what ``to_read`` answered."""
        if num_bytes >= LARGE_BYTES:
            now_s = time.perf_counter()
            _note(self._had_large, host, now_s)
            _note(self._large_messages, sender, (now_s, num_bytes))
        # The next one rests for what this was, not for what it was taken to be.
        self.gives_back(host, max(0.0, reserved_s - _reading_s(num_bytes)))

    def gives_back(self, host: str, reserved_s: float) -> None:
        """So much of what ``to_read`` answered is not needed."""
        if reserved_s and host in self._reads_from:
            self._reads_from[host] -= reserved_s

    async def room(self, host: str, num_bytes: int) -> None:
        """Wait until an answer of so many bytes may be made for a host."""
        if num_bytes < LARGE_BYTES:
            return
        if host not in self._to_send and not self._left_s(host):
            self._starts(host)
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
        _note(self._had_large, host, time.perf_counter())
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
        _note(self._rests_until, host, now_s + _REST * (now_s - since_s))
        self._call_next(host)

    def _starts(self, host: str) -> None:
        """A large answer is to be made: the next rests until it is known how long it took."""
        _note(self._rests_until, host, time.perf_counter() + _STALLED_S)

    def _left_s(self, host: str) -> float:
        """How long a host's next large answer waits still; as long as none is taken: for good."""
        if self._on_the_way.get(host, 0) >= ON_THE_WAY_BYTES:
            return math.inf
        return max(0.0, self._rests_until.get(host, 0.0) - time.perf_counter()) if self._others(host) else 0.0

    def _others(self, host: str) -> bool:
        """Whether another host has calls, and nothing large: hosts that have take turns as all do."""
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
            self._starts(host)
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


def _reading_s(num_bytes: int) -> float:
    """How long a message is read, and its host's next one rests; small ones cost nobody anything."""
    return (1 + _REST) * _READ_S * num_bytes if num_bytes >= LARGE_BYTES else 0.0


def _note(known: dict[str, T], name: str, what: T) -> None:
    """Names come from outside: of too many the one that was noted the longest ago is forgotten."""
    known.pop(name, None)
    known[name] = what
    if len(known) > _MAX_HOSTS:
        del known[next(iter(known))]


def _nothing() -> None:
    pass
