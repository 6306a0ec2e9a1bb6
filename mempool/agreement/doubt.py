"""What a table on a shard is in doubt of, and whom to ask: pure. Times are seconds of one monotonic clock.

Two doubts: of the order (somebody waits for a version that is not here), of steps (they are prepared here, and may be
decided elsewhere by now: readers and freezes wait, or their trainer has fallen silent). A moment's grace comes first:
what is waited for is usually on its way.
"""

from dataclasses import dataclass

GRACE_S = 0.02
"""How long nobody is asked: the trainer's own message comes within this."""
AGAIN_S = 0.25
"""How long after an answer that did not settle it the question is put again for those who wait still."""


@dataclass(slots=True)
class Doubt:
    """One kind of doubt of one table.

    Attributes:
        since_s: Since when somebody waits; None: nobody does.
        due_s: When to ask for those who came since the question was put last; inf: nobody did.
        asked_s: When that was; -inf: not for anybody who waits.
        settled_s: When the question was put that was answered by "nothing new": who waited before that waits no more.
            Of the order alone; of steps each has its own.
    """

    since_s: float | None = None
    due_s: float = float("inf")
    asked_s: float = float("-inf")
    settled_s: float = float("-inf")

    def wait(self, now_s: float, *, at_once: bool = False) -> None:
        """Somebody waits from now on. at_once: what is waited for is not on its way: there is no grace."""
        if self.since_s is None:
            self.since_s = now_s
        self.due_s = min(self.due_s, now_s if at_once else now_s + GRACE_S)

    def ends(self) -> None:
        """Nobody waits any more."""
        self.since_s, self.due_s, self.asked_s = None, float("inf"), float("-inf")

    def ask_at(self) -> float | None:
        """When to put the question; None: not at all."""
        if self.since_s is None:
            return None
        return min(self.due_s, self.asked_s + AGAIN_S) if self.asked_s > float("-inf") else self.due_s

    def asked(self, now_s: float) -> None:
        """The question is put, for all who wait."""
        self.asked_s, self.due_s = now_s, float("inf")

    def settled(self, asked_s: float) -> None:
        """The question of that time was answered by "nothing new"."""
        self.settled_s = max(self.settled_s, asked_s)

    def covers(self, waits_since_s: float) -> bool:
        """Whether who came then is answered by that."""
        return waits_since_s <= self.settled_s
