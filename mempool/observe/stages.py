"""Time spent in the stages of the data path, since the start. Counts only; showing them is the work of others.

Measuring must never fail what is measured: nothing here raises.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mempool.types import StageTime


class Stages:
    """Counts and total seconds per stage; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, tuple[int, float]] = {}

    def record(self, stage: str, seconds: float) -> None:
        """Add one passage through ``stage`` that took ``seconds``."""
        with self._lock:
            count, total_s = self._totals.get(stage, (0, 0.0))
            self._totals[stage] = (count + 1, total_s + seconds)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time a ``with`` block; a block that raises counts too."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.record(stage, time.perf_counter() - started)

    def snapshot(self) -> tuple[StageTime, ...]:
        """All stages so far, by name."""
        with self._lock:
            totals = sorted(self._totals.items())
        return tuple(StageTime(stage=stage, count=count, total_s=total_s) for stage, (count, total_s) in totals)
