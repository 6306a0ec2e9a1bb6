"""Small reads beside a long one: while a kernel reads rows for one caller, another is read for on a thread of its own.

Whoever asks for little beside one that asks for much would wait for a piece of that each time. While a kernel reads,
nothing of the shard's state is in between, and it runs without the interpreter: what a gather changes besides (lookups
that are remembered, counts, a round whose lease is over) is no part of the rows that the kernel reads.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Beside:
    """Lets others read while a job does."""

    def __init__(self) -> None:
        self._allowed = False
        self._open = False
        self._reading = threading.Lock()  # held by whoever reads beside

    def turn(self, do: Callable[[], None]) -> None:
        """Do jobs, whose reads may let others in, on a thread that nobody interrupts: one who was cut off while he
        shuts them out would leave the shard open for ever."""
        self._allowed = True
        try:
            do()
        finally:
            self._allowed = False

    def letting_in(self, read: Callable[[], T]) -> T:
        """The job's own: what ``read`` answers, which changes nothing that a gather reads or changes. When this returns
        nobody reads beside it any more."""
        if not self._allowed:
            return read()
        self._open = True
        try:
            return read()
        finally:
            self._open = False  # none comes any more
            with self._reading:
                pass

    def read(self, read: Callable[[], T | None]) -> T | None:
        """Another's, on a thread of its own, while a job reads; None where none does, or somebody else is in."""
        if not self._open or not self._reading.acquire(blocking=False):
            return None
        try:
            return read() if self._open else None
        finally:
            self._reading.release()
