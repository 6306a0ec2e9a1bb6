"""Pages of a new table that come from a checkpoint: handed in batch by batch, alive once all are there."""

from mempool.shard.pages.staging import Staging
from mempool.types import Ledger, PageBatch, Placement


class RestoredPages:
    """The filling of a table: each ``next`` takes in what was handed in since, and answers its bytes."""

    def __init__(self, staging: Staging, placement: Placement, ledger: Ledger) -> None:
        self._staging = staging
        self._placement = placement
        self._ledger = ledger
        self._batch: PageBatch | None = None
        self._whole = False

    def take(self, batch: PageBatch | None) -> None:
        """Hand in pages; None: nothing more comes."""
        self._batch, self._whole = batch, batch is None

    def __iter__(self) -> "RestoredPages":
        return self

    def __next__(self) -> int:
        if self._batch is not None:
            batch, self._batch = self._batch, None
            return self._staging.put(batch)
        if not self._whole:
            return 0
        if self._staging.version is not None:
            self._staging.put_ledger(self._ledger)
        self._staging.adopt(self._placement, version=self._ledger.version)
        raise StopIteration
