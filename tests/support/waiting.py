"""Holds back the answers of faulty shards, and waits for what other threads bring about, with a bound."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.support.faulty import FaultyShard

BOUND_S = 20.0


class HeldBack:
    """A shard's host whose calls of one method wait until they are let go; other methods pass."""

    def __init__(self, shard: FaultyShard, name: str) -> None:
        self._host = shard.host
        self._name = name
        self._let_go = threading.Event()
        self.arrived = 0
        shard.host = self  # type: ignore[assignment]

    def let_go(self) -> None:
        self._let_go.set()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._host, name)
        if name != self._name:
            return call

        async def later(request: Any) -> Any:
            self.arrived += 1
            async with asyncio.timeout(BOUND_S):
                while not self._let_go.is_set():
                    await asyncio.sleep(0.002)
            return await call(request)

        return later


def until(condition: Callable[[], bool]) -> None:
    """Waits for it; fails where it does not come."""
    end_s = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.002)
