"""Shards that keep what they have lose their power at named moments of a rescale: no page is lost, whoever it was."""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from fakefiles import FakeFiles

from mempool import errors
from mempool.client import Pool
from mempool.controller import Controller
from mempool.errors import MempoolError
from mempool.shard import Engine
from mempool.shard.durable.store import Store
from mempool.types import ShardHost, ShardInfo
from mempool.wire.channels.loop import run

from .bench import CALL_S, Faulty, Fleet, config, train

ALL = torch.arange(600)


class Mortal(Faulty):
    """A shard that can die, and be watched: ``after`` maps a method to what is done once it has ended, before its
    answer."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.dead = False
        self.after: dict[str, Callable[[], Awaitable[None]]] = {}

    def __getattr__(self, name: str) -> Any:
        call = super().__getattr__(name)

        async def mortal(*arguments: Any, **named: Any) -> Any:
            self._require_alive()
            answer = await call(*arguments, **named)
            if name in self.after:
                await self.after.pop(name)()
            self._require_alive()
            return answer

        return mortal

    def _require_alive(self) -> None:
        if self.dead:
            raise errors.ShardUnavailable(f"shard {self.info.shard} is dead", shard=self.info.shard)


class Kept(Fleet):
    """Shards with disks of the tests; what is not synced is gone where they die."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.files: dict[int, FakeFiles] = {}
        self.lives: list[Engine] = []
        self.deaths = 0

    async def start(self, shard: int, *, fresh: bool = False) -> ShardInfo:
        if fresh or shard not in self.files:
            self.files[shard] = FakeFiles(self.seed)
        store = Store("disk", pool="bench", pool_id="one", shard=shard, files=self.files[shard])
        self.incarnation = max(self.incarnation + 1, store.incarnation)
        info = ShardInfo(shard=shard, address="", incarnation=self.incarnation)
        engine = Engine(info, peers=self.dial, store=store)
        await engine.recover()
        self.lives.append(engine)
        self.hosts[shard] = Mortal(engine)
        return info

    async def stop(self, info: ShardInfo) -> None:
        self.hosts.pop(info.shard, None)

    def lose_power(self, *shards: int) -> None:
        """These are dead, at once."""
        for shard in shards:
            host = self.hosts.get(shard)
            if isinstance(host, Mortal) and not host.dead:
                host.dead = True
                self.deaths += 1
                left = copy.deepcopy(self.files[shard])
                left.random.seed(f"{self.seed}/{self.deaths}")
                left.power_cut()
                self.files[shard] = left

    async def close(self) -> None:
        for engine in self.lives:
            try:
                await engine.close()
            except MempoolError as error:
                print(f"ended with {error}")


class Line:
    """What a controller reaches shards by; cut, nothing of its arrives any more, as where it has died."""

    def __init__(self, fleet: Kept) -> None:
        self._fleet = fleet
        self.cut = False

    def dial(self, info: ShardInfo) -> ShardHost:
        return _Reached(self, self._fleet.dial(info))  # type: ignore[return-value]  # methods come through __getattr__


class _Reached:
    def __init__(self, line: Line, host: ShardHost) -> None:
        self._line, self._host = line, host

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **named: Any) -> Any:
            self._require_line()
            answer = await getattr(self._host, name)(*arguments, **named)
            self._require_line()
            return answer

        return call

    def _require_line(self) -> None:
        if self._line.cut:
            raise errors.ShardUnavailable("this controller is dead")


class Life:
    """A pool, its controllers one after the other, and what it should hold."""

    def __init__(self, shards: int, *, seed: int) -> None:
        self.fleet = Kept(seed)
        self._pools: list[Pool] = []
        self.pool = self._begin()
        run(self.controller.open(shards), timeout_s=CALL_S)

    def _begin(self) -> Pool:
        """A controller, and a client of it."""
        self.line = Line(self.fleet)
        self.controller = Controller("bench", launcher=self.fleet, dial=self.line.dial, round_bytes=60_000)
        self._pools.append(Pool(self.controller, self.fleet.dial, name="bench", timeout_s=CALL_S))
        return self._pools[-1]

    def bring_back(self) -> Pool:
        """Who is dead comes back, shards first, as on Ray."""
        dead = [shard for shard, host in self.fleet.hosts.items() if isinstance(host, Mortal) and host.dead]
        for shard in dead:
            info = run(self.fleet.start(shard), timeout_s=CALL_S)
            if not self.line.cut:
                run(self.controller.shard_restarted(info), timeout_s=CALL_S)
        if self.line.cut:
            infos = [host.info for _, host in sorted(self.fleet.hosts.items())]
            self.pool = self._begin()
            run(self.controller.adopt(infos, wanted=self.fleet.wanted), timeout_s=CALL_S)
        return self.pool

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        run(self.fleet.close(), timeout_s=CALL_S)


# After which call of which shard of a rescale (the destination, or the table's gate, which decides), and who dies then.
MOMENTS = [
    ("pull_pages", "dest", ("dest",)),
    ("pull_pages", "dest", ("dest", "source")),
    ("freeze", "gate", ("gate",)),
    ("export_pages", "source", ("source",)),
    ("set_view", "gate", ("dest",)),
    ("set_view", "gate", ("source",)),
    ("set_view", "gate", ("dest", "source")),
    ("set_view", "dest", ("dest",)),
    ("set_view", "source", ("source",)),
    ("set_view", "gate", ()),
    ("pull_pages", "dest", ()),
]


@pytest.mark.parametrize(("shards", "controller"), [(1, True), (2, False)])
def test_power_that_is_lost_in_a_rescale_loses_no_page(shards: int, controller: bool) -> None:
    after = 3 - shards
    part = dict(zip(("source", "dest"), (0, 1) if after == 2 else (1, 0), strict=True)) | {"gate": 0}
    expected = undisturbed(shards, after)
    for number, (method, where, who) in enumerate(MOMENTS):
        if not (who or controller):
            continue
        life = Life(shards, seed=number)
        try:
            table = life.pool.create_table(config(layout="rows"))
            for step in range(3):
                train(table, step)
            died = asyncio.Event()

            async def die(life: Life = life, who: tuple[str, ...] = who, died: asyncio.Event = died) -> None:
                died.set()
                life.fleet.lose_power(*(part[each] for each in who))
                life.line.cut = controller

            watch(life, part[where], method, die)
            with pytest.raises(MempoolError):
                life.pool.rescale(after)
            assert died.is_set(), (method, where)
            pool = life.bring_back()
            pool.rescale(after)
            status = pool.status()
            assert [len(status.shards), status.unfinished] == [after, ""], (method, where, who)
            table = pool.table("facts")
            assert torch.equal(table.rows(ALL), expected[0]), (method, where, who)
            train(table, 3)
            assert torch.equal(table.rows(ALL), expected[1]), (method, where, who)
        finally:
            life.close()


def watch(life: Life, shard: int, method: str, then: Callable[[], Awaitable[None]]) -> None:
    """Have that done once after a call of a shard, which may be yet to be started."""
    if shard in life.fleet.hosts:
        host = life.fleet.hosts[shard]
        assert isinstance(host, Mortal)
        host.after[method] = then
        return
    start = life.fleet.start

    async def started(number: int, *, fresh: bool = False) -> ShardInfo:
        info = await start(number, fresh=fresh)
        if number == shard:
            life.fleet.start = start  # type: ignore[method-assign]
            watch(life, shard, method, then)
        return info

    life.fleet.start = started  # type: ignore[method-assign]


def undisturbed(shards: int, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the table holds at the rescale, and a step later, where nobody dies."""
    life = Life(shards, seed=0)
    try:
        table = life.pool.create_table(config(layout="rows"))
        for step in range(3):
            train(table, step)
        life.pool.rescale(after)
        before = table.rows(ALL)
        train(table, 3)
        return before, table.rows(ALL)
    finally:
        life.close()
