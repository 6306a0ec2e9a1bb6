"""Whoever prepares, commits or discards has the tables alone, and those that share a step with them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mempool.client.training.session import Session


class Alone:
    """A context within which nobody else decides on these tables, nor on those that share a step with them.

    A class, as each step passes it, and a generator takes longer.
    """

    __slots__ = ("_held", "_sessions")

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self._held: list[asyncio.Lock] = []

    async def __aenter__(self) -> None:
        while True:
            tables = _sharing(self._sessions)
            try:
                for table_id in sorted(tables):  # in one order, so that no two wait for each other
                    lock = tables[table_id].deciding
                    await lock.acquire()
                    self._held.append(lock)
            except BaseException:
                self._release()
                raise
            if _sharing(self._sessions).keys() <= tables.keys():
                return
            self._release()

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        while self._held:
            self._held.pop().release()


def _sharing(sessions: Sequence[Session]) -> dict[int, Session]:
    """These, and all that share a step with them that is not over, by table."""
    found: dict[int, Session] = {}
    left = list(sessions)
    while left:
        session = left.pop()
        if session.table_id not in found:
            found[session.table_id] = session
            for joint in (session.joint, session.applying):
                if joint is not None:
                    left.extend(joint.sessions.values())
    return found
