"""Shows how a race goes: a bar in a terminal, a line for every tenth of it elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from facts.race import Race
from facts.rescale import LiveRescale


class RaceProgress:
    """Give its `step` and `evaluation` to `Race.run`, inside a `with`."""

    def __init__(self, race: Race, rescale: LiveRescale | None, *, console: Console) -> None:
        self._race = race
        self._rescale = rescale
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[doing]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=race.num_steps, doing="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int) -> None:
        """So many training steps are done."""
        total = self._race.num_steps
        doing = f"{step}/{total} loss: memory {self._race.memory.loss:.1f}, dense {self._race.dense.loss:.1f}"
        if self._rescale is not None:
            doing += f" · {self._rescale}"
        self._bar.update(self._task, completed=step, doing=doing)
        if not self._console.is_terminal and step * 10 // total > (step - 1) * 10 // total:
            self._console.print(f"training: step {doing}")

    def evaluation(self) -> None:
        """Training is over."""
        self._bar.update(self._task, description="asking every fact")
        if not self._console.is_terminal:
            self._console.print("asking every fact")
