"""Trainers that die in the middle of a step, and controllers inside a creation: what tests and longer drivers share."""

import random
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import mempool
from mempool.client.table import Table
from mempool.errors import MempoolError
from mempool.types import PoolStatus
from tests.integration.doomed import LR, stepped
from tests.integration.pools import RayPool, kill_listener, listener, wait_for

REST_S = 5.0
"""Beyond the lease of trainers: what a rescale may wait for a step that nobody decides."""
CREATION = (
    "import sys, mempool\n"
    "with mempool.connect(sys.argv[1]) as pool:\n"
    "    pool.create_table(mempool.TableConfig(name=sys.argv[2], num_slots=int(sys.argv[3]), value_dim=64, seed=5))\n"
)


@dataclass(frozen=True)
class Cut:
    """Where a trainer died, and what became of its step.

    Attributes:
        number, side: The message of its step (Prepare, Commit), and whether before it left or after its answer came.
        died: It did; its step may have had fewer messages.
        applied: Its step is in all tables on all shards; else in none of any.
        rescale_s: How long the rescale took that was asked for at once.
    """

    number: int
    side: str
    died: bool
    applied: bool
    rescale_s: float

    def __str__(self) -> str:
        what = "its step is everywhere" if self.applied else "its step is nowhere"
        died = "died" if self.died else "lived"
        return f"{died} {self.side} message {self.number}: {what}; the next rescale took {self.rescale_s:.1f} s"


def trainer_dies(pool: RayPool, *, cut: int, side: str) -> Cut:
    """Let a trainer of two tables on three shards die; the next rescale has to succeed at its first call.

    Leaves three shards, and no table. Raises AssertionError where a step is half applied.
    """
    names = ("first", "second")
    with pool.connect() as client:
        client.rescale(3)
        tables = [_small_table(client, name) for name in names]
        all_ids = torch.arange(tables[0].num_slots)
        before = [table.rows(all_ids) for table in tables]
        arguments = (pool.address, "--tables", *names, "--cut", str(cut), "--side", side)
        with pool.start("-m", "tests.integration.doomed", *arguments) as process:
            code = process.wait(60)
        assert code in (0, -signal.SIGKILL), code
        began_s = time.monotonic()
        client.rescale(2)
        rescale_s = time.monotonic() - began_s
        applied = []
        for table, values in zip(tables, before, strict=True):
            after = table.rows(all_ids)
            whole = torch.allclose(after, stepped(values, 1), rtol=1e-4, atol=1e-5)
            assert whole or torch.equal(after, values), f"table {table.name!r} has half a step"
            applied.append(whole)
        assert len(set(applied)) == 1, f"tables differ: {applied}"
        versions = {table.version for shard in client.status().shards for table in shard.tables if table.pages}
        assert versions == {int(applied[0])}, versions
        for name in names:
            client.drop_table(name)
        client.rescale(3)
    return Cut(cut, side, code != 0, applied[0], rescale_s)


def _small_table(client: mempool.Pool, name: str) -> Table:
    optimizer = mempool.optim.SGD(lr=LR)
    return client.create_table(
        mempool.TableConfig(
            name=name, num_slots=600, value_dim=96, block_dim=32, page_slots=64, layout="rows", optimizer=optimizer
        )
    )


@dataclass
class Creations:
    """What became of tables whose controller was killed while they were made.

    Attributes:
        kept, dropped: How many the new controller finished, and dropped.
        settled_s: Seconds until it had, from the kill.
    """

    kept: int = 0
    dropped: int = 0
    settled_s: Sequence[float] = ()

    def __str__(self) -> str:
        longest, usual = max(self.settled_s), statistics.median(self.settled_s)
        return (
            f"{len(self.settled_s)} kills inside create_table: {self.kept} tables finished, {self.dropped} dropped; "
            f"{usual:.1f} s from the kill until no shard holds anything half made ({longest:.1f} s at most)"
        )


def controller_dies_creating(
    pool: RayPool, *, kills: int, seed: int, slots: int = 300_000, after_s: float = 0.3
) -> Creations:
    """Kill the controller, and whoever asked, while a table is made; then make it by the same call.

    Raises AssertionError where a table is neither whole nor gone, or does not have its initial values.
    """
    chance, outcome = random.Random(seed), Creations()
    probe = torch.arange(0, slots, max(1, slots // 997))
    values = None
    with pool.connect() as client:
        for number in range(kills):
            name = f"made{number}"
            with pool.start("-c", CREATION, pool.address, name, str(slots)) as creator:
                wait_for("the table to be begun", lambda: client.status().creating or creator.poll() is not None)
                time.sleep(chance.uniform(0.0, after_s))
                killed = kill_listener(pool.port)
                began_s = time.monotonic()
                creator.kill()
            wait_for("the controller to come back", lambda before=killed: (listener(pool.port) or before) != before)
            wait_for("nothing half made", lambda made=name: _settled(client, made))
            outcome.settled_s = [*outcome.settled_s, time.monotonic() - began_s]
            kept = name in {table.name for table in client.tables()}
            outcome.kept, outcome.dropped = outcome.kept + kept, outcome.dropped + (not kept)
            config = mempool.TableConfig(name=name, num_slots=slots, value_dim=64, seed=5)
            table = client.create_table(config, exist_ok=True)
            rows = table.rows(probe)
            assert values is None or torch.equal(rows, values), f"table {name!r} has other values than the one before"
            values = rows
            client.drop_table(name)
    return outcome


def _settled(client: mempool.Pool, name: str) -> bool:
    """Whether every shard answers, and has the whole table or knows nothing of it."""
    try:
        status: PoolStatus = client.status()
        listed = name in {table.name for table in client.tables()}
    except MempoolError:
        return False
    if {shard.state for shard in status.shards} != {"ready"} or status.creating:
        return False
    found = [table for shard in status.shards for table in shard.tables if table.name == name]
    if listed:
        return len(found) == len(status.shards) and not any(table.pending or table.bytes_to_fill for table in found)
    return not found
