"""How much the pages of a table are read and written: counted of a sample, so that small look-ups do not feel it.

Of sixteen calls one is looked at, drawn at random, and of it some hundred pairs, evenly spread: each pair is counted
with the same probability, whatever comes in turn. Counts of pages are halved every ten minutes; how much is
done in all is forgotten in one.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_EVERY = 16
"""One in each so many calls is looked at."""
_PAIRS = 256
"""Of one at least so many of its pairs, and less than twice as many; all where it has fewer."""
_HALF_LIFE_S = 600.0
_PAIRS_HALF_LIFE_S = 60.0
_TICK_S = 10.0
"""Counts are made smaller so often."""
_MASK = 2**64 - 1


class Heat:
    """The heat of one table's row pages on one shard.

    Whoever answers a call says so by ``used``; or, where a function call would be felt, does what that does itself. On
    one thread at a time; ``now``, ``seen`` and ``pairs`` are for any.

    Args:
        num_row_pages: Of the table.
        page_shift: A slot's page is its id shifted so.
        seed: Other tables and shards look at other calls.
        clock: Seconds, monotonic.

    Attributes:
        calls: Look-ups and updates so far.
        due: The number of the next one that is looked at.
    """

    __slots__ = ("_aged_s", "_clock", "_heat_P", "_pairs", "_random", "_seen", "_shift", "calls", "due")

    def __init__(
        self, num_row_pages: int, page_shift: int, *, seed: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._heat_P = np.zeros(num_row_pages, dtype=np.float64)
        self._shift = page_shift
        self._random = (seed * 0x9E3779B97F4A7C15 + 1) & _MASK
        self._seen = self._pairs = 0.0
        self._clock = clock
        self._aged_s = clock()
        self.calls = 0
        self.due = 1 + self._draw(_EVERY)

    def used(self, ids: Any) -> None:
        """A call read or wrote pairs of these slots, as of ``sample``."""
        self.calls += 1
        if self.calls >= self.due:
            self.sample(ids)

    def sample(self, ids: Any) -> None:
        """Count some of the pairs of the call that is due.

        Args:
            ids: [L] their slot ids, all of the table: an array of integers, or a tensor of them on whatever device.
        """
        # Not at random intervals: two shards would not look equally often, and seem to have loads that differ.
        self.due = self.calls + _EVERY - (self.calls - 1) % _EVERY + self._draw(_EVERY)
        step = max(1, ids.shape[0] // _PAIRS)
        found = ids[self._draw(step) :: step]
        pages = (found if isinstance(found, np.ndarray) else found.cpu().numpy()) >> self._shift
        now_s = self._clock()
        if now_s - self._aged_s >= _TICK_S:
            left = self._left(now_s)
            self._heat_P *= left
            self._seen *= left
            self._pairs *= self._left(now_s, _PAIRS_HALF_LIFE_S)
            self._aged_s = now_s
        np.add.at(self._heat_P, pages, float(_EVERY * step))
        self._seen += len(pages)
        self._pairs += _EVERY * step * len(pages)

    def now(self) -> npt.NDArray[np.float64]:
        """[row pages]: pairs of each lately, of all calls as far as the sample tells."""
        return self._heat_P * self._left(self._clock())

    def seen(self) -> float:
        """How many pairs that was told by: one that few were seen of is a guess."""
        return self._seen * self._left(self._clock())

    def pairs(self) -> float:
        """How many pairs were read and written within a minute or so, of all calls as far as the sample tells."""
        return self._pairs * self._left(self._clock(), _PAIRS_HALF_LIFE_S)

    def _left(self, now_s: float, half_life_s: float = _HALF_LIFE_S) -> float:
        """What is left of a count. In whole ticks: who looks twice sees the same."""
        ticks = max(0.0, now_s - self._aged_s) // _TICK_S
        return float(0.5 ** (ticks * _TICK_S / half_life_s))

    def _draw(self, below: int) -> int:
        """A number from 0, the next of a row that the seed gives."""
        self._random = (self._random * 6364136223846793005 + 1442695040888963407) & _MASK
        return (self._random >> 33) % below
