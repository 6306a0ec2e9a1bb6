"""How many bytes of what callers send, and are answered, may be in this process at a time.

A message's size is known only when it is here, so whoever may send one has room for the largest set aside until then.
Answers that a connection does not take hold up that connection alone, not those that come.
Leaves reading and answering to ``calls``.
"""

import asyncio
from collections import deque
from heapq import heapify, heappop, heappush

from mempool.errors import Overloaded, ShardUnavailable

_MAX_WAITING = 4096
"""Calls that wait for room; they cost some kilobytes each."""
_RETRY_AFTER_S = 1.0
_LEAST_CHARGE = 16 * 1024
"""What a call is charged at least, in bytes: small ones cost their handling."""
_MAX_ACCOUNTS = 4096
MODEST_BYTES = 2**20
"""A connection is modest whose last message and answer had no more."""


class Passage:
    """One call that was let in. ``leave`` must follow, whatever becomes of it."""

    __slots__ = ("_admission", "_answer_bytes", "_connection", "_host", "_num_bytes", "aside")

    def __init__(self, admission: "Admission", host: str, connection: str, num_bytes: int, *, aside: bool) -> None:
        self._admission = admission
        self._host = host
        self._connection = connection
        self._num_bytes = num_bytes
        self._answer_bytes = 0
        self.aside = aside  # it has the place that is kept for modest connections

    def resize(self, num_bytes: int) -> None:
        """The call's message is here, and has so many bytes."""
        self._admission.passed(self._host, self._connection, num_bytes)
        if self.aside and self._admission.is_modest(num_bytes):
            self.aside = False
            self._admission.free_place()
        self._holds(num_bytes)

    def answer(self, num_bytes: int) -> None:
        """The call's answer is here, of so many bytes, until it is taken; its message is not any more."""
        self._holds(0)
        self._answer_bytes = num_bytes
        self._admission.passed(self._host, self._connection, num_bytes)
        self._admission.answer(self._connection, num_bytes)

    def leave(self, _: object = None) -> None:
        """Give its room back."""
        if self._answer_bytes:
            self._admission.answer(self._connection, -self._answer_bytes)
        if self.aside:
            self._admission.free_place()
        self._admission.leave(self._host, self._num_bytes)

    def _holds(self, num_bytes: int) -> None:
        more = num_bytes + self._admission.call_bytes - self._num_bytes
        self._num_bytes += more
        self._admission.take(self._host, more)


class _Turns:
    """Calls of one host that wait. The connection goes first whose calls brought and took the fewest bytes meanwhile
    (start-time fair queueing): beside others' large messages, small ones wait for those under way alone.
    """

    __slots__ = ("_ends", "_heap", "_now", "_number", "num_waiting")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str, asyncio.Future[Passage]]] = []
        self._ends: dict[str, int] = {}  # up to where a connection is served, where that is beyond now
        self._now = 0
        self._number = 0
        self.num_waiting = 0

    def add(self, connection: str, turn: "asyncio.Future[Passage]") -> None:
        starts = max(self._ends.get(connection, 0), self._now)
        self._ends[connection] = starts + _LEAST_CHARGE
        self._number += 1
        self.num_waiting += 1
        heappush(self._heap, (starts, self._number, connection, turn))
        if len(self._ends) > _MAX_ACCOUNTS:
            beyond = {name: ends for name, ends in self._ends.items() if ends > self._now}
            self._ends = beyond if len(beyond) <= _MAX_ACCOUNTS // 2 else {}

    def charge(self, connection: str, num_bytes: int) -> None:
        """What a call was found to weigh, above what it was charged when it came."""
        self._ends[connection] = max(self._ends.get(connection, 0), self._now) + max(0, num_bytes - _LEAST_CHARGE)

    @property
    def are_open(self) -> bool:
        """Whether any is to be let in still: who was cancelled is counted out a moment later, by its own task."""
        while self._heap and self._heap[0][3].done():
            heappop(self._heap)
        return bool(self._heap)

    def pop(self) -> tuple[str, "asyncio.Future[Passage]"]:
        """The next to be let in, where they are open."""
        starts, _, connection, turn = heappop(self._heap)
        self._now = max(self._now, starts)
        return connection, turn

    def forget_done(self) -> None:
        """One that waited does so no more: its turn is done already."""
        self.num_waiting -= 1
        if len(self._heap) > 2 * self.num_waiting + 64:
            self._heap = [entry for entry in self._heap if not entry[3].done()]
            heapify(self._heap)


class Admission:
    """Lets calls in while there is room; those that wait are let in by turns of their hosts, the one with the fewest
    bytes in first, and of a host by turns of its connections, the least served first. One place is kept for modest
    connections: they do not wait until large messages and answers of others are gone.

    Args:
        budget_bytes: Bytes of messages of all calls together; at least one call is always let in, and one large message
            at a time of whoever was modest until then. Of answers that one connection has not taken, as many; whoever
            makes answers bounds them for all.
        message_bytes: Bytes of the largest message.
        call_bytes: What a call costs besides its message, as long as it lasts.
    """

    def __init__(self, *, budget_bytes: int, message_bytes: int, call_bytes: int = 0) -> None:
        self.budget_bytes = max(budget_bytes, message_bytes)
        self.message_bytes = message_bytes
        self.call_bytes = call_bytes
        self.used_bytes = 0
        self.passed_bytes = 0
        self._active = 0
        self._used_by: dict[str, int] = {}
        self._answers_of: dict[str, int] = {}
        self._waiting: dict[str, _Turns] = {}
        self._num_waiting = 0
        self._modest_bytes = min(MODEST_BYTES, message_bytes // 16)
        self._modest: dict[str, None] = {}
        self._place_taken = False
        self._waiting_modest: deque[tuple[str, str, asyncio.Future[Passage]]] = deque()
        self._emptied: asyncio.Event | None = None

    @property
    def active(self) -> int:
        """Calls that are in, or wait."""
        return self._active + self._num_waiting

    async def enter(self, host: str, connection: str = "") -> Passage:
        """Wait for room for a message.

        Args:
            host: Who asks, without its port: connections of one host take turns as one.
            connection: Who asks, with its port.

        Raises:
            ShardUnavailable: Too many wait already.
            Overloaded: The connection has not taken the answers to its earlier calls.
        """
        untaken = self._answers_of.get(connection, 0)
        if untaken >= self.budget_bytes:
            raise Overloaded(
                f"{untaken:,} bytes of answers to this connection were not taken yet, of {self.budget_bytes:,} that "
                "may wait for it; take them before you ask more",
                retry_after_s=_RETRY_AFTER_S,
            )
        if host not in self._waiting and self._has_room(host):
            return self._let_in(host, connection)
        modest = connection in self._modest
        if modest and not self._place_taken:
            return self._let_in_aside(host, connection)
        if self._num_waiting >= _MAX_WAITING:
            raise ShardUnavailable(f"{self._num_waiting:,} calls wait here already; try again in a moment")
        turn: asyncio.Future[Passage] = asyncio.get_running_loop().create_future()
        turns = self._waiting.get(host)
        if turns is None:
            turns = self._waiting[host] = _Turns()
        turns.add(connection, turn)
        self._num_waiting += 1
        if modest:
            self._waiting_modest.append((host, connection, turn))
            if len(self._waiting_modest) > 2 * self._num_waiting + 64:  # most were let in by their turns
                self._waiting_modest = deque(entry for entry in self._waiting_modest if not entry[2].done())
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waits_no_more(host, turns)
                self._look()
            else:
                turn.result().leave()
            raise

    async def empty(self, timeout_s: float) -> None:
        """Wait until no call is in, or the time is over."""
        if not self.active:
            return
        self._emptied = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await self._emptied.wait()
        except TimeoutError:
            return

    def passed(self, host: str, connection: str, num_bytes: int) -> None:
        """For ``Passage``: a message or an answer of so many bytes."""
        self.passed_bytes += num_bytes
        if num_bytes > self._modest_bytes:
            self._modest.pop(connection, None)
        elif connection and connection not in self._modest:
            if len(self._modest) >= _MAX_ACCOUNTS:
                del self._modest[next(iter(self._modest))]
            self._modest[connection] = None
        turns = self._waiting.get(host)
        if turns is not None and num_bytes > _LEAST_CHARGE:
            turns.charge(connection, num_bytes)

    def is_modest(self, num_bytes: int) -> bool:
        """For ``Passage``: so much is not large."""
        return num_bytes <= self._modest_bytes

    def free_place(self) -> None:
        """For ``Passage``: the place for modest connections is free again."""
        self._place_taken = False
        while self._waiting_modest and not self._place_taken:
            host, connection, turn = self._waiting_modest.popleft()
            if not turn.done():
                turn.set_result(self._let_in_aside(host, connection))
                self._waits_no_more(host, self._waiting[host])

    def take(self, host: str, num_bytes: int) -> None:
        """For ``Passage``: more bytes, or fewer."""
        self.used_bytes += num_bytes
        self._charge(host, num_bytes)
        if num_bytes < 0 and self._num_waiting:
            self._let_in_waiting()

    def answer(self, connection: str, num_bytes: int) -> None:
        """For ``Passage``: so many more bytes wait for a connection to take them, or fewer."""
        _add(self._answers_of, connection, num_bytes)

    def leave(self, host: str, num_bytes: int) -> None:
        """For ``Passage``: its end."""
        self._active -= 1
        self.used_bytes -= num_bytes
        self._charge(host, -num_bytes)
        self._look()

    def _has_room(self, host: str) -> bool:
        if not self._active:
            return True
        # Whatever one host does, there is room for a message of another.
        last = self.budget_bytes - self.message_bytes
        return self.used_bytes <= last and self._used_by.get(host, 0) + self.message_bytes <= max(
            last, self.message_bytes
        )

    def _let_in(self, host: str, connection: str) -> Passage:
        self._active += 1
        self.used_bytes += self.message_bytes
        self._charge(host, self.message_bytes)
        return Passage(self, host, connection, self.message_bytes, aside=False)

    def _let_in_aside(self, host: str, connection: str) -> Passage:
        self._active += 1
        self._place_taken = True
        return Passage(self, host, connection, 0, aside=True)

    def _charge(self, host: str, num_bytes: int) -> None:
        _add(self._used_by, host, num_bytes)

    def _look(self) -> None:
        if self._num_waiting:
            self._let_in_waiting()
        if self._emptied is not None and not self.active:
            self._emptied.set()

    def _let_in_waiting(self) -> None:
        while hosts := [host for host, turns in self._waiting.items() if turns.are_open]:
            host = min(hosts, key=lambda host: self._used_by.get(host, 0))
            if not self._has_room(host):
                return
            turns = self._waiting[host]
            connection, turn = turns.pop()
            turn.set_result(self._let_in(host, connection))
            self._waits_no_more(host, turns)

    def _waits_no_more(self, host: str, turns: _Turns) -> None:
        self._num_waiting -= 1
        turns.forget_done()
        del self._waiting[host]
        if turns.num_waiting:
            self._waiting[host] = turns  # last of the hosts now: among equals the others come first


def _add(counts: dict[str, int], name: str, num_bytes: int) -> None:
    """Count so many more; who is at 0 is forgotten, as names come from outside."""
    total = counts.get(name, 0) + num_bytes
    if total:
        counts[name] = total
    else:
        counts.pop(name, None)
