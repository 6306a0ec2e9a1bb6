"""The product: an embedded pool, and pools of processes, asked over gRPC, by lines over TCP as from another host, and
through memory that both have."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import mempool
from mempool.bench.processes.pool import PoolProcess, connected, pool_process
from mempool.bench.serve.contenders.contender import LookUp
from mempool.bench.serve.shapes import Pairs, TableSize
from mempool.wire.lines.line import can_be_served, supported

EMBEDDED = "mempool embedded"
GRPC = "mempool over gRPC"
TCP = "mempool over TCP"
NEAR = "mempool, shared memory"
_CALL_TIMEOUT_S = 120.0
#: For a client to have lines, and how often that is looked at.
_LINE_TIMEOUT_S, _LINE_LOOK_S = 5.0, 0.02
#: Column blocks of a table that lies by columns; more where there are more shards.
_BLOCKS = 8
#: Ways to a pool in processes of its own, of those that this system has.
REMOTE = (GRPC, *((TCP,) if can_be_served() else ()), *((NEAR,) if supported() else ()))

Layout = Literal["auto", "columns", "rows"]


@contextmanager
def embedded(table: TableSize, *, shards: int = 1, layout: Layout = "auto") -> Iterator[LookUp]:
    """An embedded pool with the table."""
    with mempool.local(shards=shards, device="cpu", timeout_s=_CALL_TIMEOUT_S) as pool:
        yield look_up(EMBEDDED, made(pool, table, layout, shards=shards), table)


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
def served(
    table: TableSize, *, shards: int = 1, layout: Layout = "auto", ways: Sequence[str] = REMOTE
) -> Iterator[list[LookUp]]:
    """A pool in processes of its own with the table, and clients of it here, one a way: over gRPC; by lines over TCP,
    and through memory that both processes have, where these can be had."""
    with ExitStack() as stack:
        here = stack.enter_context(serving(table, shards=shards, layout=layout))
        found = [look_up(GRPC, here.table, table, here.process.pids)] if GRPC in ways else []
        for way in (TCP, NEAR):
            if way in ways:
                pool = stack.enter_context(client(here.process.address, way))
                own = pool.table(here.table.name)
                if goes(way, pool, own):
                    found.append(look_up(way, own, table, here.process.pids))
        yield found


@contextmanager
def serving(table: TableSize, *, shards: int = 1, layout: Layout = "auto", threads: int = 1) -> Iterator[Serving]:
    """The same, to be asked for other things too, by a client over gRPC. threads: Of each shard."""
    memory_bytes = 2**30 + 2 * table.num_slots * table.value_dim * 4
    with (
        pool_process(shards=shards, threads=threads, memory_bytes=memory_bytes) as process,
        connected(process.address, near=False) as pool,
    ):
        yield Serving(process, pool, made(pool, table, layout, shards=shards))


def made(pool: mempool.Pool, size: TableSize, layout: Layout = "auto", *, shards: int = 1) -> mempool.Table:
    """The table, made in a pool. shards: That it can lie on, by columns."""
    config = mempool.TableConfig(
        name="facts", num_slots=size.num_slots, value_dim=size.value_dim, layout=layout,
        block_dim=block_dim(size.value_dim, shards) if layout == "columns" else None,
    )  # fmt: skip
    table = pool.create_table(config)
    size.write(table.write)
    return table


def client(address: str, way: str) -> AbstractContextManager[mempool.Pool]:
    """A client of a pool that goes one way, where it can, and else over gRPC."""
    return connected(address, near=way == NEAR, tcp=way == TCP)


def goes(way: str, pool: mempool.Pool, table: mempool.Table) -> bool:
    """Whether calls of the only client of a pool that goes so have lines of that kind, which takes a moment; False:
    they go by gRPC still after a while."""
    ids, end_s = torch.zeros(1, 1, dtype=torch.int64), time.monotonic() + _LINE_TIMEOUT_S
    while time.monotonic() < end_s:
        with torch.no_grad():
            table.gather(ids)
        if any(shard.near_clients if way == NEAR else shard.tcp_line_clients for shard in pool.status().shards):
            return True
        time.sleep(_LINE_LOOK_S)
    return False


def block_dim(value_dim: int, shards: int) -> int | None:
    """Columns of a block of a table that is to lie on shards by columns; None where it has too few for as many."""
    blocks = max(_BLOCKS, shards)
    return value_dim // blocks if value_dim >= blocks else None


def look_up(name: str, table: mempool.Table, size: TableSize, pids: Sequence[int] = ()) -> LookUp:
    """A pool's table as a contender."""

    def run(pairs: Pairs) -> Tensor:
        with torch.no_grad():
            return table.gather(pairs.ids, pairs.weights)

    return LookUp(name, size, run, pids)
