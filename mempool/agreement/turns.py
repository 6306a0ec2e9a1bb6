"""Whose turn it is between two rounds of a move, at one shard: what was held off goes before the next freeze. Pure.

Without it a step that a freeze held off meets the next one on its way, and the next. Times are seconds of one clock.
"""

from mempool.types import StepId

TURN_S = 1.0
"""How long the next freeze waits at most for the steps that the last one held off."""
MOST = 1024
"""Ranks that are remembered: more of them than that share the turn of these."""


class Turns:
    """The ranks whose steps a freeze of this table has held off, or set back, and that have not been served since."""

    def __init__(self) -> None:
        self._held_off: dict[tuple[str, int], StepId] = {}
        self._ends_s: float | None = None

    def held_off(self, step_id: StepId) -> None:
        """A freeze held off this step."""
        rank = step_id.group, step_id.rank
        if rank in self._held_off or len(self._held_off) < MOST:
            self._held_off[rank] = step_id

    def set_back(self, step_id: StepId, now_s: float) -> None:
        """The view that the last freeze brought has set this step back: it is on its way here again.

        Where nothing was thawed for longer than a turn it was something else, or it comes late: no freeze waits.
        """
        if self._ends_s is not None and now_s < self._ends_s:
            self.held_off(step_id)

    def thawed(self, now_s: float) -> None:
        """The freeze has ended: whoever was held off has its turn, and whoever turns out to have been set back."""
        self._ends_s = now_s + TURN_S

    def served(self, step_id: StepId) -> None:
        """A step of this rank was applied, or dropped."""
        if not self._held_off:
            return
        self._held_off.pop((step_id.group, step_id.rank), None)

    def ends_s(self, now_s: float) -> float | None:
        """Until when a new freeze waits at most, unless all are served before; None: it does not."""
        if self._ends_s is not None and now_s >= self._ends_s:
            self._held_off.clear()
            self._ends_s = None
        return self._ends_s if self._held_off else None
