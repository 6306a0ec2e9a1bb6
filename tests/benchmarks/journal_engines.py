"""Kept engines beside the journal and the pages of a shard, on its work: which of them could stand in for it?

    python tests/benchmarks/journal_engines.py DIR        # needs lmdb and rocksdict; leaves nothing behind

Journal: a step is a record of 2 MiB, durable, then one of 200 bytes, durable; what is older than 32 steps is removed.
Pages: a store of pages of 256 KiB, of which some are written over, durably, at once; then all are read in order.
Engines take turns in an order that changes; medians are printed, and what the disk was given to write.
"""

import argparse
import asyncio
import os
import random
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import lmdb
import rocksdict

from mempool.journal import DiskFiles, Journal, Owner

LARGE, SMALL = 2 * 2**20, 200
KEPT_STEPS = 32
PAGE_BYTES = 256 * 2**10


class Engine(Protocol):
    def put(self, key: int, value: bytes) -> None: ...
    def remove_before(self, key: int) -> None: ...
    def close(self) -> None: ...


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
    """What a snapshot would be: the pages that changed, in one file written in one go, and where each page is."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._where, self._packs = folder, {}, []

    def put_many(self, pages: dict[int, bytes]) -> None:
        files, name = DiskFiles(), str(self._folder / f"pack-{len(self._packs)}")
        file = files.open(name, new=True)
        file.write(list(pages.values()), 0)
        file.sync()
        files.sync_folder(str(self._folder))
        for place, key in enumerate(pages):
            self._where[key] = (len(self._packs), place * PAGE_BYTES)
        self._packs.append(file)

    def read_all(self) -> int:
        return sum(len(self._packs[pack].read(at, PAGE_BYTES)) for _, (pack, at) in sorted(self._where.items()))

    def close(self) -> None:
        for file in self._packs:
            file.close()


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
    kinds: dict[str, Callable[[Path], Engine]] = {"own": Own, "sqlite": Sqlite, "lmdb": Lmdb, "rocksdb": Rocks}
    at: dict[str, Engine] = {}
    for name, kind in kinds.items():
        (folder / name).mkdir()
        at[name] = kind(folder / name)
    large, small = os.urandom(LARGE), os.urandom(SMALL)
    large_s: dict[str, list[float]] = {name: [] for name in kinds}
    small_s: dict[str, list[float]] = {name: [] for name in kinds}
    remove_s: dict[str, list[float]] = {name: [] for name in kinds}
    written = dict.fromkeys(kinds, 0)
    numbers = dict.fromkeys(kinds, 0)

    def take(name: str) -> None:
        engine, before = at[name], written_bytes()
        for _ in range(steps):
            number = numbers[name] = numbers[name] + 2
            began = time.perf_counter()
            engine.put(number - 1, large)
            middle = time.perf_counter()
            engine.put(number, small)
            ended = time.perf_counter()
            large_s[name].append(middle - began)
            small_s[name].append(ended - middle)
        began = time.perf_counter()
        engine.remove_before(max(0, numbers[name] - 2 * KEPT_STEPS))
        remove_s[name].append(time.perf_counter() - began)
        written[name] += written_bytes() - before

    turns(list(kinds), rounds, take)
    print(f"journal: {rounds} rounds of {steps} steps; medians in ms (90th percentile)")
    for name in kinds:
        count = len(large_s[name])
        print(
            f"  {name:8} 2 MiB {_ms(large_s[name])}   200 B {_ms(small_s[name])}   a step "
            f"{_ms([a + b for a, b in zip(large_s[name], small_s[name], strict=True)])}   removing "
            f"{statistics.median(remove_s[name]) * 1e3:7.2f}   "
            f"written {written[name] / (count * (LARGE + SMALL)):.2f} times the records"
        )
        at[name].close()


def pages(folder: Path, *, num_pages: int, changes: int, share: float) -> None:
    kinds: dict[str, Callable[[Path], Any]] = {"packs": Packs, "sqlite": Sqlite, "lmdb": Lmdb, "rocksdb": Rocks}
    at: dict[str, Any] = {}
    for name, kind in kinds.items():
        (folder / f"pages-{name}").mkdir()
        at[name] = kind(folder / f"pages-{name}")
    chosen = random.Random(2)
    blocks = [os.urandom(PAGE_BYTES) for _ in range(8)]
    fill_s: dict[str, float] = {}
    change_s: dict[str, list[float]] = {name: [] for name in kinds}
    read_s: dict[str, list[float]] = {name: [] for name in kinds}
    written = dict.fromkeys(kinds, 0)
    for name in kinds:
        began = time.perf_counter()
        for first in range(0, num_pages, 256):
            at[name].put_many({key: blocks[key % 8] for key in range(first, min(first + 256, num_pages))})
        fill_s[name] = time.perf_counter() - began
    several = max(1, int(num_pages * share))

    def change(name: str) -> None:
        changed = {key: blocks[(key + 1) % 8] for key in sorted(chosen.sample(range(num_pages), several))}
        before, began = written_bytes(), time.perf_counter()
        at[name].put_many(changed)
        change_s[name].append(time.perf_counter() - began)
        written[name] += written_bytes() - before

    def read(name: str) -> None:
        began = time.perf_counter()
        assert at[name].read_all() == num_pages * PAGE_BYTES
        read_s[name].append(time.perf_counter() - began)

    turns(list(kinds), changes, change)
    turns(list(kinds), 3, read)
    size = num_pages * PAGE_BYTES
    print(f"pages: {num_pages:,} of 256 KiB; {changes} times {several} of them at random written over; medians")
    for name in kinds:
        times, read_GB = written[name] / (several * PAGE_BYTES * changes), size / statistics.median(read_s[name]) / 1e9
        print(
            f"  {name:8} filled {size / fill_s[name] / 1e9:5.2f} GB/s   changed {_ms(change_s[name])} ms   "
            f"written {times:.2f} times   read {read_GB:5.2f} GB/s"
        )
        at[name].close()


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
