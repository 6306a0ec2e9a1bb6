"""What was applied to a table's pages here: the rule that a step is applied once. Values only."""

from mempool.errors import StepConflict
from mempool.types import Ledger, StepId

MAX_ENTRIES = 16_384
"""Every client that ever committed leaves an entry, and the ledger goes with every move of pages. An entry is needed
only while its client may repeat its newest commit; so many other clients do not come in between."""


class AppliedLedger:
    """Of very many ranks, those that committed last are remembered."""

    def __init__(self, ledger: Ledger | None) -> None:
        self.version = 0
        self.updates_applied = 0
        self._step_offset = 0
        self._entries: dict[tuple[str, int], int] = {}
        self._take(ledger or Ledger())

    @property
    def step(self) -> int:
        """Steps that the optimizer counts: commits, unless it was told another number."""
        return self.version + self._step_offset

    def count_steps(self, step: int, *, at_version: int) -> None:
        """From now on, ``step`` steps are done at the present version.

        Raises:
            StepConflict: The version is another one.
        """
        if at_version != self.version:
            raise StepConflict(
                f"the step count is to be {step} at table version {at_version}, and the table is at {self.version}: "
                "somebody commits meanwhile. Set it while nobody trains. Nothing was changed."
            )
        self._step_offset = step - at_version

    def has(self, step_id: StepId) -> bool:
        """Whether that step, or a later one of its rank, was applied."""
        applied = self._entries.get((step_id.group, step_id.rank))
        return applied is not None and step_id.step <= applied

    def add(self, step_id: StepId, sequences: tuple[int, ...]) -> None:
        """A step was applied."""
        self.version += 1
        self.updates_applied += len(sequences)
        rank = step_id.group, step_id.rank
        self._entries.pop(rank, None)  # so that the order is that of the newest commits
        self._entries[rank] = step_id.step
        if len(self._entries) > MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]

    def adopt(self, ledger: Ledger | None) -> bool:
        """Take over the ledger that came with pages, where it is ahead: a shard that owned nothing got no commits.

        Returns:
            Whether it was ahead.
        """
        if ledger is None or ledger.version < self.version:
            return False
        if ledger.version == self.version:
            self._step_offset = ledger.step_offset
            return False
        self._take(ledger)
        return True

    def snapshot(self) -> Ledger:
        return Ledger(
            version=self.version,
            updates_applied=self.updates_applied,
            entries=dict(self._entries),
            step_offset=self._step_offset,
        )

    def _take(self, ledger: Ledger) -> None:
        self.version = ledger.version
        self.updates_applied = ledger.updates_applied
        self._step_offset = ledger.step_offset
        self._entries = dict(ledger.entries)
