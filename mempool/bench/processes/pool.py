"""[SHARD] A pool in processes of its own, as Ray's actors have it but without Ray: the product's servers and channels.

The first shard is in the controller's process, each further one in a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mempool
from mempool.bench.processes.child import START_TIMEOUT_S, Child, Parent
from mempool.client.opening.remote import NEAR_VARIABLE
from mempool.config import TCP_LINES_VARIABLE

_CALL_TIMEOUT_S = 120.0
_SELF = "mempool.bench.processes.pool"
#: OpenMP's and Numba's, by which threads sleep, or spin, while they wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
#: The environment is the process's, and several of its threads may connect.
_CONNECTING = threading.Lock()


@dataclass(frozen=True)
class PoolProcess:
    """A pool that serves.

    Attributes:
        address: For ``mempool.connect``.
        pids: Of its processes.
    """

    address: str
    pids: Sequence[int]


@contextmanager
def pool_process(
    *, shards: int = 1, threads: int = 1, memory_bytes: int = 2**31, variables: dict[str, str] | None = None
) -> Iterator[PoolProcess]:
    """A pool on loopback until the block ends.

    Args:
        shards: How many.
        threads: Of each shard's kernels.
        memory_bytes: Of each shard (``shard.memory``).
        variables: Environment of its processes; as every shard has it if not given.

    Raises:
        ChildError: It does not start.
    """
    from mempool.rayhost.actors import shard_variables

    arguments = {"shards": shards, "threads": threads, "memory_bytes": memory_bytes}
    environment = shard_variables(threads) if variables is None else variables
    with Child(f"{_SELF}:serve", arguments, variables=environment, without=WAITING) as child:
        ready = child.hear()
        yield PoolProcess(ready["address"], [child.pid, *ready["pids"]])


@contextmanager
def connected(address: str, *, near: bool, tcp: bool = False) -> Iterator[mempool.Pool]:
    """A client of a pool, whose calls go by gRPC; near: through shared memory where they can; tcp: by lines over TCP,
    where they can, as those of other hosts do."""
    with _CONNECTING:
        wanted = {NEAR_VARIABLE: near, TCP_LINES_VARIABLE: tcp}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update({name: str(int(value)) for name, value in wanted.items()})
        try:
            pool = mempool.connect(address, timeout_s=_CALL_TIMEOUT_S)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    with pool:
        yield pool


def serve(parent: Parent, *, shards: int, threads: int, memory_bytes: int) -> None:
    """[SHARD] the controller and the first shard."""
    from mempool.controller import Controller
    from mempool.rayhost.keys import PoolKeys
    from mempool.rayhost.serving import ControllerServing
    from mempool.rayhost.shard_serving import ShardServing
    from mempool.types import ShardInfo
    from mempool.wire.channels import loop

    config = _config(threads, memory_bytes)
    keys = PoolKeys.of(config)
    children: list[Child] = []

    class Here:
        """The launcher of the controller."""

        async def require_room(self, shards: int) -> None:
            pass

        async def starting(self) -> str:
            return ""

        async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:  # noqa: ARG002
            if not shard:
                self.serving = ShardServing(config, shard=0, incarnation=1, node_ip="127.0.0.1", keys=keys)
                return await self.serving.start()
            arguments = {"shard": shard, "threads": threads, "memory_bytes": memory_bytes}
            child = Child(f"{_SELF}:serve_shard", arguments)
            children.append(child)
            child.say(keys.controller_key)  # not among the arguments, which every process of the host can read
            return ShardInfo(shard=shard, address=await asyncio.to_thread(child.hear), incarnation=1)

        async def keep_wanted(self, shards: int) -> None:
            pass

        async def stop(self, info: ShardInfo) -> None:
            if not info.shard:
                await self.serving.stop()

    async def start() -> str:
        serving = ControllerServing(config, node_ip="127.0.0.1", keys=keys)
        controller = Controller(config.pool.name, launcher=Here(), dial=serving.dial)
        await controller.open(shards)
        return await serving.start(controller)

    try:
        address = loop.run(start(), timeout_s=START_TIMEOUT_S)
        parent.say({"address": address, "pids": [child.pid for child in children]})
        parent.wait()
    finally:
        for child in children:
            child.close()


def serve_shard(parent: Parent, *, shard: int, threads: int, memory_bytes: int) -> None:
    """[SHARD] one that is not the first."""
    from mempool.rayhost.keys import PoolKeys
    from mempool.rayhost.shard_serving import ShardServing
    from mempool.wire.channels import loop

    keys = PoolKeys(token=None, controller_key=parent.hear())

    async def start() -> str:
        serving = ShardServing(
            _config(threads, memory_bytes), shard=shard, incarnation=1, node_ip="127.0.0.1", keys=keys
        )
        return (await serving.start()).address

    parent.say(loop.run(start(), timeout_s=START_TIMEOUT_S))
    parent.wait()


def _config(threads: int, memory_bytes: int) -> Any:
    from mempool.config import ClusterConfig, PoolConfig, ShardConfig

    pool = PoolConfig(name="bench", shards=1, port=0)
    return ClusterConfig(pool=pool, shard=ShardConfig(threads=threads, memory=f"{memory_bytes // 2**20}MiB"))
