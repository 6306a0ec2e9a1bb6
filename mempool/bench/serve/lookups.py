"""One client that looks up again and again: each contender's time and CPU for one look-up of a shape, interleaved.

A contender's turn is one look-up that is not counted, behind which its caches are as in a row of calls, and several
that are.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mempool.bench.gate import Check, GateError
from mempool.bench.measuring import Times, in_rounds
from mempool.bench.serve.callers import NUM_SETS, Caller, Cpu
from mempool.bench.serve.contenders.here import TORCH_BAG
from mempool.bench.serve.shapes import Shape, TableSize

#: Look-ups of a turn that are timed.
TURN_CALLS = 5
_CPU_BATCHES = 3
_LEAST_CALLS = 4


@dataclass(frozen=True)
class LookUps:
    """One shape that passed its gate.

    Attributes:
        shape: Which.
        table: Of which table.
        times: By contender, a round each: the median of a turn.
        calls: By contender, all that were timed, whichever their round.
        cpu: By contender.
        checks: What the gate found.
    """

    shape: Shape
    table: TableSize
    times: Mapping[str, Times]
    calls: Mapping[str, Times]
    cpu: Mapping[str, Cpu]
    checks: Sequence[Check]

    def added_ms(self, contender: str) -> float:
        """What a look-up takes beyond torch's embedding_bag in the trainer, the median of the rounds' differences."""
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
            "calls_a_round": TURN_CALLS,
            "contenders": {
                name: {
                    **self.calls[name].figures(),
                    "median_ms": times.median_ms,
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
    callers: Sequence[Caller],
    *,
    rounds: int,
    budget_s: float,
    batch_s: float,
    seed: int,
    case: str = "",
) -> LookUps:
    """Gate the contenders of all callers, then time them.

    Args:
        shape: What is looked up.
        table: What they hold.
        callers: With contenders of different names, torch's embedding_bag among them.
        rounds: In each of which each contender has a turn.
        budget_s: When it is spent, the rounds end early.
        batch_s: How long the calls last, at least, over which a contender's CPU is counted.
        seed: Of the pairs.
        case: In errors, before the shape.

    Raises:
        GateError: An answer is wrong: nothing was timed.
        ChildError: A caller's process has ended, or does not answer.
    """
    checks = [check for caller in callers for check in caller.prepare(shape, seed)]
    if not all(check.passed for check in checks):
        raise GateError(case + shape.name, checks)
    of = {name: caller for caller in callers for name in caller.names}
    draw, last = random.Random(0), 0

    def turn(name: str, _: int) -> list[float]:
        """Milliseconds of each call. No call is on the pairs of the one before it, whoever's that was."""
        nonlocal last
        sets = draw.sample(range(NUM_SETS), 1 + TURN_CALLS)
        if sets[0] == last:
            sets.reverse()
        last = sets[-1]
        return of[name].turn(name, sets)

    turns = in_rounds(list(of), turn, rounds=rounds, budget_s=budget_s)
    times = {name: Times(tuple(map(statistics.median, found))) for name, found in turns.items()}
    calls = {name: Times(tuple(each_ms for found_ms in found for each_ms in found_ms)) for name, found in turns.items()}
    spend = {name: partial(caller.spend, name) for name, caller in of.items()}
    medians_ms = {name: one.median_ms for name, one in times.items()}
    spent = cpu_of_batches(spend, medians_ms, batch_s=batch_s)
    return LookUps(shape, table, times, calls, spent, checks)


def cpu_of_batches(
    spend: Mapping[str, Callable[[int], Cpu]], medians_ms: Mapping[str, float], *, batch_s: float
) -> dict[str, Cpu]:
    """CPU of one call of each contender: the median of batches, which are interleaved.

    A batch has the whole CPU time of its processes, so also what they do between two calls.

    Args:
        spend: By contender, what a call costs over so many of them.
        medians_ms: By contender, of one call; of more of them, too.
        batch_s: As for ``measure``.
    """
    found: dict[str, list[Cpu]] = {name: [] for name in spend}
    for _ in range(_CPU_BATCHES):
        for name, spent in spend.items():
            found[name].append(spent(max(_LEAST_CALLS, math.ceil(batch_s / (medians_ms[name] / 1e3)))))
    return {
        name: Cpu(_median([one.client_ms for one in batches]), _median([one.server_ms for one in batches]))
        for name, batches in found.items()
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
