"""A trainer and a shard on the same cores: what threads that spin while they wait cost both.

    python -m mempool.bench.serve.contention --rounds 200

[TRAINER] this process: torch with its threads computes, then looks up, as a training step does. [SHARD] one process
each way: with the environment that every shard has (its threads sleep when idle), and with OpenMP's own default. The
rounds of both are interleaved. No figure is printed of a shard whose answers are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import mempool
from mempool.bench import machine
from mempool.rayhost.actors import kernel_variables
from mempool.types import ShardInfo

_MODULE = "mempool.bench.serve.contention"  # also where it is __main__
_START_TIMEOUT_S = 120.0
_CALL_TIMEOUT_S = 120.0
_WARM_UP_ROUNDS = 3
_VALUE_DIM = 256
# Of one trainer's step: matrices as a small dense layer has them.
_DENSE = (512, 512)
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

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
    """Run the benchmark, or be one of its shards."""
    parser = argparse.ArgumentParser(prog="python -m mempool.bench.serve.contention", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="steps of each way and shape")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the shard's kernels, and torch's")
    parser.add_argument("--slots", type=int, default=2**18, metavar="N", help=f"slots of {_VALUE_DIM} float32")
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.shard:
        _serve(options.threads)
        return
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
    with _shards(list(ways.values()), threads=threads) as addresses:
        pools = {way: mempool.connect(at, timeout_s=_CALL_TIMEOUT_S) for way, at in zip(ways, addresses, strict=True)}
        try:
            config = mempool.TableConfig(name="facts", num_slots=num_slots, value_dim=_VALUE_DIM)
            tables = {way: pool.create_table(config) for way, pool in pools.items()}
            for name, (bags, pairs) in SHAPES.items():
                steps = {way: _Step(table, bags=bags, pairs=pairs) for way, table in tables.items()}
                for step in steps.values():
                    step.check()
                for number in range(rounds + _WARM_UP_ROUNDS):
                    for way, step in steps.items():
                        taken = step()
                        if number >= _WARM_UP_ROUNDS:
                            times.setdefault((way, name), []).append(taken)
        finally:
            for pool in pools.values():
                pool.close()
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
    return {name: value for name, value in kernel_variables(threads).items() if name not in _VARIABLES}


@contextmanager
def _shards(environments: list[dict[str, str]], *, threads: int) -> Iterator[list[str]]:
    """Pools of one shard, each a process with its environment; their addresses."""
    inherited = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    command = [sys.executable, "-m", _MODULE, "--shard", "--threads", f"{threads}"]
    processes = [
        subprocess.Popen(command, env=inherited | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for variables in environments
    ]
    try:
        yield [_address(process) for process in processes]
    finally:
        for process in processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
        for process in processes:
            try:
                process.wait(_START_TIMEOUT_S)
            finally:
                process.kill()
                process.wait()
                process.stdout.close()  # type: ignore[union-attr]  # checked above


def _serve(threads: int) -> None:
    """[SHARD] a pool of one shard, until the input ends."""
    from mempool.config import ClusterConfig, PoolConfig, ShardConfig
    from mempool.controller import Controller
    from mempool.rayhost.keys import PoolKeys
    from mempool.rayhost.serving import ControllerServing
    from mempool.rayhost.shard_serving import ShardServing
    from mempool.wire.channels import loop

    pool = PoolConfig(name="contention", shards=1, port=0)
    config = ClusterConfig(pool=pool, shard=ShardConfig(threads=threads, memory="2GiB"))

    keys = PoolKeys.of(config)

    class Here:
        """The launcher of a controller whose only shard is in its own process."""

        async def require_room(self, shards: int) -> None:
            pass

        async def starting(self) -> str:
            return ""

        async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:  # noqa: ARG002
            self.serving = ShardServing(config, shard=shard, incarnation=1, node_ip="127.0.0.1", keys=keys)
            return await self.serving.start()

        async def keep_wanted(self, shards: int) -> None:
            pass

        async def stop(self, info: ShardInfo) -> None:  # noqa: ARG002
            await self.serving.stop()

    async def start() -> str:
        serving = ControllerServing(config, node_ip="127.0.0.1", keys=keys)
        controller = Controller(pool.name, launcher=Here(), dial=serving.dial)
        await controller.open(1)
        return await serving.start(controller)

    print(loop.run(start(), timeout_s=_START_TIMEOUT_S), flush=True)
    sys.stdin.read()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError("a shard's process did not start; what it said is above")
    return line


if __name__ == "__main__":
    main()
