"""What is measured: calls of tables of several widths on several shards, and the kernels alone; gated first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import mempool
from mempool.bench.gate import Check
from mempool.bench.processes.pool import connected, pool_process
from mempool.bench.serve.contenders.pools import Layout
from mempool.bench.serve.shapes import Pairs, Shape, TableSize, checked_sums
from mempool.bench.train import steps
from mempool.bench.train.tables import LocalTable, Memory, Trainable, optimizer
from mempool.sizing import Split, split
from mempool.types import TableSchema

#: Ways to shards, in the order in which they are measured; KERNELS: the shards' work alone, in this process.
EMBEDDED, GRPC, NEAR, KERNELS = "embedded", "gRPC", "shared-memory", "kernels"
PATHS = (EMBEDDED, GRPC, NEAR)
ALGORITHM = "adagrad"
_CALL_TIMEOUT_S = 120.0
_BLOCKS = 8

Call = Literal["gather", "step"]
CALLS: tuple[Call, ...] = ("gather", "step")


@dataclass(frozen=True)
class Workload:
    """Sizes of a run. Constants are fitted to the first of each, and tried on the "other" ones.

    Attributes:
        table_bytes: Of each table's values, so that the narrow ones are not in a cache either; Adagrad's state lies
            beside them.
        widths, other_widths: Columns of float32.
        shapes, other_shapes: Bags and pairs.
        shards, other_shards: By path; one shard is tried with the other widths and shapes, too. Several counts above
            one are fitted, as what rows cost for each shard and what they cost once is told apart by them.
        kernel_widths: Of tables in this process: as narrow as parts of one.
        kernel_shapes: Of their calls.
        copy_bytes: Of the copy beside.
        budget_s: Of the rounds of a path.
        batch_s: Of the calls over which CPU is counted.
    """

    table_bytes: int = 2**27
    widths: tuple[int, ...] = (64, 256)
    other_widths: tuple[int, ...] = (128,)
    shapes: tuple[Shape, ...] = (Shape(8, 32), Shape(128, 32), Shape(1024, 128))
    other_shapes: tuple[Shape, ...] = (Shape(64, 32), Shape(256, 64))
    shards: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {EMBEDDED: (1, 2, 8), GRPC: (1, 2, 4), NEAR: (1, 2, 4)}
    )
    other_shards: dict[str, tuple[int, ...]] = field(default_factory=lambda: {EMBEDDED: (4,), GRPC: (3,), NEAR: (3,)})
    kernel_widths: tuple[int, ...] = (16, 64, 256)
    kernel_shapes: tuple[Shape, ...] = (Shape(64, 32), Shape(256, 64), Shape(1024, 128))
    copy_bytes: int = 1 << 26
    budget_s: float = 150.0
    batch_s: float = 0.2

    def table(self, width: int, seed: int) -> TableSize:
        """The table of so many columns."""
        return TableSize(self.table_bytes // (4 * width), width, seed)


@dataclass(frozen=True, eq=False)
class Point:
    """One call that is measured.

    Attributes:
        path: Which way.
        call: "gather": a look-up without a graph. "step": forward, backward, commit.
        shape: Of the call.
        schema: Of the table.
        shards: Of its pool.
        fits: Whether constants are fitted to it; else they are tried on it.
        run: Makes the call on one of the sets of pairs.
        pids: Of the processes that answer; none where this one does.
    """

    path: str
    call: Call
    shape: Shape
    schema: TableSchema
    shards: int
    fits: bool
    run: Callable[[int], object]
    pids: Sequence[int] = ()

    @cached_property
    def split(self) -> Split:
        return split(self.schema, self.shards)

    @property
    def bags(self) -> int:
        return self.shape.bags

    @property
    def pairs(self) -> int:
        return self.shape.bags * self.shape.pairs

    @property
    def name(self) -> str:
        by = f" by {self.split.kind}" if self.shards > 1 else ""
        shards = f"{self.shards} shard{'s' if self.shards > 1 else ''}{by}"
        return f"{self.path} {self.call} {self.shape.name} of {self.schema.value_dim} columns, {shards}"

    def document(self) -> dict[str, Any]:
        """As it stands in the result file."""
        return {
            "path": self.path,
            "call": self.call,
            "bags": self.shape.bags,
            "pairs": self.shape.pairs,
            "num_slots": self.schema.num_slots,
            "value_dim": self.schema.value_dim,
            "shards": self.shards,
            "layout": self.split.kind,
        }


@dataclass
class Points:
    """Points that are to be timed, and what the gate found about their tables."""

    points: list[Point] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)


def kernels_alone(workload: Workload, seed: int) -> Points:
    """The shards' work without shards, on values of this process: what is fitted first."""
    found = Points()
    for width in workload.kernel_widths:
        size = workload.table(width, seed)
        schema = mempool_schema(size, "columns", blocks=1)
        table = LocalTable(Memory.of(size, ALGORITHM))
        _add(found, table, size, schema, KERNELS, 1, workload.kernel_shapes, fits=True, seed=seed)
    return found


def on_path(stack: ExitStack, path: str, workload: Workload, seed: int, *, fits: bool) -> Points:
    """Pools with tables until the stack ends, and the calls of each.

    Args:
        stack: Ends them.
        path: One of PATHS.
        workload: Sizes.
        seed: Of tables and pairs.
        fits: Whether to make those that constants are fitted to, too.
    """
    found = Points()
    others = dict.fromkeys((1, *workload.other_shards[path]), (workload.other_widths, workload.other_shapes))
    fitted = dict.fromkeys(workload.shards[path], (workload.widths, workload.shapes)) if fits else {}
    for shards in sorted(fitted.keys() | others.keys()):
        pool, pids = _pool(stack, path, shards, workload)
        for which, fit in ((fitted, True), (others, False)):
            widths, shapes = which.get(shards, ((), ()))
            for layout in _layouts(shards):
                for width in widths:
                    size = workload.table(width, seed)
                    table = _table(pool, size, layout)
                    _add(found, table, size, table.schema, path, shards, shapes, fits=fit, seed=seed, pids=pids)
    return found


def mempool_schema(size: TableSize, layout: Layout, *, blocks: int) -> TableSchema:
    """As a pool has it."""
    from mempool.config import resolve

    return resolve(_config(size, layout, blocks))


def _pool(stack: ExitStack, path: str, shards: int, workload: Workload) -> tuple[mempool.Pool, Sequence[int]]:
    if path == EMBEDDED:
        return stack.enter_context(mempool.local(shards=shards, device="cpu", timeout_s=_CALL_TIMEOUT_S)), ()
    tables = 2 * (len(workload.widths) + len(workload.other_widths))  # by columns and by rows
    memory_bytes = 2**30 + 4 * workload.table_bytes * tables  # with Adagrad's state, and room beside
    process = stack.enter_context(pool_process(shards=shards, memory_bytes=memory_bytes))
    return stack.enter_context(connected(process.address, near=path == NEAR)), process.pids


def _layouts(shards: int) -> tuple[Layout, ...]:
    return ("columns",) if shards == 1 else ("columns", "rows")


def _config(size: TableSize, layout: Layout, blocks: int) -> mempool.TableConfig:
    return mempool.TableConfig(
        name=f"{layout}-{size.value_dim}",
        num_slots=size.num_slots,
        value_dim=size.value_dim,
        layout=layout,
        block_dim=max(1, size.value_dim // blocks),
        optimizer=optimizer(ALGORITHM),
    )


def _table(pool: mempool.Pool, size: TableSize, layout: Layout) -> mempool.Table:
    table = pool.create_table(_config(size, layout, _BLOCKS if layout == "columns" else 1))
    size.write(table.write)
    return table


def _add(
    found: Points,
    table: Trainable,
    size: TableSize,
    schema: TableSchema,
    path: str,
    shards: int,
    shapes: Sequence[Shape],
    *,
    fits: bool,
    seed: int,
    pids: Sequence[int] = (),
) -> None:
    """The calls of one table, whose first ones are checked."""
    for number, shape in enumerate(shapes):
        sets = steps.pairs_of(shape, size, seed)
        for call, make in (("gather", steps.gather), ("step", steps.step)):
            run = partial(_call, make, table, sets)
            point = Point(path, call, shape, schema, shards, fits, run, pids)  # type: ignore[arg-type]
            if not number:
                found.checks += _checks(point.name, call, table, size, sets[0])
            found.points.append(point)


def _checks(name: str, call: str, table: Trainable, size: TableSize, pairs: steps.Pairs) -> list[Check]:
    if call == "gather":
        drawn = Pairs(pairs.ids, pairs.weights.detach())
        return [checked_sums(name, size, drawn, steps.gather(table, pairs))]
    return steps.checked_step(name, size, ALGORITHM, table, pairs)


def _call(
    make: Callable[[Trainable, steps.Pairs], object], table: Trainable, sets: Sequence[steps.Pairs], number: int
) -> object:
    return make(table, sets[number])
