"""Pages of a new table that come from a checkpoint: handed in batch by batch, alive once all are there."""

from mempool.shard.pages.staging import Staging
from mempool.types import Ledger, PageBatch, Placement


class RestoredPages:
    """The filling of a table: each ``next`` takes in what was handed in since, and answers its bytes.

    Attributes:
        batch: What was handed in last; whole: nothing more comes.
    """

    def __init__(self, staging: Staging, placement: Placement, ledger: Ledger) -> None:
        self._staging = staging
        self._placement = placement
        self._ledger = ledger
        self.batch: PageBatch | None = None
        self.whole = False

    def __iter__(self) -> "RestoredPages":
        return self

    def __next__(self) -> int:
        if self.batch is not None:
            batch, self.batch = self.batch, None
            return self._staging.put(batch)
        if not self.whole:
            return 0
        if self._staging.version is not None:
            self._staging.put_ledger(self._ledger)
        self._staging.adopt(self._placement, version=self._ledger.version)
        raise StopIteration
