"""The contract every ``ShardHost`` fulfils, run against each kind of it.

To add a kind: write an async context manager ``factory(num_shards)`` that yields ``list[Hosted]``, shards 0, 1, ... of
one pool that can reach each other for pull_pages, and put it into KINDS. It is entered once a session, on the process's
IO loop; every test has its own table in it. A kind whose software is missing leaves itself out by ``skip_reason``.
"""

import asyncio
import importlib.util
import itertools
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mempool.client import GrpcPool, GrpcShard
from mempool.shard import Engine
from mempool.types import ShardHost, ShardInfo
from mempool.wire.channels.grpc_channel import GrpcChannels
from mempool.wire.channels.loop import run
from mempool.wire.lines.line import can_be_served, supported
from tests.integration.pools import RayPool
from tests.support.faulty import FaultyShard
from tests.support.kinds import leave_out_repeats, parameter
from tests.support.serving import require_line, served_pool

from .driver import Driver, Hosted

NUM_SHARDS = 3
_CONTROLLER_KEY = "of the contract suite"


@asynccontextmanager
async def engines(num_shards: int) -> AsyncIterator[list[Hosted]]:
    """Engines that call each other directly: the first bare, the others as tests of the client have them, while no
    fault is asked for."""
    hosts: dict[int, ShardHost] = {}
    infos = [ShardInfo(shard=shard, address="", incarnation=shard + 1) for shard in range(num_shards)]
    for info in infos:
        hosts[info.shard] = Engine(info, peers=lambda source: hosts[source.shard])
    try:
        yield [
            Hosted(host=FaultyShard(hosts[info.shard], info) if info.shard else hosts[info.shard], info=info)
            for info in infos
        ]
    finally:
        for host in hosts.values():
            await host.close()


@asynccontextmanager
async def grpc_hosts(num_shards: int) -> AsyncIterator[list[Hosted]]:
    """Engines behind real gRPC servers; they reach each other by gRPC too."""
    async with served_pool(num_shards) as pool:
        infos = [pool.shards[shard].info for shard in range(num_shards)]
        yield [Hosted(host=pool.dial(info), info=info) for info in infos]


@asynccontextmanager
async def near_hosts(num_shards: int) -> AsyncIterator[list[Hosted]]:
    """The same, asked through shared memory by this process; they reach each other so, too."""
    async with served_pool(num_shards, near=True) as pool:
        infos = [pool.shards[shard].info for shard in range(num_shards)]
        for info in infos:
            await require_line(pool.dial(info), info, near=True)
        yield [Hosted(host=pool.dial(info), info=info) for info in infos]


@asynccontextmanager
async def tcp_hosts(num_shards: int) -> AsyncIterator[list[Hosted]]:
    """The same by lines over TCP, as from another host."""
    async with served_pool(num_shards, tcp=True) as pool:
        infos = [pool.shards[shard].info for shard in range(num_shards)]
        for info in infos:
            await require_line(pool.dial(info), info, near=False)
        yield [Hosted(host=pool.dial(info), info=info) for info in infos]


@asynccontextmanager
async def ray_hosts(num_shards: int) -> AsyncIterator[list[Hosted]]:
    """Shards of a pool that `mempool up` started, with a Ray of its own; their controller is left idle."""
    with tempfile.TemporaryDirectory() as folder:
        pool = RayPool(Path(folder), name="contract", shards=num_shards, ray_address="local")
        await asyncio.to_thread(pool.up_with_key, _CONTROLLER_KEY)
        try:
            channels = GrpcChannels(controller_key=_CONTROLLER_KEY)
            front = GrpcPool([pool.address], channels)
            infos = [shard.info for shard in (await front.status()).shards]
            await front.close()
            hosts = [GrpcShard(info, channels(info.address, shard=info.shard)) for info in infos]
            yield [Hosted(host=host, info=info) for host, info in zip(hosts, infos, strict=True)]
            for host in hosts:
                await host.close()
        finally:
            await asyncio.to_thread(pool.down)


def _no_ray() -> str | None:
    return None if importlib.util.find_spec("ray") else "Ray is not installed"


@dataclass(frozen=True)
class Kind:
    """A kind of host. skip_reason: said where it cannot run here; None: it can."""

    factory: Callable[[int], AbstractAsyncContextManager[list[Hosted]]]
    skip_reason: Callable[[], str | None] = lambda: None


KINDS: dict[str, Kind] = {
    "engine": Kind(engines),
    "grpc": Kind(grpc_hosts),
    "near": Kind(near_hosts, skip_reason=lambda: None if supported() else "this system has no such memory"),
    "tcp": Kind(tcp_hosts, skip_reason=lambda: None if can_be_served() else "this system serves no lines"),
    "ray": Kind(ray_hosts, skip_reason=_no_ray),
}

LINE_MODULES = {
    "near": ("test_gather", "test_refusals", "test_rows", "test_training"),
    "tcp": ("test_gather", "test_rows"),
}
"""What kinds that differ from "grpc" by their transport alone are run against: large bodies, small ones, refusals."""

_ONCE = ("near", "tcp", "ray")
"""Kinds on which each test runs once, whatever cases it has: they are the shards and the messages of "grpc"."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_left_out(item: pytest.Item) -> bool:
        modules = LINE_MODULES.get(parameter(item, "driver"))
        return modules is not None and item.path.stem not in modules

    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item)]
    leave_out_repeats(config, items, lambda item: kind if (kind := parameter(item, "driver")) in _ONCE else "")


_table_ids = itertools.count(1, 16)  # a test may drop its table and make the next


class _Opened:
    """The kinds opened so far in this session."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self.hosted: dict[str, list[Hosted]] = {}

    def get(self, name: str) -> list[Hosted]:
        if name not in self.hosted:
            self.hosted[name] = run(self.stack.enter_async_context(KINDS[name].factory(NUM_SHARDS)), timeout_s=240)
        return self.hosted[name]


@pytest.fixture(scope="session")
def opened() -> Iterator[_Opened]:
    opened = _Opened()
    yield opened
    run(opened.stack.aclose(), timeout_s=120)


@pytest.fixture(params=list(KINDS))
def driver(request: pytest.FixtureRequest, opened: _Opened) -> Iterator[Driver]:
    """Drives one table on the shards of each kind; the table is dropped afterwards."""
    reason = KINDS[request.param].skip_reason()
    if reason is not None:
        pytest.skip(reason)
    driver = Driver(opened.get(request.param), table_id=next(_table_ids))
    yield driver
    driver.drop()
