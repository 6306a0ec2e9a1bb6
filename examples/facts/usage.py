"""Which slots of the memory are used: looked at half way, where dead ones may begin anew, and in the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import mempool

_NOISE = 0.01


@dataclass(frozen=True, slots=True)
class UsageReport:
    """How the table's slots were used.

    Attributes:
        coverage_half_way: share of the slots that were used in the first half; None where this began behind it.
        begun_anew: slots that were dead then, and began anew from used ones.
        revived: of the slots that were dead then, the share that was used in the second half; None as above.
        coverage: share of the slots that were used in the end.
        kl_uniform: of all uses to even ones, in nats.
        zipf: exponent of uses by rank; None where too few counts differ.
    """

    coverage_half_way: float | None
    begun_anew: int
    revived: float | None
    coverage: float
    kl_uniform: float | None
    zipf: float | None


class SlotsInUse:
    """The slots of a table that counts uses.

    Args:
        table: the table.
        reinit_dead: half way, let slots that were never used begin anew, from used ones, with a little noise.
        seed: of what is drawn for that.
    """

    def __init__(self, table: mempool.Table, *, reinit_dead: bool, seed: int) -> None:
        self._table = table
        self._reinit_dead = reinit_dead
        self._seed = seed
        self._coverage: float | None = None
        self._dead = torch.empty(0, dtype=torch.int64)
        self._begun_anew = 0

    def half_way(self) -> None:
        """Between two steps.

        Raises:
            MempoolError: what the pool raises.
        """
        self._coverage = self._table.usage().coverage
        self._dead = torch.nonzero(self._table.usage(range(self._table.num_slots)).uses == 0)[:, 0]
        if self._reinit_dead:
            self._begun_anew = len(self._table.reinit(noise=_NOISE, seed=self._seed).slots)

    def report(self) -> UsageReport:
        """What came of it."""
        usage = self._table.usage()
        revived = None
        if self._coverage is not None and len(self._dead):
            revived = float((self._table.usage(self._dead).uses > 0).double().mean())
        return UsageReport(
            coverage_half_way=self._coverage,
            begun_anew=self._begun_anew,
            revived=revived,
            coverage=usage.coverage,
            kl_uniform=usage.kl_uniform,
            zipf=usage.zipf,
        )
