"""What is pinned in a run, and what answers at a pin may say."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mempool.types import Stamp, StepId


@dataclass(frozen=True, slots=True)
class Pinned:
    """A version that a reader has pinned, and when it began to ask for one."""

    table_id: int
    version: int
    asked_s: float

    def checked(
        self, stamp: Stamp, acknowledged: Callable[[float], int], where: str, *, say: Callable[[str], None]
    ) -> int:
        """Says so where an answer at it is of another version. Returns the least that it may be of: what was
        acknowledged, at a moment, before it was asked for."""
        if stamp.table_version != self.version:
            say(f"{where}: at a pin of version {self.version} answered of version {stamp.table_version}")
        return acknowledged(self.asked_s)


def check_cuts(
    cuts: Sequence[Mapping[int, int]],
    together: Iterable[tuple[tuple[int, StepId], ...]],
    decided: Mapping[tuple[int, int], Any],
    *,
    say: Callable[[str], None],
) -> None:
    """A step of several tables is in what was pinned of them at one moment, versions by table id, or it is not."""
    if not cuts:
        return
    made = {(table_id, step.step_id): version for (table_id, version), step in decided.items()}
    for steps in together:
        for versions in cuts:
            inside = {made[step] <= versions[step[0]] for step in steps if step in made and step[0] in versions}
            if len(inside) > 1:
                say(f"a pin of {dict(versions)} has a part of the step {steps}")
