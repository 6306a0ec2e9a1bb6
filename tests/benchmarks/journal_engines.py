"""Kept engines beside the journal and the pages of a shard, on its work: which of them could stand in for it?

    python tests/benchmarks/journal_engines.py DIR        # needs lmdb and rocksdict; leaves nothing behind

Journal: a step is a record of 2 MiB, durable, then one of 200 bytes, durable; what is older than 32 steps is removed.
Pages: a store of pages of 256 KiB, of which some are written over, durably, at once; then all are read in order.
Engines, each in a process of its own, take turns in an order that changes; medians, and what the disk was given.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb
import rocksdict

from mempool.journal import DiskFiles, Journal, Owner, Snapshots

LARGE, SMALL = 2 * 2**20, 200
KEPT_STEPS = 32
PAGE_BYTES = 256 * 2**10


class Own:
    """The journal of mempool, waited for from another thread."""

    def __init__(self, folder: Path) -> None:
        self._journal = Journal(DiskFiles(), str(folder), owner=Owner("bench", 0))

    def put(self, key: int, value: bytes) -> None:  # noqa: ARG002
        self._journal.when_synced(self._journal.append(0, [value])).result()

    def remove_before(self, key: int) -> None:
        self._journal.remove_before(key + 1).result()

    def close(self) -> None:
        asyncio.run(self._journal.close())


class Sqlite:
    """WAL, synchronous=FULL: each transaction is synced."""

    def __init__(self, folder: Path) -> None:
        self._at = sqlite3.connect(folder / "db", isolation_level=None)
        for pragma in ("page_size=65536", "journal_mode=WAL", "synchronous=FULL"):
            self._at.execute(f"PRAGMA {pragma}")
        self._at.execute("CREATE TABLE records (number INTEGER PRIMARY KEY, payload BLOB)")

    def put(self, key: int, value: bytes) -> None:
        self._at.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (key, value))

    def put_many(self, pages: dict[int, bytes]) -> None:
        self._at.execute("BEGIN")
        self._at.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", pages.items())
        self._at.execute("COMMIT")

    def read_all(self) -> int:
        return sum(len(row[0]) for row in self._at.execute("SELECT payload FROM records ORDER BY number"))

    def remove_before(self, key: int) -> None:
        self._at.execute("DELETE FROM records WHERE number < ?", (key,))

    def close(self) -> None:
        self._at.close()


class Lmdb:
    """Synced at each commit, which is its default."""

    def __init__(self, folder: Path) -> None:
        self._at = lmdb.open(str(folder), map_size=4 * 2**30)

    def put(self, key: int, value: bytes) -> None:
        with self._at.begin(write=True) as transaction:
            transaction.put(key.to_bytes(8, "big"), value)

    def put_many(self, pages: dict[int, bytes]) -> None:
        with self._at.begin(write=True) as transaction:
            for key, value in pages.items():
                transaction.put(key.to_bytes(8, "big"), value)

    def read_all(self) -> int:
        with self._at.begin(buffers=True) as transaction:
            return sum(len(bytes(value)) for _, value in transaction.cursor())

    def remove_before(self, key: int) -> None:
        with self._at.begin(write=True) as transaction:
            cursor = transaction.cursor()
            while cursor.first() and int.from_bytes(cursor.key(), "big") < key:
                cursor.delete()

    def close(self) -> None:
        self._at.close()


class Rocks:
    """RocksDB, whose write-ahead log is synced at each write."""

    def __init__(self, folder: Path) -> None:
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        self._at: Any = rocksdict.Rdict(str(folder), options)
        write = rocksdict.WriteOptions()
        write.sync = True
        self._at.set_write_options(write)
        self._write = write

    def put(self, key: int, value: bytes) -> None:
        self._at[key.to_bytes(8, "big")] = value

    def put_many(self, pages: dict[int, bytes]) -> None:
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, value in pages.items():
            batch[key.to_bytes(8, "big")] = value
        self._at.write(batch, self._write)

    def read_all(self) -> int:
        return sum(len(value) for value in self._at.values())

    def remove_before(self, key: int) -> None:
        self._at.delete_range((0).to_bytes(8, "big"), key.to_bytes(8, "big"))

    def close(self) -> None:
        self._at.close()


class Packs:
    """The snapshots of mempool: each change is one."""

    def __init__(self, folder: Path) -> None:
        self._store = Snapshots(DiskFiles(), str(folder), owner=Owner("bench", 0))
        self._after = 0

    def put_many(self, pages: dict[int, bytes]) -> None:
        self._after += 1
        changed = {b"%d" % key: value for key, value in pages.items()}
        with self._store.begin(after=self._after) as snapshot:
            for key in self._store.newest.pages if self._store.newest is not None else ():
                if key not in changed:
                    snapshot.keep(key)
            for key, value in changed.items():
                snapshot.write(key, [("values", [value])])
            snapshot.finish(b"")

    def read_all(self) -> int:
        return sum(len(bytes(arrays["values"])) for _, arrays in self._store.pages())

    def close(self) -> None:
        pass


def serve(kind: Callable[[Path], Any], folder: Path, orders: Connection) -> None:
    """[ENGINE'S PROCESS] Do what is ordered; answer each with its seconds, its result, and what the disk was given."""
    folder.mkdir()
    engine = kind(folder)
    while (order := orders.recv()) is not None:
        name, arguments = order
        before, began = written_bytes(), time.perf_counter()
        result = getattr(engine, name)(*arguments)
        took_s = time.perf_counter() - began
        orders.send((took_s, result, written_bytes() - before))
    engine.close()
    orders.send(written_bytes())


class Process:
    """An engine in a process of its own.

    Attributes:
        written: Bytes that it gave the disk, since it was asked for them to be counted.
    """

    def __init__(self, kind: Callable[[Path], Any], folder: Path) -> None:
        self._orders, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(target=serve, args=(kind, folder, theirs))
        self._process.start()
        self.written = 0

    def __call__(self, name: str, *arguments: Any) -> float:
        """Seconds that a method took."""
        self._orders.send((name, arguments))
        took_s, self.result, written = self._orders.recv()
        self.written += written
        return float(took_s)

    def close(self) -> None:
        self._orders.send(None)
        self.written_in_all = self._orders.recv()
        self._process.join()


def written_bytes() -> int:
    """What this process gave the disk to write."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def turns(engines: list[str], rounds: int, take: Callable[[str], None]) -> None:
    """Each engine once a round, in an order that changes."""
    order = random.Random(1)
    for _ in range(rounds):
        order.shuffle(engines)
        for name in engines:
            take(name)


def journals(folder: Path, *, rounds: int, steps: int) -> None:
    kinds: dict[str, Callable[[Path], Any]] = {"own": Own, "sqlite": Sqlite, "lmdb": Lmdb, "rocksdb": Rocks}
    at = {name: Process(kind, folder / name) for name, kind in kinds.items()}
    large, small = os.urandom(LARGE), os.urandom(SMALL)
    large_s: dict[str, list[float]] = {name: [] for name in kinds}
    small_s: dict[str, list[float]] = {name: [] for name in kinds}
    remove_s: dict[str, list[float]] = {name: [] for name in kinds}
    numbers = dict.fromkeys(kinds, 0)

    def take(name: str) -> None:
        for _ in range(steps):
            number = numbers[name] = numbers[name] + 2
            large_s[name].append(at[name]("put", number - 1, large))
            small_s[name].append(at[name]("put", number, small))
        remove_s[name].append(at[name]("remove_before", max(0, numbers[name] - 2 * KEPT_STEPS)))

    turns(list(kinds), rounds, take)
    print(f"journal: {rounds} rounds of {steps} steps; medians in ms (90th percentile)")
    for name in kinds:
        at[name].close()
        step_s = [a + b for a, b in zip(large_s[name], small_s[name], strict=True)]
        times = at[name].written_in_all / (len(step_s) * (LARGE + SMALL))
        print(
            f"  {name:8} 2 MiB {_ms(large_s[name])}   200 B {_ms(small_s[name])}   a step {_ms(step_s)}   "
            f"removing {_ms(remove_s[name])}   written {times:.2f} times the records"
        )


def pages(folder: Path, *, num_pages: int, changes: int, share: float) -> None:
    kinds: dict[str, Callable[[Path], Any]] = {"packs": Packs, "sqlite": Sqlite, "lmdb": Lmdb, "rocksdb": Rocks}
    at = {name: Process(kind, folder / f"pages-{name}") for name, kind in kinds.items()}
    chosen = random.Random(2)
    blocks = [os.urandom(PAGE_BYTES) for _ in range(8)]
    change_s: dict[str, list[float]] = {name: [] for name in kinds}
    read_s: dict[str, list[float]] = {name: [] for name in kinds}
    fill_s = dict.fromkeys(kinds, 0.0)
    for first in range(0, num_pages, 256):
        several = {key: blocks[key % 8] for key in range(first, min(first + 256, num_pages))}
        for name in kinds:
            fill_s[name] += at[name]("put_many", several)
    for process in at.values():
        process.written = 0
    count = max(1, int(num_pages * share))

    def change(name: str) -> None:
        changed = {key: blocks[(key + 1) % 8] for key in sorted(chosen.sample(range(num_pages), count))}
        change_s[name].append(at[name]("put_many", changed))

    def read(name: str) -> None:
        read_s[name].append(at[name]("read_all"))
        assert at[name].result == num_pages * PAGE_BYTES

    turns(list(kinds), changes, change)
    turns(list(kinds), 3, read)
    size = num_pages * PAGE_BYTES
    print(f"pages: {num_pages:,} of 256 KiB; {changes} times {count} of them at random written over; medians")
    for name in kinds:
        times, read_GB = at[name].written / (count * PAGE_BYTES * changes), size / statistics.median(read_s[name]) / 1e9
        at[name].close()
        print(
            f"  {name:8} filled {size / fill_s[name] / 1e9:5.2f} GB/s   changed {_ms(change_s[name])} ms   "
            f"written {times:.2f} times   read {read_GB:5.2f} GB/s"
        )


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:7.2f} ({statistics.quantiles(seconds, n=10)[8] * 1e3:7.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Kept engines beside the journal and the pages of a shard.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pages", type=int, default=4096, help="of 256 KiB")
    parser.add_argument("--changes", type=int, default=12)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        journals(folder, rounds=given.rounds, steps=given.steps)
        pages(folder, num_pages=given.pages, changes=given.changes, share=0.01)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
