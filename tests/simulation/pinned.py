"""What is pinned in a run, and what answers at a pin may say."""

from collections.abc import Callable
from dataclasses import dataclass

from mempool.types import Stamp


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
