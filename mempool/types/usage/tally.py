"""Counts of use, summed up: what is added over pieces of a table and over shards, of the same size whatever it counts.

Legend: M slots.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_EXACT_BITS = 4
_PART_BITS = 3
_EXACT = 1 << _EXACT_BITS
_PARTS = 1 << _PART_BITS

BINS = _EXACT + (63 - _EXACT_BITS) * _PARTS
"""Of a histogram: each count below 16 by itself, then eight for each doubling."""

Counts = npt.NDArray[np.int64]


def bins_of(uses: Counts) -> Counts:
    """The bin of each count, which is at least 0."""
    octaves = np.frexp(np.maximum(uses, 1).astype(np.float64))[1].astype(np.int64) - 1
    octaves -= (np.maximum(uses, 1) >> octaves) == 0  # a count beyond 2^53 may have been rounded up to the next power
    parts = (uses >> np.maximum(octaves - _PART_BITS, 0)) & (_PARTS - 1)
    return np.where(uses < _EXACT, uses, _EXACT + (octaves - _EXACT_BITS) * _PARTS + parts)


def range_of(number: int) -> tuple[int, int]:
    """The lowest and the highest count of a bin."""
    if number < _EXACT:
        return number, number
    octave, part = divmod(number - _EXACT, _PARTS)
    unit = 1 << (octave + _EXACT_BITS - _PART_BITS)
    return unit * (_PARTS + part), unit * (_PARTS + part + 1) - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tally:
    """What is known of the counts of some slots.

    Attributes:
        outdated: Slots that were used, and not lately.
        most: The highest count.
        log_sum: Sum of count * ln(count).
        histogram: [BINS, 2] int64: slots with a count of this bin, and those counts together.
    """

    outdated: int
    most: int
    log_sum: float
    histogram: Counts

    @classmethod
    def none(cls) -> "Tally":
        """Of no slots."""
        return cls(outdated=0, most=0, log_sum=0.0, histogram=np.zeros((BINS, 2), dtype=np.int64))

    @classmethod
    def of(cls, uses: Counts, last_use: Counts | None = None, *, before: int = 0) -> "Tally":
        """Of slots with these counts [M], at least 0.

        Args:
            uses: Counts.
            last_use: [M] the version of the last use; None: nobody asks which are outdated.
            before: Those last used before this version are.
        """
        numbers = bins_of(uses)
        slots = np.bincount(numbers, minlength=BINS)
        sums = np.bincount(numbers, weights=uses, minlength=BINS)  # exact below 2^53, as all numbers here are
        used = uses > 0
        counts = uses[used].astype(np.float64)
        return cls(
            outdated=0 if last_use is None else int((used & (last_use < before)).sum()),
            most=int(uses.max(initial=0)),
            log_sum=float((counts * np.log(counts)).sum()),
            histogram=np.stack((slots, sums), axis=1).astype(np.int64),
        )

    def __add__(self, other: "Tally") -> "Tally":
        """Of the slots of both."""
        return Tally(
            outdated=self.outdated + other.outdated,
            most=max(self.most, other.most),
            log_sum=self.log_sum + other.log_sum,
            histogram=self.histogram + other.histogram,
        )

    @property
    def slots(self) -> int:
        """How many there are."""
        return int(self.histogram[:, 0].sum())

    @property
    def dead(self) -> int:
        """Those that were never used."""
        return int(self.histogram[0, 0])

    @property
    def uses(self) -> int:
        """All counts together."""
        return int(self.histogram[:, 1].sum())
