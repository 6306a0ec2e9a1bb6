"""Readers at a version beside training: is each look-up bitwise of its version, and what does a step pay for it?

``python -m tests.benchmarks.readers --lookups 100000`` trains an embedded table in blocks of steps, by turns alone,
with a version pinned that nobody reads, with a reader of the newest version, and with a reader of a pinned one; so all
four see the same noise. What a version is, is read of the newest one, between two steps, before it is left behind.
"""

import argparse
import statistics
import threading
import time
from collections import defaultdict

import torch

import mempool
from mempool.client import Table

SLOTS, WIDTH = 2**16, 64
BAGS, PAIRS = 512, 8
"""Of a step."""
LOOKUP = 64
"""Rows of a look-up, one a bag."""
STEPS = 40
"""Of a block."""
MODES = ("alone", "pinned", "newest read", "version read")


class Reader:
    """Looks up rows on a thread of its own, and compares them.

    Args:
        table: Where.
        rows: [SLOTS, WIDTH]: what they must be; None: they are not compared.
        rate: Look-ups a second; 0: as many as there can be.
    """

    def __init__(self, table: Table, rows: torch.Tensor | None, rate: float) -> None:
        self._table, self._rows, self._rate = table, rows, rate
        self._stop = threading.Event()
        self.lookups = self.wrong = 0
        self._thread = threading.Thread(target=self._read)

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

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lookups", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=500.0, help="look-ups a second of a reader; 0: no limit")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=MODES[1:], help="beside alone")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--compute-ms", type=float, default=15.0, help="what a step computes besides")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="after so long what was seen by then is told")
    options = parser.parse_args()
    modes = [mode for mode in MODES if mode == "alone" or mode in options.modes]
    if "version read" not in modes:
        parser.error("--modes without 'version read' has no look-ups to count")
    torch.set_num_threads(1)
    times: dict[str, list[float]] = defaultdict(list)
    lookups = wrong = kept_bytes = 0
    everything = torch.arange(SLOTS)
    dense = torch.randn(256, 256)
    with mempool.local(shards=options.shards, timeout_s=120.0) as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=SLOTS, value_dim=WIDTH))

        def step() -> float:
            began_s = time.perf_counter()
            ids = torch.randint(0, SLOTS, (BAGS, PAIRS))
            loss = table.gather(ids, torch.rand(BAGS, PAIRS)).square().mean()
            while time.perf_counter() - began_s < options.compute_ms / 1e3:
                dense @ dense
            loss.backward()
            table.commit(lr=0.1)
            return time.perf_counter() - began_s

        for _ in range(10):
            step()
        ends_s = time.monotonic() + options.limit_s
        while lookups < options.lookups and time.monotonic() < ends_s:
            for mode in modes:
                seen = table.at() if mode in ("pinned", "version read") else None
                if mode in ("alone", "pinned"):
                    times[mode] += [step() for _ in range(STEPS)]
                else:
                    rows = table.rows(everything) if seen is not None else None
                    with Reader(seen or table, rows, options.rate) as reader:
                        times[mode] += [step() for _ in range(STEPS)]
                    if seen is not None:
                        lookups, wrong = lookups + reader.lookups, wrong + reader.wrong
                kept_bytes = max(kept_bytes, sum(shard.version_bytes for shard in pool.status().shards))
                if seen is not None:
                    seen.close()
    medians = {mode: statistics.median(times[mode]) for mode in modes}
    for mode, median_s in medians.items():
        print(
            f"{mode:14} {1e3 * median_s:8.2f} ms a step (median of {len(times[mode]):,}), "
            f"{median_s / medians['alone']:.3f} times as long as alone"
        )
    print(f"{lookups:,} look-ups of versions, {wrong} of them wrong; {kept_bytes / 2**20:.1f} MiB were kept at most")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
