"""One client that looks up again and again: each contender's time and CPU for one look-up of a shape, interleaved."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mempool.bench import measuring
from mempool.bench.gate import Check, GateError
from mempool.bench.measuring import Times, interleaved
from mempool.bench.processes import cpu
from mempool.bench.serve.contenders import Contender
from mempool.bench.serve.contenders.here import TORCH_BAG
from mempool.bench.serve.shapes import Pairs, Shape, TableSize, drawn_pairs

_CPU_BATCHES = 3
_LEAST_CALLS = 4


@dataclass(frozen=True)
class Cpu:
    """Milliseconds of CPU that one call costs: this process, and those that answer; None where nobody can tell."""

    client_ms: float | None
    server_ms: float | None


@dataclass(frozen=True)
class LookUps:
    """One shape that passed its gate.

    Attributes:
        shape: Which.
        table: Of which table.
        times: By contender.
        cpu: By contender.
        checks: What the gate found.
    """

    shape: Shape
    table: TableSize
    times: Mapping[str, Times]
    cpu: Mapping[str, Cpu]
    checks: Sequence[Check]

    def added_ms(self, contender: str) -> float:
        """What a look-up takes beyond torch's embedding_bag in this process, the median of the rounds' differences."""
        return self.times[contender].beyond(self.times[TORCH_BAG])

    def document(self) -> dict[str, Any]:
        """As it stands in the result file."""
        errors = {check.contender: check.error for check in self.checks}
        return {
            "name": self.shape.name,
            "bags": self.shape.bags,
            "pairs": self.shape.pairs,
            "request_bytes": self.shape.request_bytes,
            "reply_bytes": self.shape.reply_bytes(self.table),
            "rounds": len(self.times[TORCH_BAG].rounds_ms),
            "contenders": {
                name: {
                    **times.figures(),
                    "added_ms": self.added_ms(name),
                    "client_cpu_ms": self.cpu[name].client_ms,
                    "server_cpu_ms": self.cpu[name].server_ms,
                    "gate_error": errors[name],
                }
                for name, times in self.times.items()
            },
        }


def measure(
    shape: Shape,
    table: TableSize,
    contenders: Sequence[Contender],
    *,
    rounds: int,
    budget_s: float,
    batch_s: float,
    seed: int,
    case: str = "",
) -> LookUps:
    """Gate contenders of different names, then time them.

    Args:
        shape: What is looked up.
        table: What they hold.
        contenders: torch's embedding_bag among them.
        rounds: Look-ups of each that are timed.
        budget_s: When it is spent, the rounds end early.
        batch_s: How long the calls last, at least, over which a contender's CPU is counted.
        seed: Of the pairs.
        case: In errors, before the shape.

    Raises:
        GateError: An answer is wrong: nothing was timed.
    """
    sets = drawn_pairs(shape, table, seed)
    checks = gated(case + shape.name, contenders, sets[0])
    ways = [measuring.Contender(one.name, _run(one, sets)) for one in contenders]
    times = interleaved(ways, num_inputs=len(sets), rounds=rounds, budget_s=budget_s)
    pids = {one.name: one.pids for one in contenders}
    spent = cpu_of_calls(ways, pids, times, num_inputs=len(sets), batch_s=batch_s)
    return LookUps(shape, table, times, spent, checks)


def gated(case: str, contenders: Sequence[Contender], pairs: Pairs) -> list[Check]:
    """The checks of all, which are right. Raises GateError."""
    checks = [one.check(pairs) for one in contenders]
    if not all(check.passed for check in checks):
        raise GateError(case, checks)
    return checks


def cpu_of_calls(
    ways: Sequence[measuring.Contender],
    pids: Mapping[str, Sequence[int]],
    times: Mapping[str, Times],
    *,
    num_inputs: int,
    batch_s: float,
) -> dict[str, Cpu]:
    """CPU of one call of each contender: the median of batches, which are interleaved.

    A batch has the whole CPU time of its processes, so also what they do between two calls.

    Args:
        ways: The contenders.
        pids: Of the processes that answer, by contender.
        times: By contender; of more of them, too.
        num_inputs: Sets of inputs there are.
        batch_s: As for ``measure``.
    """
    found: dict[str, list[tuple[float | None, float | None]]] = {one.name: [] for one in ways}
    for _ in range(_CPU_BATCHES):
        for one in ways:
            calls = max(_LEAST_CALLS, math.ceil(batch_s / (times[one.name].median_ms / 1e3)))
            found[one.name].append(_batch(one, pids[one.name], calls, num_inputs))
    return {name: Cpu(*(_median(side) for side in zip(*batches, strict=True))) for name, batches in found.items()}


def _batch(
    one: measuring.Contender, pids: Sequence[int], calls: int, num_inputs: int
) -> tuple[float | None, float | None]:
    own = (os.getpid(),)
    before = cpu.spent_s(own), cpu.spent_s(pids)
    for call in range(calls):
        one.run(call % num_inputs)
    after = cpu.spent_s(own), cpu.spent_s(pids)
    client, server = (
        None if was is None or now is None else (now - was) * 1e3 / calls
        for was, now in zip(before, after, strict=True)
    )
    return client, server


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _run(one: Contender, sets: Sequence[Pairs]) -> Callable[[int], object]:
    return lambda number: one.run(sets[number])
