"""Changes the number of shards while training goes on, from another thread, and tells how long training waited."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import mempool
from facts.train import StepTime
from mempool.config import set_shards


@dataclass(frozen=True, slots=True)
class RescaleReport:
    """What a rescale did to training.

    Attributes:
        shards_before: shards when it was asked for.
        shards_after: shards that were asked for.
        seconds: from asking to done, other work on the machine included.
        steps_during: training steps that the memory model finished meanwhile, in full or in part.
        usual_step_s: median step of the memory model outside of it, seconds.
        longest_step_s: the longest step during it, seconds: the wait is at most the difference.
    """

    shards_before: int
    shards_after: int
    seconds: float
    steps_during: int
    usual_step_s: float
    longest_step_s: float


class RescaleFailed(Exception):
    """The pool could not be rescaled; the message says why."""


class LiveRescale:
    """A rescale in a thread of its own; use it with `with`, so that it leaves no command running behind it.

    By a config, it does what an operator would: edits `shards:` in the file and runs `mempool apply -f FILE`. Without
    one it asks the pool directly.

    Attributes:
        shards_before: shards of the pool when this was made.
        shards_after: shards it shall have.
        began_s: when it was asked for (`time.perf_counter`); 0 before.
    """

    def __init__(self, pool: mempool.Pool, *, shards: int, config: Path | None = None) -> None:
        self.shards_before = len(pool.status().shards)
        self.shards_after = shards
        self._pool = pool
        self._config = config
        self._command: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.began_s = self._end_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._command is not None and self._command.poll() is None:
            self._command.terminate()  # the pool finishes by itself what it has begun

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._thread is not None

    def __str__(self) -> str:
        """Where it stands, for a progress bar."""
        if self._thread is None:
            return f"{self.shards_before} shards"
        if self._thread.is_alive():
            return f"rescaling {self.shards_before} -> {self.shards_after}"
        return "rescale failed" if self._error is not None else f"{self.shards_after} shards"

    def start(self) -> None:
        """Begins, and returns at once."""
        self._thread = threading.Thread(target=self._run, name="live-rescale", daemon=True)
        self._thread.start()

    def finish(self, *, steps: Sequence[StepTime]) -> RescaleReport:
        """Waits for the end of the rescale, and reports.

        Args:
            steps: the training steps of the memory model.

        Raises:
            RescaleFailed: if it failed.
        """
        assert self._thread is not None, "start comes first"
        self._thread.join()
        if self._error is not None:
            raise RescaleFailed(
                f"the rescale {self.shards_before} -> {self.shards_after} failed: {self._error}"
            ) from self._error
        during: list[float] = []
        outside: list[float] = []
        for step in steps:
            overlaps = step.start_s < self._end_s and step.end_s > self.began_s
            (during if overlaps else outside).append(step.seconds)
        return RescaleReport(
            shards_before=self.shards_before,
            shards_after=self.shards_after,
            seconds=self._end_s - self.began_s,
            steps_during=len(during),
            usual_step_s=statistics.median(outside) if outside else 0.0,
            longest_step_s=max(during, default=0.0),
        )

    def _run(self) -> None:
        self.began_s = time.perf_counter()
        try:
            if self._config is None:
                self._pool.rescale(self.shards_after)
            else:
                self._apply(self._config)
        except BaseException as error:
            self._error = error
        self._end_s = time.perf_counter()

    def _apply(self, config: Path) -> None:
        set_shards(config, self.shards_after)
        arguments = [sys.executable, "-m", "mempool", "apply", "-f", str(config)]
        self._command = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said, _ = self._command.communicate()
        if self._command.returncode:
            raise RescaleFailed(f"`mempool apply -f {config}` ended with {self._command.returncode}:\n{said.strip()}")
