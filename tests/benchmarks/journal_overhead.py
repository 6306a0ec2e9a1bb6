"""What a journal costs: steps of a pool with storage beside those of one without, in turns, in one run.

    python -m tests.benchmarks.journal_overhead DIR [--shards 1] [--over memory | ray] [--turns 12] [--steps 12]

Both pools have the same table (2^18 slots of 256 columns, Adagrad) and take the same steps of 1,024 bags of 128 pairs;
the first of them are compared bit for bit. A turn is so many steps on each, the one that begins changes. Prints seconds
a step, medians of the turns, the share of steps a second that is lost, and how long the disk takes for such bytes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

import mempool
from tests.integration.pools import RayPool
from tests.integration.ray_nodes import RayNodes

SLOTS, DIM, BAGS, PAIRS = 2**18, 256, 1024, 128
BATCHES = 8
WARM_UP = 4


class Trainer:
    """The same steps for every pool that has one."""

    def __init__(self, pool: mempool.Pool) -> None:
        config = mempool.TableConfig(
            name="facts", num_slots=SLOTS, value_dim=DIM, optimizer=mempool.optim.Adagrad(lr=0.1)
        )
        self.table = pool.create_table(config)
        random = torch.Generator().manual_seed(1)
        self._ids = [torch.randint(0, SLOTS, (BAGS, PAIRS), generator=random) for _ in range(BATCHES)]
        self._weights = torch.rand(BAGS, PAIRS, generator=random)
        self._target = torch.randn(BAGS, DIM, generator=random)
        self._steps = 0

    def step(self) -> None:
        ids = self._ids[self._steps % BATCHES]
        (self.table.gather(ids, self._weights) - self._target).square().mean().backward()
        self.table.commit()
        self._steps += 1

    def turn(self, steps: int) -> float:
        """Seconds a step."""
        began_s = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - began_s) / steps


def disk_seconds(folder: Path, num_bytes: int, *, rounds: int = 9) -> float:
    """How long a plain write of so many bytes and its sync take, one after the other; the median."""
    data, spent = os.urandom(num_bytes), []
    path = folder / "plain"
    with path.open("wb", buffering=0) as file:
        for _ in range(rounds):
            began_s = time.perf_counter()
            file.write(data)
            os.fdatasync(file.fileno())
            spent.append(time.perf_counter() - began_s)
    path.unlink()
    return statistics.median(spent)


@contextmanager
def in_memory(folder: Path, shards: int) -> Iterator[tuple[mempool.Pool, mempool.Pool]]:
    """Two pools in this process: without storage, and with it."""
    with mempool.local(shards=shards) as without, mempool.local(folder / "pool", shards=shards) as kept:
        yield without, kept


@contextmanager
def on_ray(folder: Path, shards: int) -> Iterator[tuple[mempool.Pool, mempool.Pool]]:
    """Two pools on one Ray."""
    with ExitStack() as ending:
        nodes = ending.enter_context(RayNodes())
        clients = []
        for name in ("without", "kept"):
            pool = RayPool(folder, name=name, shards=shards, ray_at=nodes.address, memory="1GiB")
            if name == "kept":
                pool.edit("shard:\n", f'shard:\n  storage: {{"path": "{folder}/disk"}}\n')
            pool.up()
            ending.callback(pool.down)
            clients.append(ending.enter_context(pool.connect(timeout_s=120.0)))
        yield clients[0], clients[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on the disk to be measured; an empty one")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--over", choices=("memory", "ray"), default="memory")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    folder = given.folder.resolve()
    with {"memory": in_memory, "ray": on_ray}[given.over](folder, given.shards) as pools:
        trainers = [Trainer(pool) for pool in pools]
        for trainer in trainers:
            trainer.turn(WARM_UP)
        ids = torch.arange(0, SLOTS, 7)
        if not torch.equal(trainers[0].table.rows(ids), trainers[1].table.rows(ids)):
            print("the pools differ after the same steps: nothing is measured", file=sys.stderr)
            raise SystemExit(1)
        journal_bytes = sum(shard.journal_bytes for shard in pools[1].status().shards)
        spent: list[list[float]] = [[], []]
        for turn in range(given.turns):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                spent[which].append(trainers[which].turn(given.steps))
    without_s, kept_s = (statistics.median(turns) for turns in spent)
    ratio = statistics.median(kept / without for without, kept in zip(*spent, strict=True))
    step_bytes = journal_bytes // WARM_UP
    print(
        json.dumps(
            {
                "shards": given.shards,
                "over": given.over,
                "turns": given.turns,
                "without_ms": round(1e3 * without_s, 1),
                "kept_ms": round(1e3 * kept_s, 1),
                "ratio": round(ratio, 3),
                "steps_lost": round(1 - 1 / ratio, 3),
                "journal_bytes_a_step": step_bytes,
                "disk_ms_for_them": round(1e3 * disk_seconds(folder, step_bytes), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
