"""What a fork of a large table takes: seconds, memory, a step beside it, the disk; and whether the table is untouched.

``python -m tests.benchmarks.forks FOLDER --mib 1024`` has a process make a table on a disk, fork it while a thread
trains it, train the fork beside it, and be killed; then opens the pool again, from the journal, and from a snapshot.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import xxhash

import mempool
from mempool import optim
from mempool.client import Pool, Table
from mempool.wire.channels.loop import run

WIDTH, BAGS, PAIRS = 128, 256, 8
READ_ROWS = 4096
WAIT_S = 900.0


def step(table: Table, number: int, skew: float = 1.0) -> float:
    """Of slots that are drawn evenly, or (``skew`` above 1) the sooner the lower they are. Returns seconds."""
    random = torch.Generator().manual_seed(number)
    began_s = time.perf_counter()
    ids = (torch.rand(BAGS, PAIRS, generator=random) ** skew * table.num_slots).long()
    table.gather(ids, torch.rand(BAGS, PAIRS, generator=random)).square().mean().backward()
    table.commit()
    return time.perf_counter() - began_s


def digest(table: Table) -> str:
    """Of all bits of values, optimizer state and step count."""
    found = xxhash.xxh3_64(str(table.step_count()).encode())
    for some in torch.arange(table.num_slots).split(2**15):
        for rows in (table.rows(some), *table.state(some).values()):
            found.update(rows.numpy().data)
    return found.hexdigest()


def memory() -> int:
    """Bytes that this process has: its own, and files without a name, mapped by whomever or not."""
    with open("/proc/self/smaps_rollup") as lines:
        own = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    files = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return own + sum(512 * file.stat().st_blocks for file in files if _is_memory(file))


def _is_memory(file: Path) -> bool:
    try:
        return os.readlink(file).startswith("/memfd:")
    except FileNotFoundError:  # the one that lists them
        return False


def shared(pool: Pool, name: str) -> int:
    return sum(table.shared_bytes for shard in pool.status().shards for table in shard.tables if table.name == name)


def read_s(tables: list[Table], rounds: int = 40) -> list[float]:
    """Seconds of a look-up of random rows, the tables by turns: medians."""
    random, seconds = torch.Generator().manual_seed(7), [[] for _ in tables]  # type: list[list[float]]
    for _ in range(rounds):
        ids = torch.randint(0, tables[0].num_slots, (READ_ROWS, 1), generator=random)
        for table, taken in zip(tables, seconds, strict=True):
            began_s = time.perf_counter()
            with torch.no_grad():
                table.gather(ids)
            taken.append(time.perf_counter() - began_s)
    return [statistics.median(taken) for taken in seconds]


def play(folder: str, mib: int, shards: int, steps: int, skew: float) -> dict[str, object]:
    """In the process that is killed."""
    said: dict[str, object] = {}
    pool = mempool.local(folder, shards=shards, timeout_s=120.0)
    slots = mib * 2**20 // (2 * 4 * WIDTH)
    given = {"num_slots": slots, "value_dim": WIDTH, "optimizer": optim.Adagrad(lr=0.1)}
    table = pool.create_table(mempool.TableConfig(name="facts", **given))  # type: ignore[arg-type]
    for number in range(5):
        step(table, number)
    before, times, over = memory(), [], threading.Event()  # type: int, list[float], threading.Event

    def go_on() -> None:
        number = 5
        while not over.is_set():
            times.append(step(table, number))
            number += 1

    trainer = threading.Thread(target=go_on)
    trainer.start()
    time.sleep(0.5)
    quiet, begun = len(times), time.perf_counter()
    trial = table.fork("trial")
    said["fork_s"] = time.perf_counter() - begun
    forked = len(times)
    over.set()
    trainer.join()
    said["step_alone_ms"] = 1e3 * statistics.median(times[:quiet])
    said["longest_step_while_forked_ms"] = 1e3 * max(times[quiet : forked + 1], default=0.0)
    said["fork_mib"] = (memory() - before) / 2**20
    begun = time.perf_counter()
    table.fork("again")
    said["second_fork_s"] = time.perf_counter() - begun
    pool.drop_table("again")
    bits, before = digest(table), memory()
    trial_times = [step(trial, 1000 + number, skew) for number in range(steps)]
    said["fork_after_steps_mib"] = (memory() - before) / 2**20
    said["fork_step_ms"] = [1e3 * trial_times[0], 1e3 * statistics.median(trial_times)]
    said["base_unchanged"] = digest(table) == bits
    said["digests"] = [bits, digest(trial)]
    said["shared_mib"] = shared(pool, "trial") / 2**20
    return said


def reopen(folder: str, digests: list[str], *, snapshot: bool) -> dict[str, object]:
    begun, before = time.perf_counter(), memory()
    with mempool.local(folder, timeout_s=WAIT_S) as pool:
        said: dict[str, object] = {"open_s": time.perf_counter() - begun, "mib": (memory() - before) / 2**20}
        said["shared_mib"] = shared(pool, "trial") / 2**20
        said["same_bits"] = [digest(pool.table(name)) for name in ("facts", "trial")] == digests
        if snapshot:
            for engine in pool._connection._on_close.__self__._engines.values():  # type: ignore[union-attr]
                assert run(engine._taking.take(), timeout_s=WAIT_S)
            said["packs_mib"] = sum(path.stat().st_size for path in Path(folder).rglob("*.pack")) / 2**20
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skew", type=float, default=1.0, help="of the slots that the fork is trained at")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--reads", action="store_true", help="only: how fast a table is read that has been forked")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.reads:
        given = {"num_slots": options.mib * 2**20 // (4 * WIDTH), "value_dim": WIDTH, "optimizer": optim.SGD(lr=0.1)}
        with mempool.local() as pool:
            tables = [pool.create_table(mempool.TableConfig(name=name, **given)) for name in ("alone", "forked")]  # type: ignore[arg-type]
            used_s = time.process_time()
            trial = tables[1].fork("trial")
            print(f"CPU of a fork of {options.mib} MiB: {time.process_time() - used_s:.2f} s")
            print("microseconds of a look-up, alone, forked, fork:", [1e6 * each for each in read_s([*tables, trial])])
        return 0
    if options.child:
        print(json.dumps(play(options.folder, options.mib, options.shards, options.steps, options.skew)), flush=True)
        sys.stdin.read()
    command = [sys.executable, "-m", "tests.benchmarks.forks", *sys.argv[1:], "--child"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate(timeout=60)
    digests = said.pop("digests")
    print(json.dumps(said, indent=1))
    good = bool(said["base_unchanged"])
    for snapshot in (True, False):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            found = apart.submit(reopen, options.folder, digests, snapshot=snapshot).result()
        print("killed and opened" if snapshot else "opened from the snapshot", json.dumps(found, indent=1))
        good = good and bool(found["same_bits"])
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
