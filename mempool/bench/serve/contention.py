"""A trainer and a shard on the same cores: what threads that spin while they wait cost both.

    python -m mempool.bench.serve.contention --rounds 200

[TRAINER] this process: torch with its threads computes, then looks up, as a training step does. [SHARD] one process
each way: with the environment that every shard has (its threads sleep when idle), and with OpenMP's own default. The
rounds of both are interleaved. No figure is printed of a shard whose answers are wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import mempool
from mempool.bench import machine
from mempool.bench.processes.pool import WAITING, pool_process
from mempool.rayhost.actors import kernel_variables

_CALL_TIMEOUT_S = 120.0
_WARM_UP_ROUNDS = 3
_VALUE_DIM = 256
# Of one trainer's step: matrices as a small dense layer has them.
_DENSE = (512, 512)

SHAPES = {"64x32": (64, 32), "1024x128": (1024, 128)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One way and one shape: milliseconds of a gather in the middle of steps, and of a whole step."""

    way: str
    shape: str
    gather_median_ms: float
    gather_p99_ms: float
    step_median_ms: float
    rounds: int


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m mempool.bench.serve.contention", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="steps of each way and shape")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the shard's kernels, and torch's")
    parser.add_argument("--slots", type=int, default=2**18, metavar="N", help=f"slots of {_VALUE_DIM} float32")
    options = parser.parse_args(arguments)
    figures = run(rounds=options.rounds, threads=options.threads, num_slots=options.slots)
    document = {
        "machine": machine.describe(torch.device("cpu")),
        "threads": options.threads,
        "figures": [asdict(line) for line in figures],
    }
    print(json.dumps(document, indent=2))


def run(*, rounds: int, threads: int, num_slots: int) -> list[Figures]:
    """Measure both ways, side by side.

    Raises:
        RuntimeError: A shard does not start, or answers wrongly.
    """
    torch.set_num_threads(threads)
    ways = {"passive (as shards are)": kernel_variables(threads), "OpenMP's default": _plain(threads)}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        tables = {}
        config = mempool.TableConfig(name="facts", num_slots=num_slots, value_dim=_VALUE_DIM)
        for way, variables in ways.items():
            at = stack.enter_context(pool_process(threads=threads, variables=variables)).address
            pool = stack.enter_context(mempool.connect(at, timeout_s=_CALL_TIMEOUT_S))
            tables[way] = pool.create_table(config)
        for name, (bags, pairs) in SHAPES.items():
            steps = {way: _Step(table, bags=bags, pairs=pairs) for way, table in tables.items()}
            for step in steps.values():
                step.check()
            for number in range(rounds + _WARM_UP_ROUNDS):
                for way, step in steps.items():
                    taken = step()
                    if number >= _WARM_UP_ROUNDS:
                        times.setdefault((way, name), []).append(taken)
    return [_figures(way, shape, taken) for (way, shape), taken in times.items()]


class _Step:
    """[TRAINER] one step: dense work, a gather in its middle, dense work."""

    def __init__(self, table: mempool.Table, *, bags: int, pairs: int) -> None:
        random = torch.Generator().manual_seed(bags * pairs)
        self._table = table
        self._ids = torch.randint(table.num_slots, (bags, pairs), generator=random)
        self._weights = torch.rand(bags, pairs, generator=random)
        self._dense = [torch.randn(*_DENSE, generator=random) for _ in range(2)]

    def check(self) -> None:
        """The correctness gate: a few bags against their rows in float64."""
        ids, weights = self._ids[:8], self._weights[:8]
        rows = self._table.rows(ids.flatten()).double().reshape(*ids.shape, -1)
        right = (rows * weights.double().unsqueeze(-1)).sum(1)
        error = float((self._gather()[:8].double() - right).norm() / right.norm())
        if not error < 1e-5:
            raise RuntimeError(f"the shard's sums are {error:.1e} off: nothing was measured")

    def __call__(self) -> tuple[float, float]:
        """Seconds of the gather and of the step."""
        began_s = time.perf_counter()
        self._compute()
        before_s = time.perf_counter()
        self._gather()
        after_s = time.perf_counter()
        self._compute()
        return after_s - before_s, time.perf_counter() - began_s

    def _gather(self) -> Tensor:
        with torch.no_grad():
            return self._table.gather(self._ids, self._weights)

    def _compute(self) -> None:
        left, right = self._dense
        for _ in range(4):
            torch.nn.functional.gelu(left @ right)


def _figures(way: str, shape: str, taken: list[tuple[float, float]]) -> Figures:
    gathers, steps = sorted(gather for gather, _ in taken), [step for _, step in taken]
    return Figures(
        way=way,
        shape=shape,
        gather_median_ms=round(1000 * statistics.median(gathers), 2),
        gather_p99_ms=round(1000 * gathers[min(len(gathers) - 1, int(0.99 * len(gathers)))], 2),
        step_median_ms=round(1000 * statistics.median(steps), 2),
        rounds=len(taken),
    )


def _plain(threads: int) -> dict[str, str]:
    return {name: value for name, value in kernel_variables(threads).items() if name not in WAITING}


if __name__ == "__main__":
    main()
