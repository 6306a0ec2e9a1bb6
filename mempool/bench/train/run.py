"""A run of `mempool bench train`: steps of a table, of larger tables beside other libraries, and of a whole layer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import mempool
from mempool.bench import peers
from mempool.bench.gate import GateError
from mempool.bench.goals import Standing, stand
from mempool.bench.processes.pool import pool_process
from mempool.bench.run import Say, require_options
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.bench.train import layers, steps
from mempool.bench.train.measured import EMBEDDED, FBGEMM, GRPC, LOCAL, OVERLAPPED, TORCH, Measured
from mempool.bench.train.tables import (
    ALGORITHMS,
    LocalTable,
    Memory,
    Trainable,
    fbgemm_table,
    pool_table,
    torch_table,
)

PARTS = ("steps", "peers", "layers", "overlap")
_CALL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Workload:
    """Sizes of a run.

    Attributes:
        slots: Of a table whose step is timed here and in pools.
        peer_slots: Of a table that other libraries train too.
        value_dim: Columns.
        shape: Bags and pairs of a step.
        heads: Of a layer, whose tokens are the bags, and its top-k the pairs of all heads.
        algorithms: Optimizers.
        budget_s: Of the rounds of a case.
    """

    slots: int = 2**18
    peer_slots: int = 2**20
    value_dim: int = 256
    shape: Shape = field(default_factory=lambda: Shape(1024, 128))
    heads: int = 4
    algorithms: Sequence[str] = ALGORITHMS
    budget_s: float = 40.0


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        quick: One optimizer, and shorter.
        rounds: Timed steps of each contender; fewer where they take long.
        only: Parts; none for all.
        seed: Of tables, pairs and models.

    Raises:
        OptionsError: An unknown name, or no round.
    """

    quick: bool = False
    rounds: int = 50
    only: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require_options(self.only, PARTS, self.rounds)

    def has(self, part: str) -> bool:
        return not self.only or part in self.only


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        options: What was asked.
        workload: Of which sizes.
        measured: What passed its gate.
        failed: What was wrong, and not timed.
        peers_missing: Packages of peers that are not installed.
        standings: The goals.
    """

    options: Options
    workload: Workload
    measured: list[Measured] = field(default_factory=list)
    failed: list[GateError] = field(default_factory=list)
    peers_missing: list[str] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)


def run(options: Options, *, say: Say, workload: Workload | None = None) -> Outcome:
    """Run the parts one after the other. Everything that is started has ended when this returns, or raises.

    Args:
        options: Which, and how long.
        say: Told of each figure as it comes.
        workload: Sizes, if not the usual ones.

    Raises:
        ChildError: A process of the benchmark does not start, or ends.
    """
    workload = workload or Workload()
    if options.quick:
        workload = replace(workload, algorithms=workload.algorithms[-1:], budget_s=workload.budget_s / 4)
    outcome = Outcome(options, workload, peers_missing=[] if peers.installed("fbgemm_gpu") else ["fbgemm_gpu"])
    if options.has("steps"):
        for algorithm in workload.algorithms:
            with _part(outcome, say), _one_thread():
                _steps(outcome, algorithm, say)
    if options.has("peers"):
        with _part(outcome, say):
            _peers(outcome, say)
    if options.has("layers"):
        with _part(outcome, say), _one_thread():
            _layers(outcome, say)
    if options.has("overlap"):
        with _part(outcome, say), _one_thread():
            _overlap(outcome, say)
    outcome.standings = standings(outcome.measured, workload)
    return outcome


def _steps(outcome: Outcome, algorithm: str, say: Say) -> None:
    size = TableSize(outcome.workload.slots, outcome.workload.value_dim, outcome.options.seed)
    with _embedded() as embedded, _served(size) as served:
        memory = Memory.of(size, algorithm)
        tables: dict[str, Trainable] = {
            LOCAL: LocalTable(memory),
            EMBEDDED: pool_table(embedded, size, algorithm),
            GRPC: pool_table(served, size, algorithm),
        }
        _measure(outcome, size, algorithm, tables, memory, say)


def _peers(outcome: Outcome, say: Say) -> None:
    size = TableSize(outcome.workload.peer_slots, outcome.workload.value_dim, outcome.options.seed)
    algorithm = outcome.workload.algorithms[-1]
    with _embedded() as embedded:
        memory = Memory.of(size, algorithm)
        tables: dict[str, Trainable] = {
            LOCAL: LocalTable(memory),
            EMBEDDED: pool_table(embedded, size, algorithm),
            TORCH: torch_table(memory),
        }
        if peers.fbgemm_has(algorithm):
            tables[FBGEMM] = fbgemm_table(memory)
        _measure(outcome, size, algorithm, tables, memory, say)


def _measure(
    outcome: Outcome, size: TableSize, algorithm: str, tables: dict[str, Trainable], memory: Memory, say: Say
) -> None:
    found = steps.measure(
        outcome.workload.shape,
        size,
        algorithm,
        tables,
        before_check=memory.fill,
        rounds=outcome.options.rounds,
        budget_s=outcome.workload.budget_s,
        seed=outcome.options.seed,
    )
    for measured in found:
        outcome.measured.append(measured)
        say(_line(measured))


def _layers(outcome: Outcome, say: Say) -> None:
    workload, seed = outcome.workload, outcome.options.seed
    size = TableSize(workload.slots, workload.value_dim, seed)
    made: Callable[..., layers.Trained] = layers.trained
    shape: dict[str, Any] = {"heads": workload.heads, "topk": workload.shape.pairs // workload.heads, "seed": seed}
    with _embedded() as embedded, _served(size) as served:
        here, there = pool_table(embedded, size, "sgd"), pool_table(served, size, "sgd")
        models = {
            LOCAL: made(size.value_dim, here, local=LocalTable(Memory.of(size, "sgd")), **shape),
            EMBEDDED: made(size.value_dim, here, **shape),
            GRPC: made(size.value_dim, there, **shape),
        }
        _measure_layers(outcome, size, models, say)


def _overlap(outcome: Outcome, say: Say) -> None:
    """A model whose dense work is long enough to hide what the memory takes."""
    workload, seed = outcome.workload, outcome.options.seed
    size = TableSize(workload.slots, workload.value_dim, seed)
    made: Callable[..., layers.Trained] = layers.trained
    shape: dict[str, Any] = {"heads": workload.heads, "topk": workload.shape.pairs // workload.heads, "seed": seed}
    shape["wider"] = layers.LONG
    with _served(size) as served:
        # Tables of their own: contenders are checked by what their first step changes.
        plain, early = pool_table(served, size, "sgd"), pool_table(served, size, "sgd", name="more-facts")
        models = {
            LOCAL: made(size.value_dim, plain, local=LocalTable(Memory.of(size, "sgd")), **shape),
            GRPC: made(size.value_dim, plain, **shape),
            OVERLAPPED: made(size.value_dim, early, overlapped=True, **shape),
        }
        _measure_layers(outcome, size, models, say, family="overlap")


def _measure_layers(
    outcome: Outcome, size: TableSize, models: dict[str, layers.Trained], say: Say, *, family: str = "layer"
) -> None:
    measured = layers.measure(
        size,
        models,
        tokens=outcome.workload.shape.bags,
        rounds=outcome.options.rounds,
        budget_s=outcome.workload.budget_s,
        seed=outcome.options.seed,
        family=family,
    )
    outcome.measured.append(measured)
    say(_line(measured))


def standings(measured: Sequence[Measured], workload: Workload) -> list[Standing]:
    """How a run stands to the goals. Never enforced."""
    by = {(one.work.family, one.work.num_slots): one for one in measured}

    def ratio(family: str, slots: int, contender: str, beside: str) -> float | None:
        one = by.get((family, slots))
        return None if one is None else one.ratio(contender, beside)

    layer = ratio("layer", workload.slots, GRPC, LOCAL)
    overlapped = ratio("overlap", workload.slots, OVERLAPPED, LOCAL)
    gather = ratio("gather", workload.peer_slots, FBGEMM, EMBEDDED)
    step = ratio("step", workload.peer_slots, FBGEMM, EMBEDDED)
    return [
        stand("a layer's step in a pool on this host, beside its table here, times", 1.15, layer, under=True),
        stand("the same with overlap, beside dense work at least as long, times", 1.05, overlapped, under=True),
        stand("embedded gather, speed beside FBGEMM's CPU build, times", 2.4, gather),
        stand("embedded gather, backward and commit, speed beside FBGEMM's CPU build, times", 7.5, step),
    ]


@contextmanager
def _part(outcome: Outcome, say: Say) -> Iterator[None]:
    """What is wrong is kept, and the others go on. Memory of one part is free for the next."""
    try:
        yield
    except GateError as error:
        outcome.failed.append(error)
        say(f"WRONG, not timed: {error}")
    finally:
        gc.collect()


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a shard has by default; libraries beside each other get what torch takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _embedded() -> Iterator[mempool.Pool]:
    with mempool.local(device="cpu", timeout_s=_CALL_TIMEOUT_S) as pool:
        yield pool


@contextmanager
def _served(size: TableSize) -> Iterator[mempool.Pool]:
    memory_bytes = 2**30 + 4 * size.num_slots * size.value_dim * 4
    with (
        pool_process(memory_bytes=memory_bytes) as process,
        mempool.connect(process.address, timeout_s=_CALL_TIMEOUT_S) as pool,
    ):
        yield pool


def _line(measured: Measured) -> str:
    return f"{measured.work.name}: " + ", ".join(
        f"{name} {times.median_ms:.2f} ms" for name, times in measured.times.items()
    )
