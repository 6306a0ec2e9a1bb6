"""How long a killed shard takes until it serves: what it imports, its snapshot, what it replays; beside the plain disk.

    python -m tests.benchmarks.recovery DIR [--gib 1] [--steps 200] [--bags 1024] [--pairs 128] [--dim 256]

Makes an embedded pool of one table in DIR, takes a snapshot, trains so many steps, and kills itself; then a new process
opens it. "disk" is a read of the same snapshot's files, in order, with nothing in the page cache where that can be
dropped (root alone can).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GIB = 2**30
READ_BYTES = 8 * 2**20


def train(folder: Path, *, gib: float, steps: int, bags: int, pairs: int, dim: int) -> None:
    """[KILLED] Fill, take a snapshot, train, and die."""
    import torch

    import mempool
    from mempool.wire.channels.loop import run

    pool = mempool.local(folder)
    optimizer = mempool.optim.SGD(lr=0.01)
    slots = int(gib * GIB / (4 * dim))
    table = pool.create_table(mempool.TableConfig(name="facts", num_slots=slots, value_dim=dim, optimizer=optimizer))
    launcher: Any = pool._connection._on_close.__self__  # type: ignore[union-attr]
    assert run(launcher._engines[0]._taking.take(), timeout_s=600.0)
    random = torch.Generator().manual_seed(1)
    began_s = time.monotonic()
    for _ in range(steps):
        ids = torch.randint(0, slots, (bags, pairs), generator=random)
        table.gather(ids, torch.ones(bags, pairs)).sum().backward()
        table.commit()
    print(json.dumps({"steps_s": time.monotonic() - began_s}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def recover(folder: Path) -> None:
    """Open it, and say what took how long."""
    began_s = time.monotonic()
    import mempool
    from mempool.shard.durable import replay
    from mempool.shard.durable.store import Store

    imported_s = time.monotonic()
    spent: dict[str, float] = {}
    _timed(replay, "restore_pages", spent, "snapshot")
    _timed(replay, "recover", spent, "recovered")
    import mempool.shard.engine as engine

    engine.recover = replay.recover
    _timed(Store, "__init__", spent, "opened")
    with mempool.local(folder) as pool:
        ready_s = time.monotonic()
        version = max(table.version for shard in pool.status().shards for table in shard.tables)
    spent["replay"] = spent.pop("recovered") - spent["snapshot"]
    print(json.dumps({"import": imported_s - began_s, **spent, "all": ready_s - began_s, "version": version}))


def _timed(owner: Any, name: str, spent: dict[str, float], what: str) -> None:
    call = getattr(owner, name)

    def timed(*given: Any, **named: Any) -> Any:
        began_s = time.monotonic()
        try:
            return call(*given, **named)
        finally:
            spent[what] = spent.get(what, 0.0) + time.monotonic() - began_s

    setattr(owner, name, timed)


def read_seconds(folder: Path) -> tuple[float, int]:
    """How long the snapshot's files take to be read, and their bytes."""
    files = sorted(folder.glob("local/shard-*/snapshots/*.pack"))
    _forget()
    began_s, num_bytes = time.monotonic(), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while data := file.read(READ_BYTES):
                num_bytes += len(data)
    return time.monotonic() - began_s, num_bytes


def _forget() -> None:
    """Nothing of any file is in memory."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bags", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--part", choices=("train", "recover"), help="be that process")
    given = parser.parse_args()
    if given.part == "train":
        train(given.folder, gib=given.gib, steps=given.steps, bags=given.bags, pairs=given.pairs, dim=given.dim)
    if given.part == "recover":
        recover(given.folder)
        return
    command = [sys.executable, "-m", "tests.benchmarks.recovery", *sys.argv[1:], "--part"]
    trained = subprocess.run([*command, "train"], capture_output=True, text=True, check=False)
    steps_s = json.loads(trained.stdout.splitlines()[-1])["steps_s"]
    read_s, num_bytes = read_seconds(given.folder)
    _forget()
    found = json.loads(subprocess.run([*command, "recover"], capture_output=True, text=True, check=True).stdout)
    print(f"trained {given.steps} steps in {steps_s:.1f} s; the snapshot has {num_bytes / GIB:.2f} GiB")
    for what, spent_s in found.items():
        print(f"{what:>10} {spent_s:8.2f}{'' if what == 'version' else ' s'}")
    print(f"disk alone {read_s:7.2f} s for the snapshot: {num_bytes / GIB / read_s:.2f} GiB/s")


if __name__ == "__main__":
    main()
