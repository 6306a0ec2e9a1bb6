"""What counts of use say of a memory: how much of it is used, how evenly, and what is not."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mempool.types.usage.tally import Tally, range_of

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_POINTS = 3
"""Of a fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageBin:
    """Slots that were used ``low`` to ``high`` times: how many, and how often together."""

    low: int
    high: int
    slots: int
    uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How the slots of a memory were used.

    Attributes:
        num_slots: All there are.
        version: Of the table, at which it was counted; where somebody trained meanwhile, the newest of its shards. 0 of
            a layer's own counts.
        uses: Pairs of all slots together.
        used: Slots that were used at least once; coverage: their part of all.
        dead: Slots that never were.
        outdated: Slots that were, and not by any of the last ``older_than`` versions; 0 where that is 0.
        kl_uniform: Kullback-Leibler divergence of how uses are spread to all slots alike, in nats: 0 where all are used
            equally, ln(num_slots) where one slot has all. None where nothing was used.
        zipf: s, where the slot of rank r is used about r ** -s times as often as the first. Fitted by least squares of
            ln(count) on ln(rank), with a point for each bin of about equal counts (eight a doubling), so that the many
            slots of the tail do not outweigh the head. None of fewer than three such counts.
        most: Of the slot that was used most.
        histogram: By doublings: never, once, 2 to 3, 4 to 7, ...; up to the last that has any.
    """

    num_slots: int
    version: int
    uses: int
    used: int
    coverage: float
    dead: int
    outdated: int
    older_than: int
    kl_uniform: float | None
    zipf: float | None
    most: int
    histogram: tuple[UsageBin, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlotUsage:
    """How each of some slots was used.

    Attributes:
        slots, uses: [M] int64: ids, and how often each was.
        last_use: [M] int64: the version of the table that its last use made; 0: it was never used.
    """

    slots: "Tensor"
    uses: "Tensor"
    last_use: "Tensor"


def usage_of(tally: Tally, *, version: int = 0, older_than: int = 0) -> Usage:
    """What the counts of all slots of a memory say."""
    slots, uses = tally.slots, tally.uses
    used = slots - tally.dead
    divergence = tally.log_sum / uses - math.log(uses) + math.log(slots) if uses else None
    return Usage(
        num_slots=slots,
        version=version,
        uses=uses,
        used=used,
        coverage=used / slots if slots else 0.0,
        dead=tally.dead,
        outdated=tally.outdated,
        older_than=older_than,
        kl_uniform=None if divergence is None else max(0.0, divergence),  # of rounding
        zipf=_zipf(tally),
        most=tally.most,
        histogram=_by_doublings(tally),
    )


def _zipf(tally: Tally) -> float | None:
    slots, uses = (column[:0:-1].astype(np.float64) for column in tally.histogram.T)  # the most used first
    last_ranks = np.cumsum(slots)
    there = slots > 0
    if there.sum() < _LEAST_POINTS:
        return None
    last, slots, uses = last_ranks[there], slots[there], uses[there]
    ranks = 0.5 * (np.log(last - slots + 1.0) + np.log(last))
    counts: npt.NDArray[np.float64] = np.log(uses / slots)
    ranks -= ranks.mean()
    return float(-(ranks @ counts) / (ranks @ ranks))


def _by_doublings(tally: Tally) -> tuple[UsageBin, ...]:
    found: dict[tuple[int, int], list[int]] = {(0, 0): [0, 0]}
    last = int(np.flatnonzero(tally.histogram[:, 0]).max(initial=0))
    for number in range(last + 1):
        low = range_of(number)[0]
        first = 1 << (low.bit_length() - 1) if low else 0
        sums = found.setdefault((first, max(0, 2 * first - 1)), [0, 0])
        sums[0] += int(tally.histogram[number, 0])
        sums[1] += int(tally.histogram[number, 1])
    return tuple(UsageBin(low=low, high=high, slots=sums[0], uses=sums[1]) for (low, high), sums in found.items())
