"""Trainer processes that commit at once on served shards: one order, and at every version the values of an oracle.

    python -m tests.agreement.two_trainers --shards 3 --steps 1000

The shards are engines of this process behind gRPC, so that what each holds can be noted at every version. A trainer's
gradients are functions of its number and step alone; the oracle, one shard with one client, is fed the same in the
order in which the gate numbered the steps. Rates name the steps: they are different for each.
"""

import argparse
import hashlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import mempool
from mempool.shard.pages.storage import Storage
from mempool.shard.steps import commits
from mempool.types import DecidedStep, Placement
from mempool.wire.channels.loop import run
from tests.unit.client.grpc_pool import GrpcPoolHere

SLOTS, DIM, PAGE, BLOCK = 256, 48, 32, 16
BOUND_S = 900.0
_RATES = 2**16  # a rate is a whole number of these parts of one, exactly, in float32 as well

CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "name": "adam",
        "layout": "columns",
        "dtype": "bfloat16",
        "optimizer": mempool.optim.Adam(lr=0.1),
    },
    {"name": "adagrad", "layout": "rows", "optimizer": mempool.optim.Adagrad(lr=0.1)},
)


@dataclass
class Seen:
    """What shards had at each version.

    Attributes:
        steps: By (shard, table): (version, the step's rate), as they were applied.
        values: By (shard, table, version): a digest of the values there.
        expected: By (table, version): the oracle's values, where they are being noted.
    """

    steps: dict[tuple[int, str], list[tuple[int, float]]] = field(default_factory=dict)
    values: dict[tuple[int, str, int], str] = field(default_factory=dict)
    expected: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    @contextmanager
    def noting(self, *, oracle: bool = False) -> Iterator[None]:
        """While this lasts, every step that is applied in this process is noted, on its engine's thread."""
        apply = commits.apply

        def noted(storage: Storage, updates: Any, ledger: Any, decided: DecidedStep, **how: Any) -> None:
            apply(storage, updates, ledger, decided, **how)
            name, rows = storage.schema.name, storage.read("values", torch.arange(SLOTS))
            if oracle:
                self.expected[name, ledger.version] = rows
                return
            self.steps.setdefault((storage.shard, name), []).append((ledger.version, decided.lr))
            self.values[storage.shard, name, ledger.version] = digest(rows)

        with mock.patch.object(commits, "apply", noted):
            yield


def digest(rows: torch.Tensor) -> str:
    """Of the bits."""
    return hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def part_of(rows: torch.Tensor, placement: Placement, shard: int) -> torch.Tensor:
    """What a shard answers of the whole: the columns of its blocks, zeros where it does not own them."""
    owned = torch.from_numpy(placement.owners == shard)
    blocks = owned.any(dim=0)
    mask = owned.repeat_interleave(PAGE, 0)[:SLOTS].repeat_interleave(BLOCK, 1)
    return torch.where(mask, rows, torch.zeros((), dtype=rows.dtype))[:, blocks.repeat_interleave(BLOCK)]


def rate(trainer: int, step: int) -> float:
    """The step's, and its name."""
    return (16 + 2 * step + trainer) / _RATES


def named(lr: float) -> tuple[int, int]:
    """(trainer, step) of a rate."""
    number = round(lr * _RATES) - 16
    return number % 2, number // 2


def train(tables: Sequence[mempool.Table], optimizer: mempool.optim.PoolOptimizer, trainer: int, step: int) -> None:
    """One step on all tables: two look-ups of each."""
    for group in optimizer.param_groups:
        group["lr"] = rate(trainer, step)
    for number, table in enumerate(tables):
        for lookup in range(2):
            generator = torch.Generator().manual_seed(((step * 2 + trainer) * 8 + number) * 2 + lookup)
            ids = torch.randint(SLOTS, (5, 7), generator=generator)
            weights = torch.randn(5, 7, generator=generator)
            grads = torch.randn(5, DIM, generator=generator)
            table.gather(ids, weights).backward(grads)
    optimizer.step()


def be_trainer(address: str, trainer: int, steps: int) -> None:
    """A process of its own: says that it is ready, waits for a line, trains."""
    torch.set_num_threads(1)
    with mempool.connect(address) as pool:
        tables = [pool.table(config["name"]) for config in CONFIGS]
        optimizer = mempool.optim.PoolOptimizer(tables)
        print("ready", flush=True)
        sys.stdin.readline()
        for step in range(steps):
            train(tables, optimizer, trainer, step)


def make_tables(pool: mempool.Pool) -> list[mempool.Table]:
    common = {"num_slots": SLOTS, "value_dim": DIM, "page_slots": PAGE, "block_dim": BLOCK, "seed": 5}
    return [pool.create_table(mempool.TableConfig(**common, **config)) for config in CONFIGS]


def read_all(tables: Sequence[mempool.Table]) -> dict[str, torch.Tensor]:
    """All values by table; all that is acknowledged is applied by then."""
    return {table.name: table.rows(torch.arange(SLOTS)) for table in tables}


def run_trainers(address: str, steps: int) -> None:
    """Both, from the same moment to their ends."""
    command = [sys.executable, "-m", "tests.agreement.two_trainers", "--address", address, "--steps", str(steps)]
    with ExitStack() as stack:
        trainers = []
        for number in range(2):
            process = subprocess.Popen(
                [*command, "--trainer", str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
            trainers.append(process)
        for process in trainers:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "a trainer did not start"
        for process in trainers:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in trainers:
            assert process.wait(BOUND_S) == 0, "a trainer failed"
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()


def check(shards: int, steps: int) -> str:
    """Train, and compare with the oracle. Answers what was compared.

    Raises:
        AssertionError: Two shards disagree, or one and the oracle.
    """
    seen, began_s = Seen(), time.monotonic()
    here = GrpcPoolHere(shards=shards)
    try:
        with mempool.connect(here.address) as pool:
            tables = make_tables(pool)
            with seen.noting():
                run_trainers(here.address, steps // 2)
                last = read_all(tables)
            views = run(here._engines[0].views(), timeout_s=BOUND_S)
            placements = {view.schema.name: view.placement for view in views}
    finally:
        here.close()
    spent_s = time.monotonic() - began_s
    order = [lr for _, lr in seen.steps[0, CONFIGS[0]["name"]]]
    assert sorted(named(lr) for lr in order) == [(trainer, step) for trainer in range(2) for step in range(steps // 2)]
    for (shard, name), applied in seen.steps.items():
        expected = list(enumerate([lr for _, lr in seen.steps[0, name]], start=1))
        assert applied == expected, f"shard {shard} has applied the steps of table {name!r} in another order"
    with mempool.local(shards=1, device="cpu") as pool, seen.noting(oracle=True):
        tables = make_tables(pool)
        optimizer = mempool.optim.PoolOptimizer(tables)
        for lr in order:
            train(tables, optimizer, *named(lr))
        read_all(tables)
    for (shard, name, version), found in seen.values.items():
        expected_rows = part_of(seen.expected[name, version], placements[name], shard)
        assert digest(expected_rows) == found, f"table {name!r} at version {version} on shard {shard}"
    for name, rows in last.items():
        assert digest(rows) == digest(seen.expected[name, len(order)].to(rows.dtype)), f"table {name!r} at its end"
    turns = sum(named(one)[0] != named(other)[0] for one, other in itertools.pairwise(order))
    owners = sum(len(placement.shards) for placement in placements.values())
    assert len(seen.values) == owners * len(order)
    return (
        f"{len(order):,} steps of 2 trainers on {shards} shards in {spent_s:.1f} s, {turns:,} times one after the "
        f"other's; {len(seen.values):,} (shard, table, version)s in one order and equal to the oracle, bit for bit"
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of both trainers together")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--trainer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer is not None:
        be_trainer(options.address, options.trainer, options.steps)
        return 0
    print(check(options.shards, options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
