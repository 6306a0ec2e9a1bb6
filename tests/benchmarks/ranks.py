"""Ranks of one group on this host: how much two do beside one where compute dominates, and how soon a loss is known.

``python -m tests.benchmarks.ranks`` starts a pool of one shard. Two jobs of one rank and of two go by turns, each rank
with a fixed amount of dense work a step; then a rank is killed, again and again, and the other says when it hears it.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import mempool
from mempool.client import Pool, Table
from mempool.errors import RankLost
from tests.integration.pools import RayPool

SLOTS, WIDTH = 2**16, 64
BAGS, PAIRS = 512, 8
"""Of a rank's step."""
SIDE = 512
"""Of a square matrix, whose products are the dense work."""
LEASE_S = 4.0
LIMIT_S = 120.0
_SPAWN = get_context("spawn")


def rank(address: str, group: str, number: int, size: int, products: int, orders: Connection) -> None:
    """A process: does as many steps as it is told and says how long they took; 0: until a rank is lost."""
    torch.set_num_threads(1)
    dense = torch.randn(SIDE, SIDE)
    with mempool.connect(address, timeout_s=LIMIT_S) as pool:
        joined = pool.join(group, number, size)
        table = pool.table(group)
        orders.send(joined.step)
        while (steps := orders.recv()) is not None:
            began_s = time.monotonic()
            if steps:
                for _ in range(steps):
                    step(table, dense, products)
                orders.send(time.monotonic() - began_s)
                continue
            try:
                while True:
                    step(table, dense, products)
            except RankLost:
                heard_s = time.monotonic()
            orders.send((heard_s, given_back_s(pool)))
            until_back(table)


def step(table: Table, dense: torch.Tensor, products: int) -> None:
    loss = table.gather(torch.randint(0, SLOTS, (BAGS, PAIRS)), torch.rand(BAGS, PAIRS)).square().mean()
    for _ in range(products):
        dense @ dense
    loss.backward()  # type: ignore[no-untyped-call]
    table.commit(lr=0.1)


def given_back_s(pool: Pool) -> float:
    """When shards hold no update any more."""
    while sum(table.updates_held for shard in pool.status().shards for table in shard.tables):
        time.sleep(0.02)
    return time.monotonic()


def until_back(table: Table) -> None:
    """The same call, until the rank is there again."""
    while True:
        try:
            table.commit(lr=0.1)
        except RankLost:
            time.sleep(0.1)
        else:
            return


class Job:
    """A group's processes, each at the other end of a pipe."""

    def __init__(self, address: str, group: str, size: int, products: int) -> None:
        self._start: Callable[[int], None] = lambda number: self._begin(address, group, number, size, products)
        self.processes, self.pipes = [None] * size, [None] * size  # type: ignore[var-annotated]
        for number in range(size):
            self._start(number)
        self.heard()

    def _begin(self, address: str, group: str, number: int, size: int, products: int) -> None:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=rank, args=(address, group, number, size, products, theirs), daemon=True)
        process.start()
        self.processes[number], self.pipes[number] = process, ours

    def heard(self) -> list[object]:
        """What all say."""
        return [self.said(number) for number in range(len(self.pipes))]

    def said(self, number: int) -> object:
        assert self.pipes[number].poll(LIMIT_S), f"rank {number} says nothing"
        return self.pipes[number].recv()

    def steps(self, count: int) -> float:
        """Steps a second, of all ranks together."""
        for pipe in self.pipes:
            pipe.send(count)
        return len(self.pipes) * count / max(self.heard())  # type: ignore[type-var, operator]

    def lose(self) -> tuple[float, float]:
        """Kill the last rank in the middle: seconds until the first has heard, and until shards hold nothing for it."""
        for pipe in self.pipes:
            pipe.send(0)
        time.sleep(1.0 + random.random())
        killed_s = time.monotonic()
        self.processes[-1].kill()
        heard_s, free_s = self.said(0)  # type: ignore[misc]
        self._start(len(self.pipes) - 1)
        self.said(len(self.pipes) - 1)
        self.pipes[-1].send(1)  # the step that the first one waits with
        self.said(len(self.pipes) - 1)
        return heard_s - killed_s, free_s - killed_s

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(LIMIT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compute-ms", type=float, default=100.0, help="dense work of a step, about")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--losses", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    products = max(1, round(options.compute_ms / 1e3 / product_s()))
    with tempfile.TemporaryDirectory() as folder:
        pool = RayPool(Path(folder), name="ranks", shards=1, ray_address="local", trainer_lease_s=LEASE_S)
        pool.up()
        try:
            with pool.connect() as client:
                for name in ("one", "two"):
                    client.create_table(mempool.TableConfig(name=name, num_slots=SLOTS, value_dim=WIDTH))
            one, two = (Job(pool.address, name, size, products) for name, size in (("one", 1), ("two", 2)))
            found = [(one.steps(options.steps), two.steps(options.steps)) for _ in range(1 + options.rounds)][1:]
            rates = [statistics.median(column) for column in zip(*found, strict=True)]
            ratio = statistics.median(pair[1] / pair[0] for pair in found)
            print(f"steps a second of {products} products each: one rank {rates[0]:.2f}, two {rates[1]:.2f} together;")
            print(f"two do {ratio:.2f} times what one does (median of {len(found)} rounds by turns)")
            lost = [two.lose() for _ in range(options.losses)]
            heard, free = zip(*lost, strict=True)
            print(f"a lost rank was reported after {_all(heard)} s, with a lease of {LEASE_S:g} s;")
            print(f"shards held nothing for the step after {_all(free)} s")
            one.end()
            two.end()
        finally:
            pool.run("down", "--pool", pool.name, "--drop", "--yes")


def product_s() -> float:
    dense = torch.randn(SIDE, SIDE)
    times = []
    for _ in range(50):
        began_s = time.perf_counter()
        dense @ dense
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def _all(seconds: tuple[float, ...]) -> str:
    return ", ".join(f"{each:.2f}" for each in sorted(seconds))


if __name__ == "__main__":
    main()
