"""Which Prepares of a rank's newest step count at one shard: later ones do, whatever comes late. Pure.

A trainer that a freeze holds off ends its Prepares elsewhere and sends new ones, of the same step. Copies of the ends,
and of what they have ended, may come when that step is decided: so all of them are numbered, ascending within a step.
"""


class Attempts:
    """The Prepares of one rank's newest step, as far as they are numbered (from 1; 0 is none of them)."""

    __slots__ = ("_ended", "_newest", "_step")

    def __init__(self) -> None:
        self._step = 0
        self._newest = 0
        self._ended = 0

    def prepared(self, step: int, attempt: int) -> None:
        """A Prepare that was not late has prepared the step."""
        self._go_on(step)
        if step == self._step:
            self._newest = max(self._newest, attempt)

    def end(self, step: int, attempt: int) -> bool:
        """The trainer has ended the step's Prepares up to this one. Returns whether what is prepared is ended by it."""
        if attempt:  # else it speaks of what is here, whichever it is
            self._go_on(step)
        if step != self._step:
            return True
        self._ended = max(self._ended, attempt)
        return attempt >= self._newest

    def late(self, step: int, attempt: int) -> str:
        """Why a Prepare counts no more, in words; "": it counts."""
        if not attempt or step > self._step:
            return ""
        if step < self._step:
            return f"step {self._step} has begun since"
        if attempt <= self._ended:
            return f"attempt {self._ended} was ended already"
        return f"attempt {self._newest} came before it" if attempt < self._newest else ""

    def _go_on(self, step: int) -> None:
        if step > self._step:
            self._step, self._newest, self._ended = step, 0, 0
