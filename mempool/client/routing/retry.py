"""When a failed call is tried again, and what is said when it is not: a state machine without clock, socket or sleep.

``Tries`` feeds it failures and carries out its actions.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mempool.client.routing.whereabouts import Whereabouts
from mempool.errors import (
    DeadlineExceeded,
    MempoolError,
    NotFound,
    Overloaded,
    PoolUnreachable,
    Replan,
    ShardUnavailable,
)

_REPLAN_PART = 0.1  # of the first wait after an outage: a view reaches shards and controller within milliseconds
_LONGEST_RETRY_AFTER_S = 60.0  # what is longer, or no number, is not from a shard of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between tries: they double from ``first_s`` to ``longest_s``; jitter takes up to half off."""

    first_s: float = 0.05
    longest_s: float = 1.0

    def delay_s(self, number: int, *, jitter: float, first: float = 1.0) -> float:
        """The wait before try ``number`` + 1 of the same kind, from 1. jitter: 0 (whole wait) to 1 (half of it).

        first: Begin with this part of ``first_s``.
        """
        whole = min(self.longest_s, first * self.first_s * 2.0 ** min(number - 1, 60))
        return whole * (1.0 - jitter / 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """Wait, ask for the table's view again, and try again."""

    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Raise ``error``."""

    error: MempoolError


class Retry:
    """The tries of one call.

    Args:
        table: Name of the table, for messages.
        where: The pool, for messages.
        start_s: When the call began, on the caller's clock.
        timeout_s: How long it may take in all.
        jitter: Gives a number from 0 to 1 at each call.
        refused_s: How long to go on where nobody listens at any address; None: as long as for all else.
    """

    def __init__(
        self,
        *,
        table: str,
        where: Whereabouts,
        start_s: float,
        timeout_s: float,
        backoff: Backoff,
        jitter: Callable[[], float],
        refused_s: float | None = None,
    ) -> None:
        self._table = table
        self._where = where
        self._refused_s = timeout_s if refused_s is None else min(refused_s, timeout_s)
        self._start_s = start_s
        self._timeout_s = timeout_s
        self._backoff = backoff
        self._jitter = jitter
        self._tries = 0
        self._replans = 0
        self._outages = 0
        self._last: MempoolError | None = None
        self._try_began_s = start_s

    @property
    def tries(self) -> int:
        """Failed tries so far."""
        return self._tries

    def replanned(self) -> None:
        """A newer view came: what follows is the first try on it."""
        self._replans = 0

    def failed(self, error: MempoolError, *, now_s: float) -> Again | GiveUp:
        """What to do after a try that ended with ``error``."""
        self._tries += 1
        self._last = error
        if not (error.retryable or _not_attached_yet(error)):
            return GiveUp(error=error)
        if isinstance(error, Replan):
            # The new view is there in most cases, so the first replan does not wait. Those without a newer view do:
            # a shard may not have heard yet of what the controller already says, or the other way round, for a moment.
            self._replans += 1
            if self._replans == 1:
                delay_s = 0.0
            else:
                delay_s = self._backoff.delay_s(self._replans - 1, jitter=self._jitter(), first=_REPLAN_PART)
        else:
            self._outages += 1
            delay_s = self._backoff.delay_s(self._outages, jitter=self._jitter())
            if isinstance(error, Overloaded) and 0.0 < error.retry_after_s < _LONGEST_RETRY_AFTER_S:
                # Spread out, as others were told the same.
                delay_s = max(delay_s, error.retry_after_s * (1.0 + self._jitter() / 2.0))
        if now_s + delay_s >= self._start_s + self._patience_s(error):
            return GiveUp(error=self._final(error, now_s=now_s))
        self._try_began_s = now_s + delay_s
        return Again(delay_s=delay_s)

    def out_of_time(self, *, waiting_for: tuple[tuple[int, str], ...], now_s: float) -> MempoolError:
        """The error of a call whose time ended during a try. waiting_for: (shard, address) that had not answered."""
        self._tries += 1
        # A try that was cut off soon says little of those it waited for; the error before it says more.
        cut_off_soon = now_s - self._try_began_s < self._timeout_s / 4
        if waiting_for and not (cut_off_soon and self._last is not None):
            shard, address = waiting_for[0]
            silence = ShardUnavailable(f"no answer{_from(address)}", shard=shard, address=address or None)
            return self._final(silence, now_s=now_s)
        if self._last is not None:
            return self._final(self._last, now_s=now_s)
        return self._final(PoolUnreachable(f"no answer about table {self._table!r}"), now_s=now_s)

    def _patience_s(self, error: MempoolError) -> float:
        return self._refused_s if isinstance(error, PoolUnreachable) and error.refused else self._timeout_s

    def _final(self, error: MempoolError, *, now_s: float) -> MempoolError:
        if _not_attached_yet(error):
            return error
        where = self._where
        spent = f"{now_s - self._start_s:.1f} s"
        last = where.without_advice(error.message)
        tries = f"{self._tries} {'try' if self._tries == 1 else 'tries'}; last: {last}"
        if isinstance(error, Replan):
            return DeadlineExceeded(
                f"table {self._table!r} of {where.pool} could not be reached under one placement within {spent} "
                f"({tries}). {where.moving_advice}",
                shard=error.shard,
                address=error.address,
            )
        if isinstance(error, PoolUnreachable):
            return PoolUnreachable(
                f"{where.silent} within {spent} ({tries}). {where.unreachable_advice}",
                address=error.address,
            )
        if isinstance(error, DeadlineExceeded):
            return DeadlineExceeded(
                f"table {self._table!r} of {where.pool}: not done within {spent} ({tries}). Repeating it is safe.",
                shard=error.shard,
                address=error.address,
            )
        if isinstance(error, Overloaded):
            return Overloaded(
                f"table {self._table!r} of {where.pool}: not done within {spent} ({tries}).",
                shard=error.shard,
                address=error.address,
                retry_after_s=error.retry_after_s,
            )
        who = "a shard" if error.shard is None else f"shard {error.shard}"
        return ShardUnavailable(
            f"table {self._table!r}: {who} of {where.pool} did not answer within {spent} ({tries}). "
            + where.shard_advice(error.shard),
            shard=error.shard,
            address=error.address,
        )


def _not_attached_yet(error: MempoolError) -> bool:
    """A shard does not know the table: it just started, or the table was dropped. The controller knows which."""
    return isinstance(error, NotFound) and error.shard is not None


def _from(address: str) -> str:
    return f" from {address}" if address else ""
