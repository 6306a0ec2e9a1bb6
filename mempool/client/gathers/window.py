"""How much of one table may be asked for at once by calls that nobody waits for yet."""

import threading
import time
import weakref
from collections import deque
from contextlib import suppress

from mempool.errors import DeadlineExceeded
from mempool.types.running import Latch

_WINDOW_BYTES = 256 * 2**20
_LOOK_S = 1.0
"""Room of somebody who was interrupted is free without a word."""


class Room:
    """Bytes that are kept free. They are as long as somebody holds it: an interrupt loses none."""

    __slots__ = ("__weakref__", "num_bytes")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes


class Window:
    """Bytes of calls that were begun and are not answered. Who begins one more waits until it fits.

    Args:
        window_bytes: So many at once; one call alone may be larger.
    """

    def __init__(self, *, window_bytes: int = _WINDOW_BYTES) -> None:
        self._window_bytes = window_bytes
        self._rooms: weakref.WeakSet[Room] = weakref.WeakSet()
        self._lock = threading.RLock()  # nobody waits while he has it; a signal's handler may come in between
        self._waiting: deque[Latch] = deque()

    @property
    def num_bytes(self) -> int:
        """Asked for now, with room for their answers."""
        with self._lock:
            return sum(room.num_bytes for room in self._rooms)

    def enter(self, num_bytes: int, *, timeout_s: float) -> Room:
        """Waits for room, and takes it; ``leave`` with it.

        Raises:
            DeadlineExceeded: There was none for so long: earlier calls are not answered.
        """
        end_s = time.monotonic() + timeout_s
        while (room := self._taken(num_bytes)) is None:
            left = Latch()
            self._waiting.append(left)
            if (room := self._taken(num_bytes)) is not None:  # of one who has left just before
                break
            if (left_s := end_s - time.monotonic()) <= 0.0:
                raise DeadlineExceeded(
                    f"{self.num_bytes / 2**20:.0f} MiB of look-ups that were started were not answered within"
                    f" {timeout_s:g} s, and one of {num_bytes / 2**20:.0f} MiB more waited for that; nothing was sent"
                )
            left.wait(min(_LOOK_S, left_s))
        return room

    def leave(self, room: Room) -> None:
        """A call has its answer, or has failed. Repeatable."""
        with self._lock:
            self._rooms.discard(room)
        with suppress(IndexError):
            while True:
                self._waiting.popleft().set()

    def _taken(self, num_bytes: int) -> Room | None:
        with self._lock:
            used = self.num_bytes
            if used and used + num_bytes > self._window_bytes:
                return None
            self._rooms.add(room := Room(num_bytes))
            return room
