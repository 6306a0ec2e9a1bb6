"""How large the rounds of a move are: as large as they can be without holding writers off for long. Pure."""

AIM_S = 0.06
"""How long a round may hold writers off, from the gate's freeze until all have the new view."""
LEAST_PULLS_S = 0.03
"""Of that, what its pulls may take in any case: where all else takes that long, smaller rounds hold off no less, and
more often."""
_FIRST_BYTES = 4 * 2**20
_LEAST_BYTES = 2**20
"""However slow: what a round costs besides its bytes would be most of it."""


class Pace:
    """The size of the next round, from how long the last ones took.

    Args:
        most_bytes: Of any round.
        aim_s: How long a round shall hold writers off.
    """

    def __init__(self, most_bytes: int, *, aim_s: float = AIM_S) -> None:
        self._most = most_bytes
        self._aim_s = aim_s
        self._bytes = min(most_bytes, _FIRST_BYTES)

    @property
    def round_bytes(self) -> int:
        """Bytes that the next round may have."""
        return self._bytes

    def took(self, num_bytes: int, *, held_s: float, pulls_s: float) -> None:
        """A round of so many bytes held writers off for so long, its pulls among that.

        At most twice, and at least a quarter, of what it might have had comes next.
        """
        if num_bytes <= 0:
            return
        left_s = max(self._aim_s - (held_s - pulls_s), LEAST_PULLS_S)
        wished = num_bytes * left_s / max(pulls_s, 1e-6)
        bounded = min(max(wished, self._bytes / 4), self._bytes * 2)
        self._bytes = int(min(self._most, max(bounded, min(self._most, _LEAST_BYTES))))
