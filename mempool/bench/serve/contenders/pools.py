"""The product: an embedded pool, and a pool whose shards are processes of their own, asked over gRPC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import mempool
from mempool.bench.processes.pool import PoolProcess, connected, pool_process
from mempool.bench.serve.contenders.contender import LookUp
from mempool.bench.serve.shapes import Pairs, TableSize
from mempool.wire.near.line import supported

EMBEDDED = "mempool embedded"
GRPC = "mempool over gRPC"
NEAR = "mempool, shared memory"
_CALL_TIMEOUT_S = 120.0
#: So that a table can lie on that many shards by columns.
_BLOCKS = 8

Layout = Literal["auto", "columns", "rows"]


@contextmanager
def embedded(table: TableSize, *, shards: int = 1, layout: Layout = "auto") -> Iterator[LookUp]:
    """An embedded pool with the table."""
    with mempool.local(shards=shards, device="cpu", timeout_s=_CALL_TIMEOUT_S) as pool:
        yield look_up(EMBEDDED, made(pool, table, layout), table)


@dataclass(frozen=True)
class Serving:
    """A pool in processes of its own, and a client of it here.

    Attributes:
        process: The pool's processes.
        pool: The client's pool.
        table: The client's table.
    """

    process: PoolProcess
    pool: mempool.Pool
    table: mempool.Table


@contextmanager
def served(table: TableSize, *, shards: int = 1, layout: Layout = "auto") -> Iterator[LookUp]:
    """A pool in processes of its own with the table, and the product's client here."""
    with serving(table, shards=shards, layout=layout) as here:
        yield look_up(GRPC, here.table, table, here.process.pids)


@contextmanager
def served_and_near(table: TableSize) -> Iterator[list[LookUp]]:
    """As ``served``, and another client of the same process, that asks through memory which both have, where it can."""
    with ExitStack() as stack:
        here = stack.enter_context(serving(table))
        found = [look_up(GRPC, here.table, table, here.process.pids)]
        if supported():
            pool = stack.enter_context(connected(here.process.address, near=True))
            found.append(look_up(NEAR, pool.table(here.table.name), table, here.process.pids))
        yield found


@contextmanager
def serving(table: TableSize, *, shards: int = 1, layout: Layout = "auto", near: bool = False) -> Iterator[Serving]:
    """The same, to be asked for other things too; near: through shared memory."""
    memory_bytes = 2**30 + 2 * table.num_slots * table.value_dim * 4
    with (
        pool_process(shards=shards, memory_bytes=memory_bytes) as process,
        connected(process.address, near=near) as pool,
    ):
        yield Serving(process, pool, made(pool, table, layout))


def made(pool: mempool.Pool, size: TableSize, layout: Layout = "auto") -> mempool.Table:
    """The table, made in a pool."""
    blocks = size.value_dim // _BLOCKS if layout == "columns" and size.value_dim >= _BLOCKS else None
    config = mempool.TableConfig(
        name="facts", num_slots=size.num_slots, value_dim=size.value_dim, layout=layout, block_dim=blocks
    )
    table = pool.create_table(config)
    size.write(table.write)
    return table


def look_up(name: str, table: mempool.Table, size: TableSize, pids: Sequence[int] = ()) -> LookUp:
    """A pool's table as a contender."""

    def run(pairs: Pairs) -> Tensor:
        with torch.no_grad():
            return table.gather(pairs.ids, pairs.weights)

    return LookUp(name, size, run, pids)
