"""What one case's run gave: times of every contender and of the machine's ceilings in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mempool.bench.cases import OWN, Case
from mempool.bench.gate import Check
from mempool.bench.measuring import Times


@dataclass(frozen=True)
class Measured:
    """One case that passed its gate.

    Attributes:
        case: Which.
        times: By contender; mempool's first.
        ceiling: Of the copy, or of the square product for cases of keys, in the same rounds.
        ceiling_work: Bytes a copy moves, or operations the product does.
        num_bytes: Unavoidable bytes of the case.
        num_flops: Operations of the case; 0 where memory is the limit.
        checks: What the gate found.
        notes: For readers.
    """

    case: Case
    times: Mapping[str, Times]
    ceiling: Times
    ceiling_work: int
    num_bytes: int
    num_flops: int
    checks: Sequence[Check]
    notes: Sequence[str] = ()

    def ratio(self, peer: str) -> float | None:
        """How many times longer a peer takes than mempool, the median of rounds; None if it did not run."""
        return self.times[peer].over(self.times[OWN]) if peer in self.times else None

    @property
    def ceiling_per_ms(self) -> float:
        """Bytes, or operations, a millisecond."""
        return self.ceiling_work / self.ceiling.median_ms

    def share_of_copy(self, contender: str) -> float | None:
        """Unavoidable bytes a second as a share of the copy's, the median of rounds; None for cases of keys.

        More than 1 where rows that occur several times are found in a cache.
        """
        if self.case.of_keys:
            return None
        return self.num_bytes / self.ceiling_work * self.ceiling.over(self.times[contender])

    def share_of_product(self, contender: str) -> float | None:
        """Operations a second as a share of the square product's, likewise; None where memory is the limit."""
        if not self.case.of_keys:
            return None
        return self.num_flops / self.ceiling_work * self.ceiling.over(self.times[contender])

    def document(self) -> dict[str, Any]:
        """As it stands in the result file."""
        worst = {check.contender: 0.0 for check in self.checks}
        for check in self.checks:
            worst[check.contender] = max(worst[check.contender], check.error)
        return {
            "name": self.case.name,
            "family": self.case.family,
            "what": self.case.what,
            "num_slots": self.case.num_slots,
            "value_dim": self.case.value_dim,
            "bag_size": self.case.bag_size,
            "ids": self.case.ids,
            "headline": self.case.headline,
            "unavoidable_bytes": self.num_bytes,
            "flops": self.num_flops,
            "ceiling": "matmul" if self.case.of_keys else "copy",
            "ceiling_per_s": self.ceiling_per_ms * 1e3,
            "rounds": len(self.ceiling.rounds_ms),
            "contenders": {
                name: {
                    "median_ms": times.median_ms,
                    "min_ms": times.min_ms,
                    "max_ms": times.max_ms,
                    "bytes_per_s": self.num_bytes / times.median_ms * 1e3,
                    "share_of_copy": self.share_of_copy(name),
                    "share_of_matmul": self.share_of_product(name),
                    "gate_error": worst[name],
                }
                for name, times in self.times.items()
            },
            "ratios": {name: self.ratio(name) for name in self.times if name != OWN},
            "notes": list(self.notes),
        }
