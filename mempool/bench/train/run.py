"""A run of `mempool bench train`: steps of a table, of larger tables beside other libraries, and of a whole layer."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import mempool
from mempool.bench import peers
from mempool.bench.gate import GateError
from mempool.bench.goals import Standing
from mempool.bench.processes.pool import connected, pool_process
from mempool.bench.run import Say, require_options
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.contenders.pools import block_dim
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.bench.serve.shards import LAYOUTS
from mempool.bench.train import layers, steps
from mempool.bench.train.goals import standings
from mempool.bench.train.measured import (
    EMBEDDED,
    FBGEMM,
    GRPC,
    LOCAL,
    NEAR,
    OVERLAP,
    OVERLAPPED,
    SHARDED,
    TORCH,
    Measured,
    sharded,
)
from mempool.bench.train.tables import (
    ALGORITHMS,
    LocalTable,
    Memory,
    Trainable,
    fbgemm_table,
    pool_table,
    torch_table,
)

PARTS = ("steps", "shards", "peers", "layers", "overlap")
_CALL_TIMEOUT_S = 120.0
#: Of a pool in a process on this host.
_WAYS = (GRPC, NEAR)


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
        shards: Of embedded pools that are compared.
        budget_s: Of the rounds of a case.
    """

    slots: int = 2**18
    peer_slots: int = 2**20
    value_dim: int = 256
    shape: Shape = field(default_factory=lambda: Shape(1024, 128))
    heads: int = 4
    algorithms: Sequence[str] = ALGORITHMS
    shards: Sequence[int] = (1, 8)
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
    if options.has("shards"):
        with _part(outcome, say), _one_thread():
            _shards(outcome, say)
    if options.has("peers"):
        with _part(outcome, say):
            _peers(outcome, say)
    if options.has("layers"):
        with _part(outcome, say), _one_thread():
            _layers(outcome, say)
    if options.has("overlap"):
        with _part(outcome, say), _one_thread():
            _overlap(outcome, say)
    outcome.standings = standings(outcome.measured, slots=workload.slots, peer_slots=workload.peer_slots)
    return outcome


def _steps(outcome: Outcome, algorithm: str, say: Say) -> None:
    size = TableSize(outcome.workload.slots, outcome.workload.value_dim, outcome.options.seed)
    with _embedded() as embedded, _served(size) as served:
        memory = Memory.of(size, algorithm)
        tables: dict[str, Trainable] = {
            LOCAL: LocalTable(memory),
            EMBEDDED: pool_table(embedded, size, algorithm),
            **{way: _of_its_own(pool, size, algorithm, way) for way, pool in served.items()},
        }
        _measure(outcome, size, algorithm, tables, memory, say)


def _shards(outcome: Outcome, say: Say) -> None:
    """A table on more and more shards of this process, by columns and by rows."""
    workload = outcome.workload
    size = TableSize(workload.slots, workload.value_dim, outcome.options.seed)
    memory = Memory.of(size, "sgd")
    tables: dict[str, Trainable] = {LOCAL: LocalTable(memory)}
    with ExitStack() as stack:
        for layout in LAYOUTS:
            for shards in workload.shards:
                pool = stack.enter_context(_embedded(shards))
                columns = block_dim(size.value_dim, shards) if layout == "columns" else None
                table = pool_table(pool, size, "sgd", layout=layout, block_dim=columns)
                tables[sharded(layout, shards)] = table
        _measure(outcome, size, "sgd", tables, memory, say, kind=SHARDED)


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
    outcome: Outcome,
    size: TableSize,
    algorithm: str,
    tables: dict[str, Trainable],
    memory: Memory,
    say: Say,
    *,
    kind: str = "",
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
        kind=kind,
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
        here = pool_table(embedded, size, "sgd")
        models = {
            LOCAL: made(size.value_dim, here, local=LocalTable(Memory.of(size, "sgd")), **shape),
            EMBEDDED: made(size.value_dim, here, **shape),
        }
        for way, pool in served.items():
            models[way] = made(size.value_dim, _of_its_own(pool, size, "sgd", way), **shape)
        _measure_layers(outcome, size, models, say)


def _overlap(outcome: Outcome, say: Say) -> None:
    """A model whose dense work is long enough to hide what the memory takes."""
    workload, seed = outcome.workload, outcome.options.seed
    size = TableSize(workload.slots, workload.value_dim, seed)
    made: Callable[..., layers.Trained] = layers.trained
    shape: dict[str, Any] = {"heads": workload.heads, "topk": workload.shape.pairs // workload.heads, "seed": seed}
    shape["wider"] = layers.LONG
    with _served(size) as served:
        tables = {
            name: _of_its_own(pool, size, "sgd", name)
            for way, pool in served.items()
            for name in (way, way + OVERLAPPED)
        }
        local = LocalTable(Memory.of(size, "sgd"))
        models = {LOCAL: made(size.value_dim, tables[GRPC], local=local, **shape)}
        for name, table in tables.items():
            models[name] = made(size.value_dim, table, overlapped=name.endswith(OVERLAPPED), **shape)
        _measure_layers(outcome, size, models, say, family=OVERLAP)


def _of_its_own(pool: mempool.Pool, size: TableSize, algorithm: str, contender: str) -> mempool.Table:
    """A table that nobody else trains: contenders are checked by what their first step changes."""
    name = "-".join(re.findall("[a-z]+", contender.lower()))
    return pool_table(pool, size, algorithm, name=name)


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
def _embedded(shards: int = 1) -> Iterator[mempool.Pool]:
    with mempool.local(shards=shards, device="cpu", timeout_s=_CALL_TIMEOUT_S) as pool:
        yield pool


@contextmanager
def _served(size: TableSize) -> Iterator[Mapping[str, mempool.Pool]]:
    """A pool in a process on this host, as clients have it: through memory that both have, as is usual, and by gRPC."""
    memory_bytes = 2**30 + 8 * size.num_slots * size.value_dim * 4  # four tables, with optimizer state
    with ExitStack() as stack:
        address = stack.enter_context(pool_process(memory_bytes=memory_bytes)).address
        yield {way: stack.enter_context(connected(address, near=way == NEAR)) for way in _WAYS if way in pools.REMOTE}


def _line(measured: Measured) -> str:
    return f"{measured.work.name}: " + ", ".join(
        f"{name} {times.median_ms:.2f} ms" for name, times in measured.times.items()
    )
