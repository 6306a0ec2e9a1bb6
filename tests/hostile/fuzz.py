"""Mutated frames against every method of a shard and of the controller: alive, bounded, unchanged, never INTERNAL.

    python -m tests.hostile.fuzz --frames 100000 --seed 1

Each worker is a process with a target of its own, and takes a share of the methods. Prints a line per method, a summary
at the end, and ends with 1 if anything was found; what was found is printed with the frame that did it.
"""

import argparse
import asyncio
import math
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from mempool.checkpoint.stores.places import check_place
from mempool.errors import InvalidRequest
from mempool.kernels import warm_up
from mempool.wire.v1 import data_pb2, table_pb2
from tests.hostile.mutate import mutated
from tests.hostile.raw import METHODS, RawChannel, RawMethod
from tests.hostile.target import Target, resident_bytes
from tests.hostile.valid import GROUPED, GROUPED_KEYS, NUM_SLOTS, PLACE, VICTIM, WITNESS, Requests, tensor, view_of

BATCH = 1_000
SLOWEST_S = 5.0
IN_FLIGHT = 32
GROWTH_BYTES = 512 * 2**20
_SHARDS, _MAX_SHARDS = 2, 4096
_OF_PLACES = ("AttachTable", "WritePart", "Checkpoint", "Restore")


@dataclass
class Found:
    """What a method did with its frames."""

    method: RawMethod
    statuses: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def line(self, resident: int) -> str:
        told = " ".join(f"{name}={count}" for name, count in self.statuses.most_common())
        frames = sum(self.statuses.values())
        return (
            f"{self.method.label:28} {frames:8} frames  slowest {self.slowest_s:6.3f} s  "
            f"{resident / 2**20:7.0f} MiB  problems {len(self.problems)}  {told}"
        )


class Fuzz:
    """One run against a target of its own."""

    def __init__(self, target: Target, *, seed: int) -> None:
        self.target = target
        self._rng = random.Random(seed)
        self._seed = seed
        self._pool = RawChannel(target.address, key=target.token)
        self._shards = [RawChannel(address, key=target.token) for address in target.shards]
        keys = {"key": target.token, "controller_key": target.controller_key}
        self._controllers = [RawChannel(address, **keys) for address in target.shards]
        self._rows: list[bytes] = []
        self._baseline = 0

    async def open(self) -> None:
        """Make the tables, remember what the witness holds."""
        for name in (VICTIM, GROUPED):
            await view_of(self._pool, name)
        self._rows = await self._witness()
        self._baseline = resident_bytes(self.target.pid)

    async def close(self) -> None:
        for channel in (self._pool, *self._shards, *self._controllers):
            await channel.close()

    async def run(self, method: RawMethod, frames: int) -> Found:
        """So many frames to one method, in batches; after each the pool must be as it was."""
        found = Found(method)
        while frames > 0 and not found.problems:
            await self._batch(method, min(BATCH, frames), found)
            frames -= BATCH
            await self._check(found)
        return found

    async def _batch(self, method: RawMethod, frames: int, found: Found) -> None:
        of_groups = method.label == "MemoryService.Score" and self._rng.random() < 0.7
        if of_groups:  # dropped, it may be, by a frame
            await view_of(self._pool, GROUPED)
        view = await view_of(self._pool, GROUPED_KEYS if of_groups else VICTIM)
        shard = self._rng.choice(view.shards).shard
        requests = Requests(view, shard=shard, seed=self._rng.getrandbits(32))
        channel = self._channel(method, shard)
        made = self._frames(method, requests, frames)

        async def send_some() -> None:
            for frame in made:
                started_s = time.monotonic()
                status, _, message = await channel.send(method, frame)
                took_s = time.monotonic() - started_s
                found.statuses[status] += 1
                found.slowest_s = max(found.slowest_s, took_s)
                if status in ("INTERNAL", "UNKNOWN") or (status == "UNAVAILABLE" and not self.target.alive):
                    found.problems.append(f"{status}: {message[:300]}\n    frame {frame[:400].hex()}")
                elif took_s > SLOWEST_S:
                    found.problems.append(f"answered after {took_s:.1f} s ({status})\n    frame {frame[:400].hex()}")

        await asyncio.gather(*(send_some() for _ in range(IN_FLIGHT)))

    def _frames(self, method: RawMethod, requests: Requests, frames: int) -> Iterator[bytes]:
        while frames > 0:
            frame = mutated(requests.of(method.label), self._rng)
            if method.name == "Rescale" and _asks_for_shards(method, frame):
                continue
            if method.name == "CreateTable" and _is_large(method, frame):
                continue
            if method.name in _OF_PLACES and _leads_elsewhere(method, frame):
                continue
            frames -= 1
            yield frame

    def _channel(self, method: RawMethod, shard: int) -> RawChannel:
        if method.service == "PoolService":
            return self._pool
        if method.service == "ShardService" and method.name != "Status":
            return self._controllers[shard]
        return self._shards[shard]

    async def _check(self, found: Found) -> None:
        """Alive, bounded, and the witness bit for bit what it was."""
        if not self.target.alive:
            found.problems.append("the process died")
            return
        grown = resident_bytes(self.target.pid) - self._baseline
        if grown > GROWTH_BYTES:
            found.problems.append(f"resident memory grew by {grown / 2**20:.0f} MiB")
        view = await view_of(self._pool, VICTIM)
        for shard in {info.shard for info in view.shards}:
            thaw = Requests(view, shard=shard, seed=0).of("ShardService.Thaw").SerializeToString()
            await self._controllers[shard].send(METHODS["ShardService.Thaw"], thaw)
        if await self._witness() != self._rows:
            found.problems.append("a table that no frame named has changed")

    async def _witness(self) -> list[bytes]:
        view = await view_of(self._pool, WITNESS)
        rows = []
        for info in view.shards:
            request = _all_rows(view, info)
            status, reply, message = await self._shards[info.shard].send(
                METHODS["MemoryService.ReadRows"], request.SerializeToString()
            )
            if status != "OK":
                return [f"{status} {message}".encode()]
            rows.append(bytes(data_pb2.ReadRowsReply.FromString(reply).rows.inline))
        return rows


def _all_rows(view: table_pb2.TableView, info: table_pb2.ShardInfo) -> data_pb2.ReadRowsRequest:

    return data_pb2.ReadRowsRequest(
        envelope=Requests(view, shard=info.shard, seed=0).envelope(),
        array="values",
        ids=tensor(np.arange(NUM_SLOTS, dtype=np.int64)),
    )


def _asks_for_shards(method: RawMethod, frame: bytes) -> bool:
    """Whether a rescale would really be done: this process is no place for thousands of shards."""
    try:
        parsed = method.request.FromString(frame)
    except DecodeError:
        return False
    shards: int = parsed.shards  # type: ignore[attr-defined]
    return shards != _SHARDS and 0 < shards <= _MAX_SHARDS


def _is_large(method: RawMethod, frame: bytes) -> bool:
    """Whether a table may be made that takes much of what the shards have: memory would grow as it should."""
    try:
        schema = method.request.FromString(frame).schema  # type: ignore[attr-defined]
    except DecodeError:
        return False
    keys = schema.product_keys.heads * schema.product_keys.key_dim * math.isqrt(schema.num_slots)
    return 2**23 < schema.num_slots * schema.value_dim + keys < 2**31


def _leads_elsewhere(method: RawMethod, frame: bytes) -> bool:
    """Whether something would really be written or read, anywhere on this machine."""
    try:
        parsed: Any = method.request.FromString(frame)
        place = check_place(parsed.source.url if method.name == "AttachTable" else parsed.url)
    except (DecodeError, InvalidRequest):
        return False
    return place != PLACE or (method.name == "Checkpoint" and "nobody" not in parsed.tables)


async def fuzz(target: Target, *, frames: int, seed: int, labels: Sequence[str] = tuple(METHODS)) -> list[Found]:
    """These methods, one after the other."""
    run = Fuzz(target, seed=seed)
    await run.open()
    results = []
    for label in labels:
        started_s = time.monotonic()
        found = await run.run(METHODS[label], frames)
        results.append(found)
        resident = resident_bytes(target.pid) if target.alive else 0
        print(found.line(resident), f"{time.monotonic() - started_s:.0f} s")
        for problem in found.problems[:5]:
            print("  ", problem)
        sys.stdout.flush()
        if not target.alive:
            break
    await run.close()
    return results


@dataclass(frozen=True)
class Share:
    """What one worker found: frames, problems, the slowest answer, and its target's resident memory."""

    frames: int
    problems: int
    slowest_s: float
    before: int
    after: int


def work(labels: Sequence[str], *, frames: int, seed: int, log: Path | None) -> Share:
    """A worker's whole life: some methods against a target of its own."""
    with Target(shards=_SHARDS, token="fuzz", log=log) as target:
        before = resident_bytes(target.pid)
        results = asyncio.run(fuzz(target, frames=frames, seed=seed, labels=labels))
        return Share(
            frames=sum(sum(found.statuses.values()) for found in results),
            problems=sum(len(found.problems) for found in results) + (len(results) < len(labels)),
            slowest_s=max(found.slowest_s for found in results),
            before=before,
            after=resident_bytes(target.pid) if target.alive else 0,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000, help="of each method")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="methods whose label contains this")
    parser.add_argument("--workers", type=int, default=2, help="processes that send, each to a target of its own")
    parser.add_argument("--log", type=Path, help="where the targets' standard error goes, a file each: LOG.0, LOG.1")
    arguments = parser.parse_args()
    labels = [label for label in METHODS if arguments.only in label]
    if not labels:
        parser.error(f"no method's label contains {arguments.only!r}")
    print("compiling the CPU kernels, so that no answer waits for a compiler", flush=True)
    warm_up()
    started_s = time.monotonic()
    workers = min(arguments.workers, len(labels))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        sent = [
            pool.submit(
                work,
                labels[worker::workers],
                frames=arguments.frames,
                seed=arguments.seed * workers + worker,
                log=None if arguments.log is None else arguments.log.with_name(f"{arguments.log.name}.{worker}"),
            )
            for worker in range(workers)
        ]
        shares = [one.result() for one in sent]
    took_s = time.monotonic() - started_s
    frames, problems = sum(share.frames for share in shares), sum(share.problems for share in shares)
    memory = ", ".join(f"{share.before / 2**20:.0f} -> {share.after / 2**20:.0f}" for share in shares)
    print(
        f"{frames:,} frames to {len(labels)} methods, seed {arguments.seed}, {workers} workers: {problems} problems; "
        f"slowest answer {max(share.slowest_s for share in shares):.3f} s; resident before -> after {memory} MiB; "
        f"{took_s:.0f} s, {frames / took_s:,.0f} frames/s"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
