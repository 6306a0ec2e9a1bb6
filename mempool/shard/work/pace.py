"""How long a piece of a shard's work may be: who asks for little waits for little of what another has asked for.

A trainer that has a shard to itself, or shares it with others that ask for as much, is answered in one go: pieces cost
a little more than the whole. Pure, but for the clock.
"""

from collections.abc import Callable
from functools import lru_cache

from mempool.types.running import Clock

PIECE_BYTES = 64 * 2**20
"""Bytes of rows that are read at once at most, where others wait: some milliseconds."""
WHOLE_BYTES = 192 * 2**20
"""Where nobody else is there so much is read at once."""
LEAST_PIECE_BYTES = 4 * 2**20
"""However slow it is: what asks for little is answered in one go, or many that do so would wait for their pieces."""
PIECE_S = 1e-3
"""What a piece is to take where somebody else asks for little: to begin one costs a tenth of it."""
LITTLE_BYTES = 128 * 2**10
"""Of a request that is little to do."""
BAG_ROWS = 16
"""Rows that are read in the time that the answer of one bag takes: its memory is new, and touched first."""
READS = frozenset({"gather", "score", "read_rows"})
"""What somebody waits for who asks for little. A trainer's steps are small requests, too, of one that asks for much."""
_RECENT_S = 1.0
_SHARE = 0.25
"""Of what was measured last in what is thought of the speed."""
_NOBODY = ("", float("-inf"))


class Pace:
    """What one shard knows of its callers and of its own speed.

    Args:
        clock: Seconds; also what its speed is measured by.
        others_wait: Whether other jobs do, just now.
    """

    def __init__(self, clock: Clock, *, others_wait: Callable[[], bool] = lambda: False) -> None:
        self.clock = clock
        self._others_wait = others_wait
        self._last = self._before = _NOBODY  # who asked for little, and when: the last one, and the last other one
        self._served = ""
        self._s_per_byte = 0.0

    def asks(self, caller: str, cost: int) -> None:
        """Somebody asks, by a request of so many bytes. Of any thread: what two of them note at once may be lost."""
        if cost < LITTLE_BYTES:
            name, last = _process_of(caller), self._last
            if name != last[0]:
                self._before = last
            self._last = name, self.clock()

    def serves(self, caller: str) -> None:
        """From now on the shard works for that one."""
        self._served = _process_of(caller)

    @property
    def is_shared(self) -> bool:
        """Whether another than whom it works for has asked for little a moment ago."""
        return self._is_shared(self._served)

    def is_shared_by(self, caller: str) -> bool:
        """The same of one that it may work for next."""
        return self._is_shared(_process_of(caller))

    def _is_shared(self, process: str) -> bool:
        name, asked_s = self._before if self._last[0] == process else self._last
        return name != process and self.clock() - asked_s < _RECENT_S

    def took(self, num_bytes: int, seconds: float) -> None:
        """So many bytes were read in so many seconds. Little says nothing, as to begin takes time too; but the smallest
        pieces do, which end with a bag: who was slow for a moment would cut so small for ever."""
        if 2 * num_bytes >= LEAST_PIECE_BYTES:
            s_per_byte = seconds / num_bytes
            self._s_per_byte += _SHARE * (s_per_byte - self._s_per_byte) if self._s_per_byte else s_per_byte

    def is_long(self, num_bytes: int, caller: str | None = None) -> bool:
        """Whether reading so much is cut into pieces, for that caller; None: for whom it works."""
        if num_bytes <= 2 * LEAST_PIECE_BYTES and num_bytes <= PIECE_BYTES:
            return False
        if self._is_shared(self._served if caller is None else _process_of(caller)):
            return num_bytes > 2 * self._small_bytes
        return num_bytes > PIECE_BYTES and (num_bytes > WHOLE_BYTES or self._others_wait())

    @property
    def piece_bytes(self) -> int:
        """What a piece reads."""
        return self._small_bytes if self.is_shared else PIECE_BYTES

    @property
    def _small_bytes(self) -> int:
        if not self._s_per_byte:
            return PIECE_BYTES
        return min(PIECE_BYTES, max(LEAST_PIECE_BYTES, int(PIECE_S / self._s_per_byte)))


@lru_cache(maxsize=1024)
def _process_of(caller: str) -> str:
    """A process may have several lines, "unix:PID:NUMBER" or "HOST:CLIENT/NUMBER"; others have a connection."""
    return caller.rpartition(":")[0] if caller.startswith("unix:") else caller.partition("/")[0]
