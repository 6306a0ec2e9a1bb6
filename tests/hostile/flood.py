"""Clients that flood one shard, without a token and with one: its memory beside what its config says, and how long
another client waits beside what it waits when alone.

    python -m tests.hostile.flood --connections 64 --seconds 20 --memory 1GiB

The other client comes from another address, as from another host, where this machine has one (``--same-host``: from the
flooders' own, of whose connections it is then one more). The flooders' process is niced (19): they would be elsewhere,
and must not take the processors from the shard by the system's scheduler.
"""

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mempool.config.amounts import parse_bytes
from mempool.wire.v1 import data_pb2, tensor_pb2
from tests.hostile.raw import METHODS, RawChannel
from tests.hostile.target import Target, resident_bytes
from tests.hostile.valid import VALUE_DIM, Requests, tensor, view_of

TOKEN = "flood"
BODY_BYTES = 200 * 2**20
_BAGS = (400_000, 32_700, 32_700)
"""Of look-ups with huge replies: the first is above what an answer may have, the others are 4 MiB each."""
_KINDS = ("no token", "large bodies", "held updates", "huge replies", "tiny")


@dataclass(frozen=True)
class Waits:
    """Seconds that an ordinary client waited for small look-ups."""

    median_s: float
    p99_s: float
    calls: int
    failed: int


async def small_calls(address: str, pool: str, seconds: float) -> Waits:
    """Look-ups of 8 bags x 32 pairs, one after the other."""
    front, channel = RawChannel(pool, key=TOKEN), RawChannel(address, key=TOKEN)
    view = await view_of(front, "quiet")
    requests = Requests(view, shard=0, seed=1)
    frame = data_pb2.GatherRequest(
        envelope=requests.envelope(), lookup_id=1, **requests.bags(8, 32)
    ).SerializeToString()
    took, failed, end_s = [], 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        started_s = time.monotonic()
        status, _, _ = await channel.send(METHODS["MemoryService.Gather"], frame, timeout_s=20)
        took.append(time.monotonic() - started_s)
        failed += status != "OK"
        await asyncio.sleep(0.005)
    await channel.close()
    await front.close()
    return Waits(statistics.median(took), float(np.quantile(took, 0.99)), len(took), failed)


async def flood(kind: str, address: str, pool: str, *, connections: int, seconds: float) -> dict[str, int]:
    """``connections`` clients that do one kind of harm for so long; how their calls ended."""
    front = RawChannel(pool, key=TOKEN)
    view = await view_of(front, "loud")
    await front.close()
    ended: dict[str, int] = {}
    end_s = time.monotonic() + seconds
    numbers = itertools.count()
    large = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[BODY_BYTES // 4], inline=bytes(BODY_BYTES))
    large_frame = data_pb2.GatherRequest(weights=large).SerializeToString() if kind != "tiny" else b""

    async def one(seed: int) -> None:
        requests = Requests(view, shard=0, seed=seed)
        channel = RawChannel(address, key=None if kind == "no token" else TOKEN)
        while time.monotonic() < end_s:
            label, frame = _harm(kind, requests, large_frame, next(numbers))
            left_s = max(0.5, end_s - time.monotonic())
            status, _, _ = await channel.send(METHODS[label], frame, timeout_s=left_s)
            ended[status] = ended.get(status, 0) + 1
            await asyncio.sleep(0.001)
        await channel.close()

    await asyncio.gather(*(one(seed) for seed in range(connections)))
    return ended


def _harm(kind: str, requests: Requests, large: bytes, number: int) -> tuple[str, bytes]:
    if kind in ("no token", "large bodies"):
        return "MemoryService.Gather", large
    if kind == "tiny":
        frame = data_pb2.GatherRequest(envelope=requests.envelope(), lookup_id=number, **requests.bags(8, 32))
        return "MemoryService.Gather", frame.SerializeToString()
    if kind == "held updates":
        bags = 4_096
        update = data_pb2.UpdateRequest(
            envelope=requests.envelope(),
            step_id=requests.step(),
            sequence=number,
            lookup_id=number,
            blocks=requests.blocks,
            hold=True,
            grads=tensor(np.ones((bags, VALUE_DIM), np.float32)),
            **requests.bags(bags, 8),
        )
        return "MemoryService.Update", update.SerializeToString()
    empty = data_pb2.GatherRequest(
        envelope=requests.envelope(),
        lookup_id=number,
        ids=tensor(np.zeros(1, np.int64)),
        offsets=tensor(np.concatenate([np.zeros(_BAGS[number % len(_BAGS)], np.int64), [1]])),
    )
    return "MemoryService.Gather", empty.SerializeToString()


def own_address() -> str:
    """An address of this machine besides loopback: who connects to it comes from it. Loopback where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _child(kind: str, target: Target, connections: int, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.hostile.flood", "--be", kind, "--connections", str(connections)]
    command += ["--seconds", str(seconds), "--at", target.shards[0], target.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def attack(
    kind: str, *, connections: int, seconds: float, memory: str, client: str = "127.0.0.1", log: Path | None = None
) -> dict[str, object]:
    """One flood against a fresh target: peaks of memory, waits of another client, at ``client``, before and during."""
    bind = "127.0.0.1" if client == "127.0.0.1" else "0.0.0.0"
    with Target(shards=1, token=TOKEN, options=("--memory", memory, "--bind", bind), log=log) as target:
        shard = target.shards[0].replace("127.0.0.1", client)
        alone = asyncio.run(small_calls(shard, target.address, min(5.0, seconds)))
        base = resident_bytes(target.pid)
        flooding = _child(kind, target, connections, seconds)
        peak, watched = base, asyncio.Event()

        async def watch() -> Waits:
            nonlocal peak

            async def sample() -> None:
                nonlocal peak
                while not watched.is_set():
                    peak = max(peak, resident_bytes(target.pid) if target.alive else 0)
                    await asyncio.sleep(0.02)

            sampling = asyncio.create_task(sample())
            waits = await small_calls(shard, target.address, seconds)
            await asyncio.to_thread(flooding.wait, seconds + 120)
            watched.set()
            await sampling
            return waits

        beside = asyncio.run(watch())
        told, _ = flooding.communicate()
        time.sleep(5.0)
        return {
            "kind": kind,
            "memory": parse_bytes(memory),
            "alive": target.alive,
            "base": base,
            "peak": peak,
            "after": resident_bytes(target.pid) if target.alive else 0,
            "alone": alone,
            "beside": beside,
            "ended": json.loads(told) if told.strip() else {},
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--only", default="")
    parser.add_argument("--be", choices=_KINDS, help="be the flood itself")
    parser.add_argument("--at", nargs=2, metavar=("SHARD", "POOL"))
    parser.add_argument("--same-host", action="store_true", help="the other client comes from the flooders' address")
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    if arguments.be:
        os.nice(19)  # clients elsewhere would not take this host's processors from its shard
        shard, pool = arguments.at
        ended = asyncio.run(
            flood(arguments.be, shard, pool, connections=arguments.connections, seconds=arguments.seconds)
        )
        print(json.dumps(ended))
        return 0
    client = "127.0.0.1" if arguments.same_host else own_address()
    print(f"flooders from 127.0.0.1, niced 19; the other client from {client}", flush=True)
    bad = 0
    for kind in _KINDS:
        if arguments.only not in kind:
            continue
        seen = attack(
            kind,
            connections=arguments.connections,
            seconds=arguments.seconds,
            memory=arguments.memory,
            client=client,
            log=arguments.log,
        )
        alone, beside = seen["alone"], seen["beside"]
        assert isinstance(alone, Waits)
        assert isinstance(beside, Waits)
        mib = {name: int(str(seen[name])) / 2**20 for name in ("memory", "base", "peak", "after")}
        held = mib["peak"] - mib["base"]
        bad += not seen["alive"] or held > mib["memory"]
        print(
            f"{kind:13} shard.memory {mib['memory']:6.0f} MiB  resident {mib['base']:5.0f} -> peak {mib['peak']:6.0f} "
            f"(+{held:.0f}), 5 s after {mib['after']:6.0f} MiB  another client: median {alone.median_s * 1e3:.1f} -> "
            f"{beside.median_s * 1e3:.1f} ms, p99 {alone.p99_s * 1e3:.1f} -> {beside.p99_s * 1e3:.1f} ms "
            f"({beside.p99_s / alone.p99_s:.1f}x), failed {beside.failed} of {beside.calls}  {seen['ended']}",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
