"""Readers at a version beside training: is each look-up bitwise of its version, and what does a step pay for it?

``python -m tests.benchmarks.readers --lookups 100000`` serves a pool from processes of its own and trains a table of it
in blocks of steps, by turns alone, with a version pinned that nobody reads, with a reader of the newest version, and
with a reader of a pinned one; so all four see the same noise. The reader is a process, as one that evaluates is. What a
version is, it reads of the newest one, between two steps, before it is left behind.
"""

import argparse
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing, nullcontext

import torch

import mempool
from mempool.bench.processes.child import Child, Parent
from mempool.bench.processes.pool import connected, pool_process
from mempool.client import Table

NAME, SLOTS, WIDTH = "facts", 2**16, 64
BAGS, PAIRS = 512, 8
"""Of a step."""
LOOKUP = 64
"""Rows of a look-up, one a bag."""
MODES = ("alone", "pinned", "newest read", "version read")
READ = ("newest read", "version read")


class Lookups:
    """Looks up rows on a thread of its own, until it is closed, and compares them.

    Args:
        table: Where.
        rows: [SLOTS, WIDTH]: what they must be; None: they are not compared.
        rate: Look-ups a second; 0: as many as there can be.
    """

    def __init__(self, table: Table, rows: torch.Tensor | None, rate: float) -> None:
        self._table, self._rows, self._rate = table, rows, rate
        self._stop = threading.Event()
        self.lookups = self.wrong = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self._error = error

    def _read(self) -> None:
        random, next_s = torch.Generator().manual_seed(1), time.monotonic()
        with torch.no_grad():
            while not self._stop.is_set():
                ids = torch.randint(0, SLOTS, (LOOKUP,), generator=random)
                found = self._table.gather(ids[:, None])
                self.lookups += 1
                if self._rows is not None and not torch.equal(found, self._rows[ids]):
                    self.wrong += 1
                if self._rate:
                    next_s += 1 / self._rate
                    self._stop.wait(max(0.0, next_s - time.monotonic()))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


def read(parent: Parent, *, address: str, rate: float) -> None:
    """[CHILD] for each mode that it hears: says "ready", reads until it hears anything, says (look-ups, wrong)."""
    torch.set_num_threads(1)
    with connected(address, near=True) as pool:
        table = pool.table(NAME)
        while (mode := parent.hear()) is not None:
            rows = table.rows(torch.arange(SLOTS)) if mode == "version read" else None
            with table.at() if mode == "version read" else nullcontext(table) as seen:
                with closing(Lookups(seen, rows, rate)) as lookups:
                    parent.say("ready")
                    parent.hear()
                parent.say((lookups.lookups, lookups.wrong))


class Trainer:
    """Blocks of steps, and how long each took.

    Args:
        table: Trained.
        compute_s: What a step computes besides.
    """

    def __init__(self, table: Table, compute_s: float) -> None:
        self._table, self._compute_s = table, compute_s
        self._dense = torch.randn(256, 256)
        self.times: dict[str, list[float]] = defaultdict(list)

    def steps(self, mode: str, count: int) -> None:
        self.times[mode] += [self._step() for _ in range(count)]

    def _step(self) -> float:
        began_s = time.perf_counter()
        ids = torch.randint(0, SLOTS, (BAGS, PAIRS))
        loss = self._table.gather(ids, torch.rand(BAGS, PAIRS)).square().mean()
        computing_s = time.perf_counter()
        while time.perf_counter() - computing_s < self._compute_s:
            self._dense @ self._dense
        loss.backward()  # type: ignore[no-untyped-call]
        self._table.commit(lr=0.1)
        return time.perf_counter() - began_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lookups", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=390.0, help="look-ups a second of a reader; 0: no limit")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=MODES[1:], help="beside alone")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="of a block")
    parser.add_argument("--compute-ms", type=float, default=15.0, help="what a step computes besides")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="after so long what was seen by then is told")
    options = parser.parse_args()
    modes = [mode for mode in MODES if mode == "alone" or mode in options.modes]
    if "version read" not in modes:
        parser.error("--modes without 'version read' has no look-ups to count")
    torch.set_num_threads(1)
    counts: dict[str, list[float]] = {mode: [0, 0, 0.0] for mode in READ}
    """Look-ups, wrong ones, seconds."""
    with pool_process(shards=options.shards) as served, connected(served.address, near=True) as pool:
        table = pool.create_table(mempool.TableConfig(name=NAME, num_slots=SLOTS, value_dim=WIDTH))
        trainer = Trainer(table, options.compute_ms / 1e3)
        trainer.steps("warm-up", 20)
        with Child("tests.benchmarks.readers:read", {"address": served.address, "rate": options.rate}) as reader:
            ends_s, kept = time.monotonic() + options.limit_s, [0]

            def work(mode: str) -> None:
                trainer.steps(mode, options.steps)
                kept.append(sum(shard.version_bytes for shard in pool.status().shards))

            while counts["version read"][0] < options.lookups and time.monotonic() < ends_s:
                for mode in modes:
                    with table.at() if mode == "pinned" else nullcontext():
                        if mode in READ:
                            _counted(reader, mode, work, counts[mode])
                        else:
                            work(mode)
    _tell(modes, trainer.times, counts, max(kept))
    return 1 if counts["version read"][1] else 0


def _counted(reader: Child, mode: str, work: Callable[[str], None], counts: list[float]) -> None:
    """What the reader did while this worked."""
    reader.say(mode)
    assert reader.hear() == "ready"
    began_s = time.monotonic()
    work(mode)
    reader.say("enough")
    lookups, wrong = reader.hear()
    for place, each in enumerate((lookups, wrong, time.monotonic() - began_s)):
        counts[place] += each


def _tell(modes: list[str], times: dict[str, list[float]], counts: dict[str, list[float]], kept_bytes: int) -> None:
    medians = {mode: statistics.median(times[mode]) for mode in modes}
    for mode, median_s in medians.items():
        read = f"; {counts[mode][0] / counts[mode][2]:.0f} look-ups a second" if mode in READ else ""
        print(
            f"{mode:14} {1e3 * median_s:8.2f} ms a step (median of {len(times[mode]):,}), "
            f"{median_s / medians['alone']:.3f} times as long as alone{read}"
        )
    lookups, wrong, _ = counts["version read"]
    print(f"{lookups:,} look-ups of versions, {wrong} of them wrong; {kept_bytes / 2**20:.1f} MiB were kept at most")


if __name__ == "__main__":
    raise SystemExit(main())
