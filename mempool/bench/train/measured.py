"""What one piece of training work gave: times of every contender in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mempool.bench.gate import Check, GateError
from mempool.bench.measuring import Contender, Times, interleaved
from mempool.bench.serve.contenders import pools

#: Names of contenders.
LOCAL = "mempool's kernels here"
EMBEDDED, GRPC, NEAR = pools.EMBEDDED, pools.GRPC, pools.NEAR
FBGEMM = "fbgemm"
TORCH = "torch sparse"
#: Behind the name of one whose look-ups are started early.
OVERLAPPED = ", overlapped"

#: Families of work.
GATHER, STEP, LAYER, OVERLAP = "gather", "step", "layer", "overlap"
#: Before that of work in pools of several sizes.
SHARDED = "sharded "


def sharded(layout: str, shards: int) -> str:
    """The name of an embedded pool of several, whose table lies by columns or rows."""
    return f"{EMBEDDED}, {layout}, {shards} shard{'s' if shards > 1 else ''}"


@dataclass(frozen=True)
class Work:
    """Which work.

    Attributes:
        family: "gather": a look-up without a graph. "step": forward, backward, commit of a table. "sharded gather",
            "sharded step": of one on several shards. "layer": a step of a model with a memory layer. "overlap": of one
            whose dense work takes at least as long as the layer's.
        algorithm: The optimizer of the values.
        num_slots: Of the table.
        bags: Of a step.
        pairs: Of a bag.
    """

    family: str
    algorithm: str
    num_slots: int
    bags: int
    pairs: int

    @property
    def name(self) -> str:
        power = self.num_slots.bit_length() - 1
        slots = f"2^{power}" if self.num_slots == 1 << power else f"{self.num_slots}"
        return f"{self.family} {self.algorithm} {self.bags}x{self.pairs} of {slots}"


@dataclass(frozen=True)
class Measured:
    """Work that passed its gate.

    Attributes:
        work: Which.
        times: By contender.
        checks: What the gate found; several of a contender.
        threads: Of this process, in which all but what is over gRPC computes.
    """

    work: Work
    times: Mapping[str, Times]
    checks: Sequence[Check]
    threads: int

    def ratio(self, contender: str, beside: str) -> float | None:
        """How many times longer one takes than another, the median of rounds; None if either did not run."""
        if contender not in self.times or beside not in self.times:
            return None
        return self.times[contender].over(self.times[beside])

    def document(self) -> dict[str, Any]:
        """As it stands in the result file."""
        worst = {name: max(check.error for check in self.checks if check.contender == name) for name in self.times}
        return {
            "name": self.work.name,
            "family": self.work.family,
            "algorithm": self.work.algorithm,
            "num_slots": self.work.num_slots,
            "bags": self.work.bags,
            "pairs": self.work.pairs,
            "threads": self.threads,
            "rounds": len(self.times[LOCAL].rounds_ms),
            "contenders": {
                name: {**times.figures(), "beside_local": self.ratio(name, LOCAL), "gate_error": worst[name]}
                for name, times in self.times.items()
            },
        }


def timed(
    work: Work,
    checks: Sequence[Check],
    runs: Mapping[str, Callable[[int], object]],
    *,
    num_inputs: int,
    rounds: int,
    budget_s: float,
) -> Measured:
    """Time contenders whose checks have passed.

    Raises:
        GateError: They have not.
    """
    if not all(check.passed for check in checks):
        raise GateError(work.name, checks)
    contenders = [Contender(name, run) for name, run in runs.items()]
    times = interleaved(contenders, num_inputs=num_inputs, rounds=rounds, budget_s=budget_s)
    return Measured(work, times, checks, torch.get_num_threads())
