"""Checkpoints beside what else moves the same bytes, and what they cost who trains: in turns, in one run.

    python -m tests.benchmarks.checkpoints DIR [--gib 1] [--rounds 3] [--shards 2] [--over memory | ray] [--out FILE]

First, of one table of so many GiB: a checkpoint, `cp` of its files with their sync, torch.distributed.checkpoint's save
of the same values; a restore, a plain read of the files, torch.distributed.checkpoint's load. The one that begins
changes each round; before each read the files are dropped from the page cache. All are checked against the table before
anything is timed. MB/s are medians.

Then steps of 1,024 bags of 128 pairs, alone and while a checkpoint is taken, in turns: the median step, the longest
beyond the median alone, and the checkpoint's seconds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

import mempool
from tests.integration.pools import RayPool
from tests.integration.ray_nodes import RayNodes

GIB = 2**30
DIM, BAGS, PAIRS = 256, 1024, 128
BATCHES = 8
READ_BYTES = 8 * 2**20
SAMPLE_STEP = 97
"""Each so many slots are compared before anything is timed."""


class Contenders:
    """What is timed, each from a table that stays as it is to a place of its own."""

    def __init__(self, pool: mempool.Pool, table: mempool.Table, folder: Path) -> None:
        self._pool, self._table, self._folder = pool, table, folder
        self._place, self._copy, self._theirs = (folder / name for name in ("place", "copy", "dcp"))
        everything = torch.arange(table.num_slots)
        self._values = torch.cat([table.rows(some) for some in everything.split(2**16)])
        self._loaded = torch.empty_like(self._values)
        self.num_bytes = self._values.nbytes

    def checkpoint(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        self._pool.checkpoint(self._place, tables=[self._table.name], incremental=False)

    def cp(self) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)
        subprocess.run(["cp", "-r", self._place, self._copy], check=True)
        for path in _files(self._copy):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def dcp_save(self) -> None:
        shutil.rmtree(self._theirs, ignore_errors=True)
        dcp.save({"values": self._values}, checkpoint_id=self._theirs, no_dist=True)

    def restore(self) -> None:
        self._pool.restore(self._place, name="restored", tables=[self._table.name])

    def read(self) -> None:
        buffer = bytearray(READ_BYTES)
        for path in _files(self._place):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def dcp_load(self) -> None:
        dcp.load({"values": self._loaded}, checkpoint_id=self._theirs, no_dist=True)

    def made_ready(self, name: str) -> None:
        """What is to be done before one is timed, and is none of its business."""
        if name in ("restore", "read", "dcp_load"):
            for path in (*_files(self._place), *_files(self._theirs)):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if name == "restore" and "restored" in [table.name for table in self._pool.tables()]:
            self._pool.drop_table("restored")

    def check(self) -> None:
        """Raises SystemExit where one does not do what it is timed for."""
        for name in ("checkpoint", "cp", "dcp_save", "restore", "dcp_load"):
            self.made_ready(name)
            getattr(self, name)()
        some = torch.arange(0, self._table.num_slots, SAMPLE_STEP)
        held = self._values[some]
        same = torch.equal(self._pool.table("restored").rows(some), held) and torch.equal(self._loaded[some], held)
        copied = [path.read_bytes() == self._copy.joinpath(path.relative_to(self._place)).read_bytes()
                  for path in _files(self._place)]  # fmt: skip
        if not (same and copied and all(copied)):
            print("what was written is not what is read: nothing is measured", file=sys.stderr)
            raise SystemExit(1)


def bandwidth(pool: mempool.Pool, folder: Path, *, gib: float, rounds: int) -> dict[str, float]:
    """MB/s of each contender."""
    slots = int(gib * GIB / (4 * DIM))
    config = mempool.TableConfig(name="still", num_slots=slots, value_dim=DIM, optimizer=mempool.optim.SGD(lr=0.1))
    contenders = Contenders(pool, pool.create_table(config), folder)
    contenders.check()
    spent: dict[str, list[float]] = {}
    groups = (("checkpoint", "cp", "dcp_save"), ("restore", "read", "dcp_load"))
    for number in range(rounds):
        for group in groups:
            for at in range(len(group)):
                name = group[(number + at) % len(group)]
                contenders.made_ready(name)
                os.sync()
                spent.setdefault(name, []).append(_seconds(getattr(contenders, name)))
    for name in ("restored", "still"):
        pool.drop_table(name)
    for each in folder.iterdir():
        if each.name in ("place", "copy", "dcp"):
            shutil.rmtree(each)
    return {name: round(contenders.num_bytes / 1e6 / statistics.median(each), 1) for name, each in spent.items()}


class Trainer:
    """Steps, one after the other."""

    def __init__(self, table: mempool.Table, *, bags: int, pairs: int) -> None:
        self._table = table
        random = torch.Generator().manual_seed(1)
        self._ids = [torch.randint(0, table.num_slots, (bags, pairs), generator=random) for _ in range(BATCHES)]
        self._weights = torch.rand(bags, pairs, generator=random)
        self._target = torch.randn(bags, table.value_dim, generator=random)
        self._steps = 0

    def step(self) -> None:
        ids = self._ids[self._steps % BATCHES]
        (self._table.gather(ids, self._weights) - self._target).square().mean().backward()
        self._table.commit()
        self._steps += 1

    def steps(self, going_on: Callable[[int], bool]) -> list[float]:
        """Seconds of each step, for as long as ``going_on`` of their number says so."""
        spent: list[float] = []
        while going_on(len(spent)):
            spent.append(_seconds(self.step))
        return spent


def while_training(
    pool: mempool.Pool, folder: Path, *, gib: float, rounds: int, bags: int, pairs: int
) -> dict[str, float]:
    """Steps alone and beside a checkpoint."""
    slots = int(gib * GIB / (4 * DIM))
    config = mempool.TableConfig(name="trained", num_slots=slots, value_dim=DIM, optimizer=mempool.optim.SGD(lr=0.1))
    trainer = Trainer(pool.create_table(config), bags=bags, pairs=pairs)
    trainer.steps(lambda done: done < BATCHES)
    alone: list[float] = []
    beside: list[float] = []
    stalls, took, held = [], [], []
    for _ in range(rounds):
        handle = pool.checkpoint(folder / "place", tables=["trained"], incremental=False, keep=1, wait=False)
        began_s = time.perf_counter()
        spent = trainer.steps(lambda _, taken=handle: not taken.done)  # type: ignore[misc]
        took.append(time.perf_counter() - began_s)
        held.append(handle.wait().held_s)
        beside += spent[:-1]  # the last one may have gone on alone
        most = max(BATCHES, len(spent))
        alone_now = trainer.steps(lambda done, most=most: done < most)  # type: ignore[misc]
        alone += alone_now
        stalls.append((max(spent) - statistics.median(alone_now)) / took[-1])
    shutil.rmtree(folder / "place")
    pool.drop_table("trained")
    alone_s, beside_s = statistics.median(alone), statistics.median(beside)
    return {
        "checkpoint_s": round(statistics.median(took), 3),
        "held_ms": round(1e3 * statistics.median(held), 1),
        "step_alone_ms": round(1e3 * alone_s, 1),
        "step_beside_ms": round(1e3 * beside_s, 1),
        "slower": round(beside_s / alone_s, 3),
        "longest_stall_share": round(max(stalls), 4),
        "steps_beside": len(beside),
    }


@contextmanager
def opened(over: str, folder: Path, shards: int) -> Iterator[mempool.Pool]:
    """A pool in this process, or on a Ray of its own."""
    if over == "memory":
        with mempool.local(shards=shards) as pool:
            yield pool
        return
    with ExitStack() as ending:
        nodes = ending.enter_context(RayNodes())
        served = RayPool(folder, name="measured", shards=shards, ray_at=nodes.address, memory="4GiB")
        served.up()
        ending.callback(served.down)
        yield ending.enter_context(served.connect(timeout_s=120.0))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on the disk to be measured; an empty one")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--over", choices=("memory", "ray"), default="memory")
    parser.add_argument("--bags", type=int, default=BAGS)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--only", choices=("bandwidth", "training"))
    parser.add_argument("--out", type=Path, help="where the JSON goes too")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    folder = given.folder.resolve()
    found: dict[str, object] = {"gib": given.gib, "shards": given.shards, "over": given.over, "rounds": given.rounds}
    with opened(given.over, folder, given.shards) as pool:
        if given.only != "training":
            found["mb_per_s"] = bandwidth(pool, folder, gib=given.gib, rounds=given.rounds)
        if given.only != "bandwidth":
            found["training"] = while_training(
                pool, folder, gib=given.gib, rounds=given.rounds, bags=given.bags, pairs=given.pairs
            )
    text = json.dumps(found, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
