"""A trainer and a shard on the same cores, each with several threads: what they cost each other, and other clients.

    python -m mempool.bench.serve.contention --rounds 200 --clients 8 --seconds 5

[TRAINER] this process: torch with its threads computes, then looks up, as a training step does. [SHARD] one process
each way: with the environment that every shard has (its threads sleep when idle), and with OpenMP's own default. The
rounds of both are interleaved. Then, over gRPC, by lines over TCP, and through shared memory: so many other clients
look up beside the trainer, in a closed loop, and at 70 % of the rate that they reach in it. No figure is printed of a
wrong answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import mempool
from mempool.bench import machine
from mempool.bench.goals import Standing, stand
from mempool.bench.measuring import Times
from mempool.bench.processes.pool import WAITING, pool_process
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.load import OPEN_SHARE, Clients
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.rayhost.actors import kernel_variables

_CALL_TIMEOUT_S = 120.0
_WARM_UP_ROUNDS = 3
# Of an open loop, until it is as it will be.
_SETTLE_S = 0.5
# Of what p99 may be beside p50.
_TAIL = 5.0
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Look-ups of other clients beside a trainer's steps, at a share of the load that they saturate the shard with.

    Attributes:
        target: How all of them ask.
        shape: What the clients ask for, "64x32".
        clients: How many.
        saturated_per_s: Calls of all clients in a closed loop.
        offered_per_s: Arrivals in the open loop, whose figures follow.
        p50_ms, p99_ms: From the moment at which a call was to begin.
        p99_over_p50: Their quotient.
        unserved: Arrivals that nobody came to.
        trainer_p50_ms, trainer_p99_ms: Gathers in the trainer's steps meanwhile, of the larger shape.
    """

    target: str
    shape: str
    clients: int
    saturated_per_s: float
    offered_per_s: float
    p50_ms: float
    p99_ms: float
    p99_over_p50: float
    unserved: int
    trainer_p50_ms: float
    trainer_p99_ms: float


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m mempool.bench.serve.contention", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="steps of each way and shape")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the shard's kernels, and torch's")
    parser.add_argument("--slots", type=int, default=2**18, metavar="N", help=f"slots of {_VALUE_DIM} float32")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="that look up beside the trainer; 0: none")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each of their loops")
    options = parser.parse_args(arguments)
    figures = run(rounds=options.rounds, threads=options.threads, num_slots=options.slots)
    loaded = (
        beside(clients=options.clients, seconds=options.seconds, threads=options.threads, num_slots=options.slots)
        if options.clients > 0
        else []
    )
    document = {
        "machine": machine.describe(torch.device("cpu")),
        "threads": options.threads,
        "figures": [asdict(line) for line in figures],
        "beside_a_trainer": [asdict(line) for line in loaded],
        "goals": [standing.document() for standing in standings(loaded, options.threads)],
    }
    print(json.dumps(document, indent=2))


def standings(loaded: Sequence[Beside], threads: int) -> list[Standing]:
    """How tails beside a trainer stand to the goal. threads: Of the shard's kernels, and the trainer's."""
    return [
        stand(
            f"{one.shape}: p99 of {one.target} at {OPEN_SHARE:.0%} of the load of {one.clients} clients, beside p50,"
            f" with `threads: {threads}` and a trainer that uses {threads}, times",
            _TAIL,
            one.p99_over_p50,
            under=True,
        )
        for one in loaded
    ]


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


def beside(*, clients: int, seconds: float, threads: int, num_slots: int) -> list[Beside]:
    """Measure clients beside a trainer, each way.

    Raises:
        ChildError: A process does not start, or ends.
        GateError: A client got a wrong answer.
        RuntimeError: The trainer did.
    """
    size, found = TableSize(num_slots, _VALUE_DIM), []
    asked, trained = (Shape(*SHAPES[name]) for name in ("64x32", "1024x128"))
    with ExitStack() as stack:
        load = Clients(stack, size, [asked], count=clients, seed=0, threads=threads, floors=False)
        for target in load.remote:
            with pools.client(load.address, target) as pool:
                step = _Step(pool.table("facts"), bags=trained.bags, pairs=trained.pairs)
                step.check()
                with _training(step, threads):
                    saturated = load.closed(target, asked, clients, seconds)
                rate = OPEN_SHARE * saturated.calls_per_s
                with _training(step, threads) as gathers_s:
                    opened = load.open(target, asked, clients, seconds, rate, 0, _SETTLE_S)
            times, own = Times(tuple(opened.latencies_ms)), Times(tuple(1e3 * one for one in gathers_s))
            p50_ms, p99_ms = times.median_ms, times.quantile_ms(0.99)
            found.append(
                Beside(
                    target=target,
                    shape=asked.name,
                    clients=clients,
                    saturated_per_s=round(saturated.calls_per_s, 1),
                    offered_per_s=round(rate, 1),
                    p50_ms=round(p50_ms, 3),
                    p99_ms=round(p99_ms, 3),
                    p99_over_p50=round(p99_ms / p50_ms, 2),
                    unserved=opened.unserved,
                    trainer_p50_ms=round(own.median_ms, 2),
                    trainer_p99_ms=round(own.quantile_ms(0.99), 2),
                )
            )
    return found


@contextmanager
def _training(step: _Step, threads: int) -> Iterator[list[float]]:
    """[TRAINER] steps in a thread of their own until the block ends; seconds of their gathers, two at least."""
    ended = threading.Event()
    gathers_s: list[float] = []
    failed: list[BaseException] = []

    def train() -> None:
        torch.set_num_threads(threads)
        try:
            while not ended.is_set() or len(gathers_s) < 2:
                gathers_s.append(step()[0])
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        yield gathers_s
    finally:
        ended.set()
        thread.join(_CALL_TIMEOUT_S)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise RuntimeError(f"the trainer's step did not end within {_CALL_TIMEOUT_S:g} s")


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
