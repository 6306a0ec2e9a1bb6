"""A rescale of a large table while a trainer runs, 2 -> 4 -> 2 shards; on a Ray of its own.

    python -m tests.hostile.training_rescale --gib 1

Prints for each way the seconds, the longest training step beside the usual one and where it spent its time, and the
bytes that moved beside the least possible. Exit 1 where a step is not on every shard. What the trainer's process has
loaded is kept out of Python's full collections first: one walks through all of torch, for a sixth of a second and more,
and would be the longest step, whatever the pool does.
"""

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import mempool
from mempool.client.table import Table
from mempool.types import RescaleProgress
from tests.integration.pools import RayPool, wait_for

_WIDTH = 256
_PARTS = ("gather", "backward", "commit")


@dataclass(frozen=True)
class Step:
    """One training step: when it began, and the seconds of its parts."""

    began_s: float
    parts_s: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return sum(self.parts_s)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {1e3 * part:.0f}" for name, part in zip(_PARTS, self.parts_s, strict=True))
        return f"{1e3 * self.seconds:.0f} ms ({parts})"


class Trainer:
    """Steps on a thread: one look-up of many bags, its gradient, a commit.

    Attributes:
        steps: Those that are done.
        table: What is trained.
        failed: What ended it before its time.
    """

    def __init__(self, table: Table, *, bags: int) -> None:
        self.steps: list[Step] = []
        self.failed: BaseException | None = None
        self.table = table
        self._bags = bags
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def end(self) -> None:
        self._enough.set()
        self._thread.join(120)
        assert not self._thread.is_alive()
        assert self.failed is None, self.failed

    def _train(self) -> None:
        random = torch.Generator().manual_seed(3)
        weights = torch.ones(self._bags, 32)
        try:
            while not self._enough.is_set():
                ids = torch.randint(self.table.num_slots, (self._bags, 32), generator=random)
                times_s = [time.monotonic()]
                values = self.table.gather(ids, weights)
                times_s.append(time.monotonic())
                values.square().sum().backward()
                times_s.append(time.monotonic())
                self.table.commit()
                times_s.append(time.monotonic())
                parts_s = [later_s - sooner_s for sooner_s, later_s in itertools.pairwise(times_s)]
                self.steps.append(Step(times_s[0], tuple(parts_s)))
        except BaseException as error:
            self.failed = error


def way(pool: mempool.Pool, trainer: Trainer, shards: int, table_bytes: int) -> str:
    """Rescale while it trains; what that took."""
    before = len(trainer.steps)
    usual_s = statistics.median(step.seconds for step in trainer.steps[before // 2 :])
    reports: list[tuple[float, RescaleProgress]] = []
    began_s = time.monotonic()
    pool.rescale(shards, progress=lambda report: reports.append((time.monotonic(), report)))
    ended_s = time.monotonic()
    moving_s = next(at_s for at_s, report in reports if report.table)
    last = reports[-1][1]
    wait_for("a step after it", lambda: trainer.steps[-1].began_s > ended_s or trainer.failed)
    meanwhile = [step for step in trainer.steps if step.began_s + step.seconds > moving_s and step.began_s < ended_s]
    starting = [step for step in trainer.steps if began_s < step.began_s + step.seconds and step.began_s < moving_s]
    longest = max(meanwhile, key=lambda step: step.seconds)
    least = table_bytes * abs(last.shards_after - last.shards_before) // max(last.shards_after, last.shards_before)
    slow = sorted(step.seconds for step in meanwhile)[-max(1, len(meanwhile) // 20)]
    rounds = len({report.pages_moved for _, report in reports}) - 1
    before_s = max((step.seconds for step in starting), default=0.0)
    return (
        f"{last.shards_before} -> {last.shards_after}: {ended_s - began_s:.1f} s, {ended_s - moving_s:.1f} s of it "
        f"moving; longest step {longest}, {longest.seconds / usual_s:.1f} times the usual {1e3 * usual_s:.0f} ms; one "
        f"in twenty of {len(meanwhile)} takes {1e3 * slow:.0f} ms or more; before pages moved {1e3 * before_s:.0f} ms "
        f"at most; moved {last.bytes_moved / 2**20:.0f} MiB in {rounds} rounds, of at least {least / 2**20:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="of values")
    parser.add_argument("--bags", type=int, default=256, help="of a look-up, 32 slots each")
    parser.add_argument("--steps", type=int, default=100, help="before each way")
    options = parser.parse_args()
    slots = int(options.gib * 2**30) // (4 * _WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        pool = RayPool(Path(folder), name="large", shards=2, ray_address="local", memory="2GiB")
        pool.up()
        try:
            with pool.connect() as client:
                optimizer = mempool.optim.SGD(lr=1e-4)
                config = mempool.TableConfig(name="large", num_slots=slots, value_dim=_WIDTH, optimizer=optimizer)
                table = client.create_table(config)
                gc.collect()
                gc.freeze()
                trainer = Trainer(table, bags=options.bags)
                try:
                    for shards in (4, 2):
                        enough = len(trainer.steps) + options.steps
                        wait_for("steps", lambda enough=enough: len(trainer.steps) >= enough or trainer.failed)
                        print(way(client, trainer, shards, slots * 4 * _WIDTH), flush=True)
                finally:
                    trainer.end()
                trainer.table.rows(torch.arange(0, slots, 97))  # whoever has not heard of the last step waits for it
                versions = {table.version for shard in client.status().shards for table in shard.tables if table.pages}
                assert versions == {len(trainer.steps)}, f"{len(trainer.steps)} steps, and shards have {versions}"
        except AssertionError as error:
            print(f"failed: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            pool.down()
    print("every step is on every shard")


if __name__ == "__main__":
    main()
