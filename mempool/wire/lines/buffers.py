"""Memory that bodies are received into, and written to before they are sent: used again once nobody looks at it.

What is new from the system costs a page fault for each 4 KiB, which takes longer than to copy them. Nothing is zeroed.
"""

import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

LARGEST_BYTES = 4 * 2**20
"""Of what is kept. Larger bodies are rare, and have memory of their own."""
_LEAST_BYTES = 16 * 2**10
"""Of what is kept: less is had from the process's own heap as fast."""
_GRAIN_BYTES = 64 * 2**10

_Memory = npt.NDArray[np.uint8]


class Buffers:
    """Gives memory; of any thread.

    Args:
        most_kept: Pieces that wait to be used again.
    """

    def __init__(self, most_kept: int) -> None:
        self._most_kept = most_kept
        self._free: deque[_Memory] = deque()
        self._lent: dict[int, weakref.ref[_Memory]] = {}

    @property
    def num_lent(self) -> int:
        """Pieces that somebody still looks at, of those that will be used again."""
        return len(self._lent)

    def take(self, num_bytes: int) -> memoryview:
        """So many bytes, with anything in them, that are the taker's until the last view of them is gone."""
        if not _LEAST_BYTES <= num_bytes <= LARGEST_BYTES:
            return np.empty(num_bytes, np.uint8).data
        memory = self._kept(num_bytes)
        if memory is None:
            memory = np.empty(-(-num_bytes // _GRAIN_BYTES) * _GRAIN_BYTES, np.uint8)
        # Views of the view refer to the array that was lent, whatever they are made by.
        given = memory[:num_bytes]
        lent, key = self._lent, id(given)

        def let_go(_: object) -> None:
            lent.pop(key, None)
            if len(self._free) < self._most_kept:
                self._free.append(memory)

        lent[key] = weakref.ref(given, let_go)
        return given.data

    def _kept(self, num_bytes: int) -> _Memory | None:
        """The piece that was used last; None where that is too small, or so large that much of it would lie idle."""
        try:
            memory = self._free.pop()
        except IndexError:
            return None
        return memory if num_bytes <= len(memory) <= 2 * max(num_bytes, _GRAIN_BYTES) else None
