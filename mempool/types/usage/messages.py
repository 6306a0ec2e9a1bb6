"""A shard's part of a table's usage, asked and answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mempool.types.messages import Envelope, Stamp

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRequest:
    """How often are the slots used whose block 0 this shard owns?

    older_than: Those are counted as outdated that no step of the last so many versions of the table has used.
    """

    envelope: Envelope
    older_than: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UsageReply:
    """Sums and a histogram: as ``Tally`` has them."""

    stamp: Stamp
    outdated: int
    most: int
    log_sum: float
    histogram: npt.NDArray[np.int64]
