"""How long a killed shard takes until it serves again: what it imports, its snapshot, what it replays; beside the disk.

    python -m tests.benchmarks.recovery DIR [--over memory | ray] [--gib 1] [--steps 200] [--bags 1024] [--pairs 128]
        [--dim 256] [--json FILE]

One table of one shard in DIR, all of it in a snapshot, and so many steps behind it in the journal; then its process is
killed (SIGKILL). Over memory, a new process opens the embedded pool. Over ray, Ray starts the shard's process again,
while the trainer, who waits, goes on. "disk" is a plain read of the same snapshot's files, in order, none of which the
system keeps; "kept" is one that it keeps, as that of ``cat``. Before each, and before the kill, nothing of any file is
in memory, where that can be had (by root alone), and what it lay in is given back: a virtual machine has to get that
from its host again. "fresh memory" is how long the system then takes to give as much as the pages have, which is the
stage "memory" of the shard's start. Over memory the process is killed and opened five times; medians.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import mempool
from mempool.shard.pages.memory import ReservedRows
from mempool.types import ShardStatus
from tests.integration.pools import RayPool, kill_listener, port_of, wait_for
from tests.integration.ray_nodes import RayNodes

GIB = 2**30
ROUNDS = 5
GIVEN_BACK_S = 3.0
RECOVERING = ("kernels_s", "memory_s", "snapshot_s", "replay_s")
READ_BYTES = 8 * 2**20
WAIT_S = 600.0


class Trainer:
    """Steps of one table that has so many GiB."""

    def __init__(self, pool: mempool.Pool, given: argparse.Namespace) -> None:
        self.given = given
        slots = int(given.gib * GIB / (4 * given.dim))
        optimizer = mempool.optim.SGD(lr=0.01)
        config = mempool.TableConfig(name="facts", num_slots=slots, value_dim=given.dim, optimizer=optimizer)
        self.table = pool.create_table(config)
        self._random = torch.Generator().manual_seed(1)
        self._weights = torch.ones(given.bags, given.pairs)

    def step(self) -> None:
        shape = (self.given.bags, self.given.pairs)
        ids = torch.randint(0, self.table.num_slots, shape, generator=self._random)
        self.table.gather(ids, self._weights).sum().backward()
        self.table.commit()

    def steps(self) -> float:
        """Seconds of them all."""
        began_s = time.monotonic()
        for _ in range(self.given.steps):
            self.step()
        return time.monotonic() - began_s


def train(given: argparse.Namespace) -> None:
    """[KILLED] Fill, take a snapshot, train, and die."""
    from mempool.wire.channels.loop import run

    pool = mempool.local(given.folder)
    trainer = Trainer(pool, given)
    launcher: Any = pool._connection._on_close.__self__  # type: ignore[union-attr]
    assert run(launcher._engines[0]._taking.take(), timeout_s=WAIT_S)
    print(json.dumps({"steps_s": trainer.steps()}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def recover(given: argparse.Namespace) -> None:
    """[KILLED] Open it, say what took how long, and die."""
    began_s, used_s = time.monotonic(), time.process_time()
    pool = mempool.local(given.folder)
    ready_s = time.monotonic() - began_s
    (shard,) = pool.status().shards
    spent = {"all_s": ready_s, "cpu_s": time.process_time() - used_s}
    print(json.dumps(parts_of(shard) | spent), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def over_memory(given: argparse.Namespace) -> dict[str, float]:
    """An embedded pool."""
    command = [sys.executable, "-m", "tests.benchmarks.recovery", *sys.argv[1:], "--part"]
    trained = subprocess.run([*command, "train"], stdout=subprocess.PIPE, text=True, check=False)
    found: dict[str, float] = json.loads(trained.stdout.splitlines()[-1])
    rounds = []
    for _ in range(ROUNDS):
        parts = read_seconds(given.folder)
        forget()
        parts["fresh_memory_s"] = memory_seconds(given.gib)
        said = subprocess.run([*command, "recover"], stdout=subprocess.PIPE, text=True, check=False)
        parts |= json.loads(said.stdout)
        rounds.append(parts | {"snapshot_of_disk": parts["disk_s"] / parts["snapshot_s"]})
    return found | {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def over_ray(given: argparse.Namespace) -> dict[str, float]:
    """A shard's process on Ray, killed while a trainer steps."""
    with tempfile.TemporaryDirectory() as home, RayNodes() as nodes:
        memory = f"{int(given.gib * 1024 * 3) + 2048}MiB"
        pool = RayPool(Path(home), name="local", shards=1, ray_at=nodes.address, memory=memory)
        # A snapshot is taken at half of it: the steps are less.
        limit = int(2.5 * given.steps * (12 * given.bags * given.pairs + 4 * given.bags * given.dim))
        storage = {"path": str(given.folder), "journal_limit": limit}
        pool.edit("shard:\n", f"shard:\n  storage: {json.dumps(storage)}\n")
        pool.up()
        try:
            with pool.connect(timeout_s=WAIT_S) as client:
                return _killed_on_ray(client, Trainer(client, given), given)
        finally:
            pool.run("down", "--pool", "local", "--drop", "--yes")


def _killed_on_ray(client: mempool.Pool, trainer: Trainer, given: argparse.Namespace) -> dict[str, float]:
    rows = torch.zeros(4096, given.dim)
    while not list(given.folder.glob("local/shard-0/snapshots/*.manifest")):  # until one is due, and taken
        trainer.table.write(torch.arange(len(rows)), rows)
    found = {"steps_s": trainer.steps()}
    found |= read_seconds(given.folder)
    ended_s: list[float] = []
    enough = threading.Event()

    def go_on() -> None:
        while not enough.is_set():
            trainer.step()
            ended_s.append(time.monotonic())

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        wait_for("steps", lambda: len(ended_s) > 2)
        forget()
        found["fresh_memory_s"] = memory_seconds(given.gib)
        (before,) = client.status().shards
        killed_s, done = time.monotonic(), len(ended_s)
        kill_listener(port_of(before.info))
        wait_for("a step after it", lambda: len(ended_s) > done + 1, within_s=WAIT_S)
    finally:
        enough.set()
        thread.join()
    waits = [later - earlier for earlier, later in pairwise(ended_s)]
    asked_s = time.monotonic()
    (after,) = client.status().shards
    assert after.info.incarnation > before.info.incarnation
    parts = parts_of(after)
    made_s = asked_s - after.uptime_s - killed_s  # when there was an engine
    parts["ray_restart_s"] = made_s - parts["imports_s"] - parts["open_s"]
    served_s = min(end for end in ended_s if end > killed_s + made_s) - killed_s
    parts["admission_s"] = served_s - made_s - sum(parts[name] for name in RECOVERING)
    return found | parts | {"all_s": served_s, "longest_wait_s": max(waits)}


def parts_of(shard: ShardStatus) -> dict[str, float]:
    """What a shard says of its own start."""
    spent = {stage.stage: stage.total_s for stage in shard.stages}
    names = {"imports_s": "start: imports", "open_s": "recover: open"}
    names |= {f"{stage}_s": f"recover: {stage}" for stage in ("kernels", "memory", "snapshot", "replay")}
    return {name: spent.get(stage, 0.0) for name, stage in names.items()}


def read_seconds(folder: Path) -> dict[str, float]:
    """How long the snapshot's files take to be read, and their bytes."""
    files = sorted(folder.glob("local/shard-*/snapshots/*.pack"))
    found = {"snapshot_bytes": float(sum(path.stat().st_size for path in files))}
    for name, kept in (("kept_s", True), ("disk_s", False)):
        forget()
        began_s, buffer = time.monotonic(), bytearray(READ_BYTES)
        for path in files:
            with path.open("rb", buffering=0) as file:
                at = 0
                while count := file.readinto(buffer):
                    if not kept:
                        os.posix_fadvise(file.fileno(), at, count, os.POSIX_FADV_DONTNEED)
                    at += count
        found[name] = time.monotonic() - began_s
    return found


def forget() -> None:
    """Nothing of any file is in memory, and that is nobody's."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        time.sleep(GIVEN_BACK_S)


def memory_seconds(gib: float) -> float:
    """How long the system takes to give so much memory, a huge page at a time."""
    rows = ReservedRows(max_rows=int(gib * 2**20), width=1024, dtype=torch.uint8)
    rows.resize(int(gib * 2**20))
    began_s = time.monotonic()
    rows.populate()
    return time.monotonic() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--over", choices=("memory", "ray"), default="memory")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bags", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--part", choices=("train", "recover"), help="be that process")
    given = parser.parse_args()
    given.folder = given.folder.absolute()
    if given.part is not None:
        {"train": train, "recover": recover}[given.part](given)
        return
    assert not (given.folder / "local").exists(), f"{given.folder} has a pool already"
    try:
        found = over_memory(given) if given.over == "memory" else over_ray(given)
    finally:
        shutil.rmtree(given.folder / "local", ignore_errors=True)
    found |= {"gib": given.gib, "steps": given.steps}
    found.setdefault("snapshot_of_disk", found["disk_s"] / found["snapshot_s"])
    found["replay_of_steps"] = found["steps_s"] / found["replay_s"]
    for what, number in found.items():
        print(f"{what:>16} {number:,.2f}")
    print(
        f"the snapshot was read at {found['snapshot_of_disk']:.2f} times the disk's speed (at least 0.5), and steps "
        f"replayed {found['replay_of_steps']:.1f} times as fast as they ran (more than 1)"
    )
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
