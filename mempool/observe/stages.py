"""Time spent in the stages of calls, since the start: how often, how long in all, how spread. Leaves showing it.

Measuring must never fail what is measured, nor hold it up: nothing here raises, and locks are held for a few counts.
"""

import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from types import TracebackType

from mempool.types import StageTime

_NOTED = 1024
"""Passages that are kept as they came; then they are counted, so that whoever measures does nothing else."""
_BUCKETS = 48
"""Bucket b holds 2^(b - 1) to 2^b nanoseconds; the last one all that is longer, from 39 hours on."""


class _Spread:
    """The times of one stage."""

    __slots__ = ("buckets", "count", "max_ns", "total_ns")

    def __init__(self) -> None:
        self.count = self.total_ns = self.max_ns = 0
        self.buckets = [0] * _BUCKETS

    def copy(self) -> "_Spread":
        same = _Spread()
        same.count, same.total_ns, same.max_ns = self.count, self.total_ns, self.max_ns
        same.buckets = self.buckets.copy()
        return same

    def quantile_ns(self, share: float) -> float:
        """The time that ``share`` of all were done in: exact to its bucket, spread evenly within."""
        rank = share * self.count
        for bucket, count in enumerate(self.buckets):
            if count and rank <= count:
                low, high = (2.0 ** (bucket - 1) if bucket else 0.0), 2.0**bucket
                return min(low + (high - low) * rank / count, float(self.max_ns))
            rank -= count
        return float(self.max_ns)


class Stages:
    """Counts, totals and spreads per stage; safe to use from several threads. A process has one, for all its parts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spreads: dict[str, _Spread] = {}
        self._noted: deque[tuple[str, float]] = deque()  # appending needs no lock
        self.note = self._noted.append
        """As ``record``, for one within another that is recorded: it only notes."""

    def record(self, stage: str, seconds: float) -> None:
        """Add one passage through ``stage`` that took ``seconds``."""
        self._noted.append((stage, seconds))
        if len(self._noted) > _NOTED:
            with self._lock:
                self._count()

    def _count(self) -> None:
        """What was noted so far. Under the lock."""
        for _ in range(len(self._noted)):
            stage, seconds = self._noted.popleft()
            nanoseconds = int(seconds * 1e9) if 0.0 < seconds < 1e9 else 0  # neither NaN nor a clock that went back
            spread = self._spreads.get(stage)
            if spread is None:
                spread = self._spreads[stage] = _Spread()
            spread.count += 1
            spread.total_ns += nanoseconds
            spread.buckets[min(nanoseconds.bit_length(), _BUCKETS - 1)] += 1
            if nanoseconds > spread.max_ns:
                spread.max_ns = nanoseconds

    def measure(self, stage: str) -> AbstractContextManager[None]:
        """Time a ``with`` block; a block that raises counts too."""
        return _Measured(self, stage)

    def snapshot(self) -> tuple[StageTime, ...]:
        """All stages so far, by name."""
        with self._lock:
            self._count()
            spreads = [(stage, spread.copy()) for stage, spread in self._spreads.items()]
        return tuple(
            StageTime(
                stage=stage,
                count=spread.count,
                total_s=spread.total_ns / 1e9,
                p50_s=spread.quantile_ns(0.5) / 1e9,
                p99_s=spread.quantile_ns(0.99) / 1e9,
                max_s=spread.max_ns / 1e9,
            )
            for stage, spread in sorted(spreads, key=lambda item: item[0])
        )


class _Measured(AbstractContextManager[None]):
    """A block that is timed; a class, as a generator would take as long as what it measures."""

    __slots__ = ("_stage", "_stages", "_started_s")

    def __init__(self, stages: Stages, stage: str) -> None:
        self._stages = stages
        self._stage = stage

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stages.record(self._stage, time.perf_counter() - self._started_s)
