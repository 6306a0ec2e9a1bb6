"""Lives of shards on a disk of the tests: the same shards again, after a kill, a power cut, or an end in peace."""

import copy
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from fakefiles import FakeFiles

from mempool.shard import Engine
from mempool.shard.durable.store import Store
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, Hosted

CLOSE_S = 20.0


class Lives:
    """A disk, and shards that keep what they have on it.

    Attributes:
        files: The disk.
        engines: Of all lives that were begun, to be closed at the end.
    """

    def __init__(self, *, seed: int = 0, **storage: Any) -> None:
        self.files = FakeFiles(seed)
        self.engines: list[Engine] = []
        self._storage = storage

    def begin(self, before: Driver | None = None, *, shards: int = 1) -> Driver:
        """A life: new shards, with what the disk has. before: whose table it is."""
        shards = shards if before is None else len(before.hosted)
        mine: list[Engine] = []
        for shard in range(shards):
            store = Store("disk", pool="pool", pool_id="one", shard=shard, files=self.files, **self._storage)
            info = ShardInfo(shard=shard, address="", incarnation=store.incarnation)
            engine = Engine(info, peers=lambda source: mine[source.shard], store=store)
            mine.append(engine)
            self.engines.append(engine)
        for engine in mine:
            run(engine.recover(), timeout_s=CLOSE_S)
        driver = Driver([Hosted(host=engine, info=engine.info) for engine in mine], table_id=1)
        if before is not None:
            driver.table_id, driver.view = before.table_id, before.view
            if driver.view is not None:  # as a controller tells it
                driver.view = replace(driver.view, shards=tuple(engine.info for engine in mine))
        return driver

    def after_power_cut(self, seed: int) -> "Lives":
        """The same disk where the power is cut now: nobody writes at the moment."""
        other = Lives(**self._storage)
        other.files = self._copied()
        other.files.random.seed(f"{seed}/cut")
        other.files.power_cut()
        return other

    def after_kill(self) -> "Lives":
        """The same disk where the processes are killed now."""
        other = Lives(**self._storage)
        other.files = self._copied()
        other.files.killed()
        return other

    def _copied(self) -> FakeFiles:
        """The disk, once nobody is at it, and as it is at one moment: what it has refused may be tried again."""
        end_s = time.monotonic() + CLOSE_S
        while True:
            assert time.monotonic() < end_s, "a disk that is never left alone"
            done = len(self.files.operations)
            if not any(_is_at_it(engine) for engine in self.engines):
                with suppress(RuntimeError):  # a file came or went meanwhile
                    copied = copy.deepcopy(self.files)
                    if len(self.files.operations) == done:
                        return copied
            time.sleep(0.005)

    def close(self) -> None:
        """End all lives, whatever their disk says."""
        for engine in self.engines:
            try:
                run(engine.close(), timeout_s=CLOSE_S)
            except Exception as error:
                print(f"ended with {error}")


def _is_at_it(engine: Engine) -> bool:
    """Whether a snapshot is being taken, or what it makes needless removed."""
    taking, store = engine._taking, engine._store
    assert taking is not None
    assert store is not None
    return taking._task is not None or not (store._removed is None or store._removed.done())


def hold(driver: Driver, step: int, *, seed: int | None = None) -> None:
    """Two updates of a step."""
    for sequence in (0, 1):
        bags = make_bags((step if seed is None else seed) * 2 + sequence, num_slots=49)
        grads = torch.randn(bags.num_bags, 10, generator=torch.Generator().manual_seed(step * 2 + sequence))
        driver.update(step, sequence, grads, bags=bags)


def step(driver: Driver, number: int) -> None:
    """A whole step; every third is clipped, which keeps its sums from Prepare to Commit."""
    hold(driver, number)
    if len(driver.owners) == 1 and number % 2:
        driver.commit(number, [0, 1], lr=0.1 / number, one_phase=True)
        return
    driver.prepare(number, [0, 1], want_norm=number % 3 == 0)
    driver.commit(number, [0, 1], lr=0.1 / number, grad_scale=0.5)


__all__ = ["Lives", "hold", "step"]
