"""What the shard says of its changes, for whoever keeps them: a store, or nobody."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mempool.agreement.ledger import NoStepLog, StepLog
from mempool.shard.durable.records import RecordOf


class Log(Protocol):
    """Told on the engine's thread, in the order of the changes."""

    @property
    def keeps(self) -> bool:
        """Whether anything is kept: else nothing needs to be said."""

    def require(self, num_bytes: int = 0) -> None:
        """Raises StorageFailed or Overloaded where nothing can be kept now, RequestTooLarge where so much never can:
        before anything is changed."""

    def add(self, record: RecordOf) -> None:
        """A change was made. Raises nothing that comes of the disk: who waits for the answer is told."""

    def steps_of(self, table_id: int) -> StepLog:
        """What a table's ledger tells."""

    def caught_up_of(self, table_id: int) -> Callable[[Tensor, bool], None] | None:
        """What a table's storage tells."""

    def unstaged_of(self, table_id: int) -> Callable[[], None]:
        """What a table's staging tells."""


class NoLog:
    """Keeps nothing."""

    keeps = False

    def require(self, num_bytes: int = 0) -> None:
        """See ``Log``."""

    def add(self, record: RecordOf) -> None:
        """See ``Log``."""

    def steps_of(self, table_id: int) -> StepLog:  # noqa: ARG002
        """See ``Log``."""
        return NoStepLog()

    def caught_up_of(self, table_id: int) -> Callable[[Tensor, bool], None] | None:  # noqa: ARG002
        """See ``Log``."""
        return None

    def unstaged_of(self, table_id: int) -> Callable[[], None]:  # noqa: ARG002
        """See ``Log``."""
        return lambda: None


NO_LOG = NoLog()
