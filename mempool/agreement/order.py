"""The order of a table's steps at one of its owners: what is decided and not applied yet, and what was lately.

At the table's gate it gives the numbers. Values only: whoever holds it applies what ``next`` says, and says so.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

from mempool.errors import Overloaded, StepConflict
from mempool.types import DecidedStep, StepId

MAX_KEPT = 4096
"""Steps that a gate remembers for owners that missed some."""
MAX_WAITING = 4096
"""Steps that wait for those before them. One client has one step under way."""


class Order:
    """Decided steps by version.

    Args:
        version: The table's version here: steps applied.

    Attributes:
        applied: As ``version``, from now on.
    """

    def __init__(self, version: int) -> None:
        self.applied = version
        self._waiting: dict[int, DecidedStep] = {}
        self._versions: dict[StepId, int] = {}  # of those that wait
        self._kept: OrderedDict[int, DecidedStep] = OrderedDict()

    @property
    def numbered(self) -> int:
        """The highest version that is known to be given."""
        return max(self._waiting, default=self.applied)

    @property
    def any_waiting(self) -> bool:
        """Whether a decided step is not applied yet."""
        return bool(self._waiting)

    @property
    def lacks(self) -> bool:
        """Whether a step waits for one that is not known here."""
        return bool(self._waiting) and self.applied + 1 not in self._waiting

    def number(self, step: DecidedStep) -> DecidedStep:
        """At the gate: give a step its version. A step that has one keeps it.

        Raises:
            Overloaded: Too many wait: the table cannot be written to.
        """
        known = self.find(step.step_id)
        if known is not None:
            return known
        numbered = replace(step, version=self.numbered + 1)
        self.add(numbered)
        return numbered

    def require_room(self, table_id: int, version: int = 0) -> None:
        """Raises Overloaded where a step of that version, or of the next one, cannot wait here."""
        version = version or self.numbered + 1
        if len(self._waiting) >= MAX_WAITING or version > self.applied + MAX_KEPT:
            raise Overloaded(
                f"version {version} of table {table_id} cannot wait: the shard is at version {self.applied}, "
                f"and {len(self._waiting)} steps wait already. Ask again in a moment; nothing was changed.",
                retry_after_s=0.25,
            )

    def add(self, step: DecidedStep) -> None:
        """A step that was given its version. One that is known changes nothing, nor does one that was applied.

        Its sequences are not kept: whoever applies it has prepared it, and with them.

        Raises:
            Overloaded: It comes too early, or too many wait.
            StepConflict: Another step waits with that version.
        """
        if step.version <= self.applied:
            return
        known = self._waiting.get(step.version)
        if known is not None and known.step_id != NOBODY:
            if known.step_id != step.step_id:
                raise StepConflict(
                    f"version {step.version} of table {step.table_id} is of step {known.step_id.step} of rank "
                    f"{known.step_id.rank} of group {known.step_id.group!r}: the table's gate has not given it to step "
                    f"{step.step_id.step} of group {step.step_id.group!r}. Nothing was changed."
                )
            return
        if known is None:
            self.require_room(step.table_id, step.version)
        self._waiting[step.version] = replace(step, sequences=()) if step.sequences else step
        if step.step_id != NOBODY:
            self._versions[step.step_id] = step.version

    def find(self, step_id: StepId) -> DecidedStep | None:
        """The step, where it is decided and not applied yet."""
        if not self._versions:
            return None
        version = self._versions.get(step_id)
        return None if version is None else self._waiting[version]

    def at(self, version: int) -> DecidedStep | None:
        """The step that waits with that version, where it is known which."""
        step = self._waiting.get(version)
        return None if step is None or step.step_id == NOBODY else step

    def may_take(self, version: int) -> bool:
        """Whether a step that is said to make that version can be taken at its trainer's word: it is the next one, or
        the version was given, and it was not known to whom."""
        return version == self.applied + 1 or version in self._waiting

    def waiting(self) -> tuple[DecidedStep, ...]:
        """Those that are decided and not applied yet, ascending."""
        return tuple(step for _, step in sorted(self._waiting.items()))

    def next(self) -> DecidedStep | None:
        """What is to be applied now."""
        return self._waiting.get(self.applied + 1)

    def did(self) -> None:
        """``next`` was applied."""
        self.applied += 1
        step = self._waiting.pop(self.applied)
        self._versions.pop(step.step_id, None)
        self._keep(step)

    def did_at_once(self, step: DecidedStep) -> None:
        """A step of the next version was decided and applied in one, as none waited for its turn. Its sequences are not
        kept."""
        assert step.version == self.applied + 1, "it was made for that version"
        assert step.version not in self._waiting, "the one that waits comes first"
        self.applied = step.version
        self._keep(
            DecidedStep(
                table_id=step.table_id,
                version=step.version,
                step_id=step.step_id,
                lr=step.lr,
                grad_scale=step.grad_scale,
            )
        )

    def moved_to(self, version: int) -> None:
        """The table was brought to a version by other means: its pages came with it."""
        self.applied = version
        self._waiting = {known: step for known, step in self._waiting.items() if known > version}
        self._versions = {step.step_id: known for known, step in self._waiting.items() if step.step_id != NOBODY}
        self._kept.clear()

    def after(self, version: int) -> tuple[DecidedStep, ...]:
        """The steps with higher versions, ascending, as far as they are kept."""
        kept = [step for known, step in self._kept.items() if known > version]
        return (*kept, *(step for step in self.waiting() if step.version > version))

    def learn(
        self,
        version: int,
        steps: tuple[DecidedStep, ...],
        *,
        prepared: Callable[[StepId], bool] = lambda _: True,
    ) -> DecidedStep | None:
        """What the gate says has been decided after ``applied``; it is at ``version``.

        A step is prepared at every owner before it is decided. One that is not (a late message has ended its Prepare)
        is not taken: it would be applied without its updates. Its trainer prepares it again once it is told so, when it
        comes to have it applied; those after it wait. What the gate no longer keeps is of steps in which this shard has
        no part: its own could not have been forgotten, as their clients wait for its answer before they go on.

        Args:
            prepared: Whether a step is prepared here, or has no part here.

        Returns:
            The first that was not taken.
        """
        known = {step.version: step for step in steps}
        refused: DecidedStep | None = None
        for number in range(self.applied + 1, min(version, self.applied + MAX_KEPT) + 1):
            if number in known:
                step = known[number]
                if step.step_id == NOBODY or step.step_id in self._versions or prepared(step.step_id):
                    self.add(step)
                else:
                    refused = refused or step
            elif number not in self._waiting and (not known or number < min(known)):
                table_id = steps[0].table_id if steps else 0
                self.add(DecidedStep(table_id=table_id, version=number, step_id=NOBODY, lr=0.0, grad_scale=1.0))
        return refused

    def remember(self, steps: Iterable[DecidedStep]) -> None:
        """Steps that were applied in an earlier life, ascending."""
        for step in steps:
            self._keep(step)

    def kept(self) -> tuple[DecidedStep, ...]:
        """The newest steps that were applied, ascending."""
        return tuple(self._kept.values())

    def _keep(self, step: DecidedStep) -> None:
        self._kept[step.version] = step
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)


NOBODY = StepId(group="", rank=0, step=0)
"""Whose step it is that this shard knows nothing of."""
