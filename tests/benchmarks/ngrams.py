"""What an n-gram look-up adds to a training step, with and without prefetch, beside dense work that is as long.

``python -m tests.benchmarks.ngrams --rounds 40 --grpc`` trains a table of an embedded pool, or over gRPC. A step is a
wait for dense work on another device, the look-up, the layer forward and backward, and the commit; by turns with the
look-up after that work, and started before it, so that both see the same noise. The wait is as long as the look-up
takes in such a step. Prints medians as JSON: what the look-up adds to that wait as time, and as processor time of the
trainer's thread, which other processes cannot disturb.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import mempool
from mempool.client import Pool
from mempool.nn import NgramLookup, NgramMemory, NgramRows, Ngrams, PoolOptimizer
from tests.unit.client.grpc_pool import GrpcPoolHere

DIM, VOCABULARY = 256, 50_257
NGRAMS = Ngrams(orders=(2, 3), heads=8, slots=50_000)
MODES = ("asked", "prefetched")


@contextmanager
def opened(*, grpc: bool) -> Iterator[Pool]:
    if not grpc:
        with mempool.local(shards=1, device="cpu") as pool:
            yield pool
        return
    here = GrpcPoolHere(shards=1)
    try:
        with mempool.connect(here.address) as pool:
            yield pool
    finally:
        here.close()


def measure(rounds: int, shape: tuple[int, int], *, grpc: bool) -> dict[str, object]:
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    zipf = 1.0 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    with opened(grpc=grpc) as pool:
        table = pool.create_table(NGRAMS.table_config("ngrams", head_dim=32, lr=1e-3))
        lookup = NgramLookup(table, NGRAMS, vocab_size=VOCABULARY)
        memory, optimizer = NgramMemory(DIM, lookup), PoolOptimizer(table)
        hidden = torch.randn(*shape, DIM, generator=random)

        def tokens() -> Tensor:
            drawn = torch.multinomial(zipf, shape[0] * shape[1], replacement=True, generator=random)
            return drawn.view(shape)

        def step(rows: NgramRows) -> None:
            memory(hidden, rows).square().mean().backward()
            optimizer.step()

        def alone_s() -> float:
            ids = tokens()
            began_s = time.perf_counter()
            rows = lookup(ids)
            spent_s = time.perf_counter() - began_s
            step(rows)
            return spent_s

        work_s = statistics.median(alone_s() for _ in range(20))
        added_s: dict[str, list[float]] = {mode: [] for mode in MODES}
        processor_s: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode in MODES:
                ids = tokens()
                began_s, processor_began_s = time.perf_counter(), time.thread_time()
                if mode == "prefetched":
                    memory.prefetch(ids)
                waited_s = time.perf_counter()
                time.sleep(work_s)
                waited_s = time.perf_counter() - waited_s
                rows = lookup(ids)
                added_s[mode].append(time.perf_counter() - began_s - waited_s)
                processor_s[mode].append(time.thread_time() - processor_began_s)
                step(rows)
    added = {mode: statistics.median(times) * 1e3 for mode, times in added_s.items()}
    return {
        "pool": "grpc" if grpc else "embedded",
        "tokens": shape[0] * shape[1],
        "rows_per_token": NGRAMS.columns,
        "dense_work_ms": work_s * 1e3,
        "added_ms": added,
        "trainers_thread_ms": {mode: statistics.median(times) * 1e3 for mode, times in processor_s.items()},
        "prefetched_of_asked": added["prefetched"] / added["asked"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--grpc", action="store_true")
    asked = parser.parse_args()
    print(json.dumps(measure(asked.rounds, (asked.batch, asked.length), grpc=asked.grpc), indent=2))


if __name__ == "__main__":
    main()
