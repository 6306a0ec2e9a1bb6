"""Which round of a move holds a table frozen, as one shard knows it: its token, its lease, and which ones are over."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from mempool.errors import StalePlacement

MAX_OVER = 256
"""Rounds that are remembered as over; older ones are refused all the same where another holds."""


class RoundsHere:
    """The present round, if there is one.

    Args:
        clock: Seconds, monotonic.

    Attributes:
        token: Of the round that holds the table; None where none does.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.token: str | None = None
        self._ends_s: float | None = None
        self._joined = False
        self._over: OrderedDict[str, None] = OrderedDict()

    def begin(self, token: str, lease_s: float) -> None:
        """The round holds the table, for so long unless it is said again; 0: until it is ended.

        Raises:
            StalePlacement: Another one holds it, or this one is over.
        """
        self.check(token)
        self.token, self._joined = token, False
        self._ends_s = self._clock() + lease_s if lease_s > 0.0 else None

    def join(self, token: str, lease_s: float) -> None:
        """A page comes for a round: where none was begun here, as the shard owns nothing yet, it holds the table too.

        Raises as ``begin`` does.
        """
        self.check(token)
        if self.token is None or self._joined:
            self.begin(token, lease_s)
            self._joined = True

    def check(self, token: str) -> None:
        """Raises StalePlacement for what comes from a round that is over, or while another one holds the table."""
        if token and token in self._over:
            raise StalePlacement(
                f"round {token!r} of a move is over on this shard: its controller was not heard of within the freeze's "
                "lease, or another one has ended it. What comes of it late is refused; nothing was changed"
            )
        if self.token is not None and token != self.token:
            raise StalePlacement(
                f"round {self.token!r} of a move holds the table, and round {token!r} asks: one of the two "
                "controllers is late. Nothing was changed"
            )

    def require(self, token: str) -> None:
        """Raises StalePlacement unless this round holds the table: only then has nothing changed since it began."""
        self.check(token)
        if self.token is None:
            raise StalePlacement(
                f"round {token!r} of a move does not hold the table on this shard, which may have been started anew "
                "since. Nothing was changed"
            )

    def end(self, token: str = "") -> bool:
        """The round is over; "": whichever there is. Returns whether one was ended."""
        if token and token != self.token:
            self._forget(token)
            return False
        held, self.token, self._ends_s = self.token, None, None
        if held:
            self._forget(held)
        return held is not None

    @property
    def lapsed(self) -> bool:
        """Whether the lease of the round that holds the table is over."""
        return self._ends_s is not None and self._clock() >= self._ends_s

    def _forget(self, token: str) -> None:
        self._over[token] = None
        if len(self._over) > MAX_OVER:
            self._over.popitem(last=False)


Fate = Literal["adopt", "thaw", "wait"]


def fate_of_lapsed(token: str, *, epoch: int, gate_epoch: int | None, gate_token: str | None) -> Fate:
    """What becomes of a round whose lease is over at a shard that is not the gate, from what the gate says.

    A round is decided when the gate takes its view, and over when the gate's own freeze ends: nobody else may say.
    Where another round holds the table there, this one has ended before that began.

    Args:
        token: Of the round whose lease is over here.
        epoch: Of the table here.
        gate_epoch: At the gate; None: it did not answer, or does not have the table.
        gate_token: Of the round that holds the table there; None: none does.
    """
    if gate_epoch is None or gate_epoch < epoch:
        return "wait"
    if gate_epoch > epoch:
        return "adopt"
    return "wait" if gate_token == token else "thaw"
