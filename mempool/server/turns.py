"""Whose work the IO loop does next, where many calls are in: decoding and encoding take turns by hosts.

Without it a loop works through whatever came in the order it came, and one host's hundred connections stand before
every other's call, at each of its steps. Leaves bytes to ``admission`` and the work of shards to their engine's queue.
"""

import asyncio
from collections import deque

FEW_CALLS = 4
"""With so many calls in nobody waits long, and nobody lines up."""

_Waiting = deque[asyncio.Future[None]]


class Turns:
    """One piece of work in each round of the loop: a host's turn, and of a host its connections'."""

    def __init__(self) -> None:
        self._hosts: dict[str, dict[str, _Waiting]] = {}  # in the order of their turns
        self._running = False

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
