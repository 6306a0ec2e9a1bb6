"""How many bytes of what callers send, and are answered, may be in this process at a time.

A message's size is known only when it is here, so whoever may send one has room for the largest set aside until then.
Answers that a connection does not take hold up that connection alone, not those that come.
Leaves reading and answering to ``calls``.
"""

import asyncio
from collections import deque

from mempool.errors import Overloaded, ShardUnavailable

_MAX_WAITING = 4096
"""Calls that wait for room; they cost some kilobytes each."""
_RETRY_AFTER_S = 1.0


class Passage:
    """One call that was let in. ``leave`` must follow, whatever becomes of it."""

    __slots__ = ("_admission", "_answer_bytes", "_connection", "_host", "_num_bytes")

    def __init__(self, admission: "Admission", host: str, connection: str, num_bytes: int) -> None:
        self._admission = admission
        self._host = host
        self._connection = connection
        self._num_bytes = num_bytes
        self._answer_bytes = 0

    def resize(self, num_bytes: int) -> None:
        """The call's message is here, and has so many bytes."""
        more = num_bytes + self._admission.call_bytes - self._num_bytes
        self._num_bytes += more
        self._admission.passed_bytes += num_bytes
        self._admission.take(self._host, more)

    def answer(self, num_bytes: int) -> None:
        """The call's answer is here, of so many bytes, until it is taken; its message is not any more."""
        self.resize(0)
        self._answer_bytes = num_bytes
        self._admission.passed_bytes += num_bytes
        self._admission.answer(self._connection, num_bytes)

    def leave(self, _: object = None) -> None:
        """Give its room back."""
        if self._answer_bytes:
            self._admission.answer(self._connection, -self._answer_bytes)
        self._admission.leave(self._host, self._num_bytes)


class Admission:
    """Lets calls in while there is room; those that wait are let in by turns of their hosts, the least served first.

    Args:
        budget_bytes: Bytes of messages of all calls together; at least one call is always let in. Of answers that one
            connection has not taken, as many; whoever makes answers bounds them for all.
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
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._num_waiting = 0
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
        passage = Passage(self, host, connection, self.message_bytes)
        if host not in self._waiting and self._has_room(host):
            self._let_in(host)
            return passage
        if self._num_waiting >= _MAX_WAITING:
            raise ShardUnavailable(f"{self._num_waiting:,} calls wait here already; try again in a moment")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(host, deque()).append(turn)
        self._num_waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                passage.leave()
            elif host in self._waiting and turn in self._waiting[host]:
                self._forget(host, turn)
                self._look()
            raise
        return passage

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

    def take(self, host: str, num_bytes: int) -> None:
        """For ``Passage``: more bytes, or fewer."""
        self.used_bytes += num_bytes
        self._charge(host, num_bytes)
        if num_bytes < 0 and self._num_waiting:
            self._let_in_waiting()

    def answer(self, connection: str, num_bytes: int) -> None:
        """For ``Passage``: so many more bytes wait for a connection to take them, or fewer."""
        untaken = self._answers_of.get(connection, 0) + num_bytes
        if untaken:
            self._answers_of[connection] = untaken
        else:
            self._answers_of.pop(connection, None)

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

    def _let_in(self, host: str) -> None:
        self._active += 1
        self.used_bytes += self.message_bytes
        self._charge(host, self.message_bytes)

    def _charge(self, host: str, num_bytes: int) -> None:
        used = self._used_by.get(host, 0) + num_bytes
        if used:
            self._used_by[host] = used
        else:
            self._used_by.pop(host, None)

    def _look(self) -> None:
        if self._num_waiting:
            self._let_in_waiting()
        if self._emptied is not None and not self.active:
            self._emptied.set()

    def _let_in_waiting(self) -> None:
        while self._num_waiting:
            host = min(self._waiting, key=lambda host: self._used_by.get(host, 0))
            if not self._has_room(host):
                return
            turn = self._waiting[host][0]
            self._forget(host, turn)
            if not turn.done():
                self._let_in(host)
                turn.set_result(None)

    def _forget(self, host: str, turn: "asyncio.Future[None]") -> None:
        self._num_waiting -= 1
        turns = self._waiting.pop(host)
        turns.remove(turn)
        if turns:
            self._waiting[host] = turns  # last of the hosts now: among equals the others come first
