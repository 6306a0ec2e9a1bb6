"""Clients that come and are killed, and calls that are refused: memory, descriptors and threads of the pool stay flat.

    python -m tests.hostile.soak --connects 10000 --refusals 1000

A killed client is a process that sends the bytes a real client sent on its connection, up to a random one, and then
kills itself with SIGKILL: ten thousand Pythons that import gRPC would take an hour.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mempool.wire.v1 import data_pb2
from tests.hostile.raw import METHODS, RawChannel
from tests.hostile.target import Target, descriptors, resident_bytes, threads
from tests.hostile.valid import BLOCK_DIM, Requests, tensor, view_of

TOKEN = "soak"
SETTLE_S = 15.0
REFUSED_BYTES = 60 * 2**20


@dataclass(frozen=True)
class Footprint:
    """What a process takes."""

    resident: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        return cls(resident_bytes(pid), descriptors(pid), threads(pid))

    def __str__(self) -> str:
        return f"{self.resident / 2**20:.0f} MiB, {self.descriptors} descriptors, {self.threads} threads"


class Recorder:
    """A port in front of another one that keeps what its client says; for one connection."""

    def __init__(self, host: str, port: int) -> None:
        self.said = bytearray()
        self._to = (host, port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> bytes:
        """What was said, once the client is gone."""
        self._thread.join(10)
        self._listening.close()
        return bytes(self.said)

    def _serve(self) -> None:
        client, _ = self._listening.accept()
        with client, socket.create_connection(self._to) as server:
            back = threading.Thread(target=self._pump, args=(server, client, None), daemon=True)
            back.start()
            self._pump(client, server, self.said)
            back.join(10)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, into: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if into is not None:
                    into += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


async def recorded(target: Target, *, steps: int = 20) -> bytes:
    """The bytes that a client sends on one connection in so many look-ups and updates."""
    host, port = target.shards[0].rsplit(":", 1)
    recorder = Recorder(host, int(port))
    front = RawChannel(target.address, key=TOKEN)
    view = await view_of(front, "soak")
    requests = Requests(view, shard=0, seed=3)
    channel = RawChannel(recorder.address, key=TOKEN)
    for step in range(1, steps + 1):
        gather = data_pb2.GatherRequest(
            envelope=requests.envelope(), lookup_id=step, remember=True, **requests.bags(32, 16)
        )
        grads = tensor(np.zeros((32, len(requests.blocks) * BLOCK_DIM), np.float32))
        update = data_pb2.UpdateRequest(
            envelope=requests.envelope(),
            step_id=data_pb2.StepId(group="soak", step=step),
            sequence=step,
            lookup_id=step,
            blocks=requests.blocks,
            hold=True,
            grads=grads,
        )
        for label, request in (("MemoryService.Gather", gather), ("MemoryService.Update", update)):
            status, _, message = await channel.send(METHODS[label], request.SerializeToString())
            assert status == "OK", message
    await channel.close()
    await front.close()
    said = await asyncio.to_thread(recorder.close)
    assert said
    return said


def _be_killed(address: tuple[str, int], said: bytes, rng: random.Random) -> None:
    """[CLIENT] Speak, wait a moment, die."""
    try:
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(said[: rng.randrange(len(said) + 1)])
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.02)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_clients(target: Target, said: bytes, connects: int, *, seed: int, at_once: int = 8) -> None:
    """So many clients, a few at a time, each killed at a random moment."""
    rng = random.Random(seed)
    host, port = target.shards[0].rsplit(":", 1)
    running: set[int] = set()
    for _ in range(connects):
        child_seed = rng.getrandbits(32)
        child = os.fork()
        if child == 0:
            _be_killed((host, int(port)), said, random.Random(child_seed))
        running.add(child)
        while len(running) >= at_once:
            ended, _ = os.waitpid(-1, 0)
            running.discard(ended)
    while running:
        ended, _ = os.waitpid(-1, 0)
        running.discard(ended)


async def refused_calls(target: Target, calls: int) -> dict[str, int]:
    """Look-ups of 60 MiB that were planned for another epoch; how they ended."""
    front = RawChannel(target.address, key=TOKEN)
    view = await view_of(front, "soak")
    requests = Requests(view, shard=0, seed=4)
    pairs = REFUSED_BYTES // 12
    envelope = requests.envelope()
    envelope.epoch += 7
    request = data_pb2.GatherRequest(
        envelope=envelope,
        lookup_id=1,
        ids=tensor(np.zeros(pairs, np.int64)),
        weights=tensor(np.zeros(pairs, np.float32)),
        offsets=tensor(np.array([0, pairs], np.int64)),
    )
    frame = request.SerializeToString()
    channel = RawChannel(target.shards[0], key=TOKEN)
    ended: dict[str, int] = {}
    for _ in range(calls):
        status, _, _ = await channel.send(METHODS["MemoryService.Gather"], frame)
        ended[status] = ended.get(status, 0) + 1
    await channel.close()
    await front.close()
    return ended


def settled(target: Target, *, resident: float = float("inf")) -> Footprint:
    """What it takes once it has come to rest: when that has not changed for a second, and is at most ``resident``
    bytes; after a while, as it is then. What leaks never goes."""
    ends_s, calm = time.monotonic() + SETTLE_S, 0
    found = Footprint.of(target.pid)
    while (calm < 4 or found.resident > resident) and time.monotonic() < ends_s:
        time.sleep(0.25)
        now = Footprint.of(target.pid)
        calm, found = (calm + 1 if now == found else 0), now
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connects", type=int, default=1_000)
    parser.add_argument("--refusals", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    bad = 0
    with Target(shards=1, token=TOKEN, log=arguments.log) as target:
        said = asyncio.run(recorded(target))
        killed_clients(target, said, max(50, arguments.connects // 10), seed=arguments.seed)
        before = settled(target)
        started_s = time.monotonic()
        killed_clients(target, said, arguments.connects, seed=arguments.seed + 1)
        took_s = time.monotonic() - started_s
        after = settled(target)
        bad += after.descriptors > before.descriptors + 5 or after.threads > before.threads + 2
        bad += after.resident > before.resident + 64 * 2**20
        print(f"{arguments.connects} clients killed in {took_s:.0f} s: {before} -> {after}")
    with Target(shards=1, token=TOKEN, options=("--no-collector",), log=arguments.log) as target:
        ended = asyncio.run(refused_calls(target, max(10, arguments.refusals // 20)))
        before = settled(target)
        started_s = time.monotonic()
        ended = asyncio.run(refused_calls(target, arguments.refusals))
        took_s = time.monotonic() - started_s
        after = settled(target)
        bad += after.resident > before.resident + 128 * 2**20 or after.threads > before.threads + 2
        print(
            f"{arguments.refusals} refused calls of {REFUSED_BYTES >> 20} MiB, no cyclic collector, in {took_s:.0f} s "
            f"({ended}): {before} -> {after}"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
