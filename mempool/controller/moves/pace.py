"""How large the rounds of a move are: as large as they can be without holding writers off for long. Pure."""

AIM_S = 0.06
"""How long the pulls of a round, and telling the new view, may hold writers off."""
_FIRST_BYTES = 4 * 2**20
_LEAST_BYTES = 2**20
"""However slow: what a round costs besides its bytes would be most of it."""


class Pace:
    """The size of the next round, from how long the last ones took.

    Args:
        most_bytes: Of any round.
        aim_s: How long a round shall take once the table stands still.
    """

    def __init__(self, most_bytes: int, *, aim_s: float = AIM_S) -> None:
        self._most = most_bytes
        self._aim_s = aim_s
        self._bytes = min(most_bytes, _FIRST_BYTES)

    @property
    def round_bytes(self) -> int:
        """Bytes that the next round may have."""
        return self._bytes

    def took(self, num_bytes: int, seconds: float) -> None:
        """A round of so many bytes took so long. At most twice, and at least a quarter, of it come next."""
        if num_bytes <= 0:
            return
        wished = num_bytes * self._aim_s / max(seconds, 1e-6)
        bounded = min(max(wished, self._bytes / 4), self._bytes * 2)
        self._bytes = int(min(self._most, max(bounded, min(self._most, _LEAST_BYTES))))
