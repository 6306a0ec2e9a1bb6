"""A controller over engines that can be made to fail, and a client of it."""

from collections.abc import Awaitable, Callable
from typing import Any

import torch

import mempool
from mempool import errors
from mempool.client import Pool
from mempool.controller import Controller
from mempool.shard import Engine
from mempool.types import ShardHost, ShardInfo, TableView
from mempool.wire.channels.loop import run

CALL_S = 60.0


class Faulty:
    """A shard whose calls can be made to fail: ``faults`` maps a method to what is done before it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.info = engine.info
        self.faults: dict[str, Callable[[], Awaitable[None]]] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._engine, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            if name in self.faults:
                await self.faults[name]()
            return await method(*arguments, **named)

        return call


class Fleet:
    """Launcher and dialer of faulty engines."""

    def __init__(self) -> None:
        self.hosts: dict[int, Faulty] = {}
        self.refuse: set[int] = set()
        self.incarnation = 0
        self.room = 1000
        self.waits_for = ""
        self.memory_bytes: int | None = None
        self.wanted = 0

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:  # noqa: ARG002
        if shard in self.refuse:
            raise errors.ShardUnavailable(f"shard {shard} does not fit")
        self.incarnation += 1
        info = ShardInfo(shard=shard, address="", incarnation=self.incarnation)
        self.hosts[shard] = Faulty(Engine(info, peers=self.dial, memory_bytes=self.memory_bytes))
        return info

    async def require_room(self, shards: int) -> None:
        if shards > self.room:
            raise errors.ShardUnavailable(f"{shards} shards more do not fit: there is room for {self.room}")

    async def starting(self) -> str:
        return self.waits_for

    async def keep_wanted(self, shards: int) -> None:
        self.wanted = shards

    async def stop(self, info: ShardInfo) -> None:
        host = self.hosts.pop(info.shard, None)
        if host is not None:
            await host.close()

    def dial(self, info: ShardInfo) -> ShardHost:
        if info.shard not in self.hosts:
            raise errors.ShardUnavailable(f"shard {info.shard} is gone")
        return self.hosts[info.shard]  # type: ignore[return-value]  # all methods come through __getattr__


class Bench:
    """A controller over a fleet, and a client of it."""

    def __init__(
        self, shards: int, *, round_bytes: int = 64 * 2**20, memory_bytes: int | None = None, **options: Any
    ) -> None:
        self.fleet = Fleet()
        self.fleet.memory_bytes = memory_bytes
        self.controller = Controller(
            "bench", launcher=self.fleet, dial=self.fleet.dial, round_bytes=round_bytes, **options
        )
        run(self.controller.open(shards), timeout_s=CALL_S)
        self._pools: list[Pool] = []
        self.pool = self.pool_of(self.controller)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in reversed(self._pools):
            pool.close()

    def pool_of(self, controller: Controller, *, timeout_s: float = 20.0) -> Pool:
        """A client of a controller over these shards, closed with the bench."""
        self._pools.append(Pool(controller, self.fleet.dial, name="bench", timeout_s=timeout_s))
        return self._pools[-1]

    def heir(self) -> Controller:
        """Another controller over these shards, which knows nothing yet."""
        return Controller("bench", launcher=self.fleet, dial=self.fleet.dial)

    def view(self, name: str) -> TableView:
        return run(self.controller.table(name), timeout_s=CALL_S)


def config(**changes: Any) -> mempool.TableConfig:
    fields: dict[str, Any] = {"name": "facts", "num_slots": 600, "value_dim": 128, "page_slots": 32}
    return mempool.TableConfig(**{**fields, **changes})


def fail(error: Exception) -> Callable[[], Awaitable[None]]:
    async def raise_it() -> None:
        raise error

    return raise_it


def train(table: mempool.Table, seed: int) -> None:
    """One committed step on random slots."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(table.num_slots, (8, 5), generator=generator)
    weights = torch.rand(8, 5, generator=generator)
    table.gather(ids, weights).square().sum().backward()
    table.commit(lr=0.1)
