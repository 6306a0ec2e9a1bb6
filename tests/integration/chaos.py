"""Processes of a pool with storage killed at random moments, while a trainer steps: a test and a driver share it.

The trainer takes the same steps on a pool in this process, which nobody disturbs: both are the same in the end, bit
for bit.
"""

import os
import random
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field

import mempool
from mempool.errors import MempoolError
from tests.integration.pools import RayPool, listener, port_of, wait_for
from tests.support.durable_trainer import contents, differences, open_tables, train

NAMES = ("momentum", "adagrad", "adam", "dense")
DEADLINE_S = 120.0


@dataclass
class Survived:
    """What was killed, the seconds of every step, rescales that ended, and what was said of others."""

    kills: list[str] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    rescales: int = 0
    refusals: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.kills.count(what)} x {what}" for what in sorted(set(self.kills)))
        longest, usual = max(self.steps_s), statistics.median(self.steps_s)
        return (
            f"{len(self.kills)} kills ({counts}); {len(self.steps_s)} steps, longest {longest:.1f} s, usual "
            f"{1e3 * usual:.0f} ms; {self.rescales} rescales, {len(self.refusals)} that did not end"
        )


class Trainer:
    """Steps on a pool, and on one that nobody disturbs, until it is told to end."""

    def __init__(self, pool: mempool.Pool, survived: Survived) -> None:
        self._survived = survived
        self._twin = mempool.local()
        self._tables, self._twins = open_tables(pool, NAMES), open_tables(self._twin, NAMES)
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._train)
        self.failure: BaseException | None = None
        self._thread.start()

    def _train(self) -> None:
        try:
            while not self._enough.is_set():
                began_s, step = time.monotonic(), len(self._survived.steps_s) + 1
                train(self._tables, step)
                self._survived.steps_s.append(time.monotonic() - began_s)
                train(self._twins, step)
        except BaseException as error:
            self.failure = error

    def wait_for_steps(self, count: int) -> None:
        """Until so many more are done."""
        before = len(self._survived.steps_s)
        wait_for("training to go on", lambda: self.failure or len(self._survived.steps_s) >= before + count)
        assert self.failure is None, self.failure

    def end(self) -> list[str]:
        """In what the two pools differ then."""
        self._enough.set()
        self._thread.join(DEADLINE_S)
        try:
            assert not self._thread.is_alive()
            assert self.failure is None, self.failure
            return differences(contents(self._tables), contents(self._twins))
        finally:
            self._twin.close()


class Rescaler:
    """Asks for another number of shards again and again, whatever becomes of it, until it is told to end."""

    def __init__(self, pool: RayPool, survived: Survived, *, seed: int) -> None:
        self._pool, self._survived, self._dice = pool, survived, random.Random(seed)
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._rescale)
        self._thread.start()

    def _rescale(self) -> None:
        with self._pool.connect(timeout_s=DEADLINE_S) as client:
            while not self._enough.is_set():
                try:
                    client.rescale(self._dice.choice((1, 2, 3)))
                    self._survived.rescales += 1
                except MempoolError as error:
                    self._survived.refusals.append(error.message)
                    self._enough.wait(0.5)

    def end(self) -> None:
        """And a last one must succeed, once all is up again."""
        self._enough.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        wait_for("a rescale that nothing disturbs", self._done)

    def _done(self) -> bool:
        try:
            with self._pool.connect(timeout_s=DEADLINE_S) as client:
                client.rescale(2)
        except MempoolError as error:
            self._survived.refusals.append(error.message)
            return False
        return True


def disturb(
    pool: RayPool,
    *,
    kills: int,
    seed: int,
    within_s: float,
    rescales: bool = False,
    ends_s: float = float("inf"),
) -> Survived:
    """Kill a shard, the controller, both, or all of the pool's processes at once, so many times.

    Args:
        within_s: The next one comes within so many seconds from when training goes on.
        rescales: Beside that the number of shards is changed all the time.
        ends_s: Nothing is killed any more from then on, on the monotonic clock.

    Raises:
        AssertionError: Training failed, did not go on, or its tables are not bit for bit the undisturbed ones.
    """
    dice, survived = random.Random(seed), Survived()
    with pool.connect(timeout_s=DEADLINE_S) as client:
        trainer = Trainer(client, survived)
        rescaler = Rescaler(pool, survived, seed=seed) if rescales else None
        try:
            trainer.wait_for_steps(2)
            while len(survived.kills) < kills and time.monotonic() < ends_s:
                time.sleep(dice.uniform(0.0, within_s))
                survived.kills.append(_kill(pool, client, dice))
                trainer.wait_for_steps(2)
        finally:
            if rescaler is not None:
                rescaler.end()
            differing = trainer.end()
        assert not differing, f"after {survived.kills} these differ: {differing}"
        assert not any(table.lost_pages for shard in client.status().shards for table in shard.tables)
    return survived


def _kill(pool: RayPool, client: mempool.Pool, dice: random.Random) -> str:
    shards = [port_of(shard.info) for shard in client.status().shards if shard.info.address]
    what = dice.choices(["a shard", "the controller", "a shard and the controller", "all"], [6, 1, 2, 2])[0]
    ports = {
        "a shard": dice.sample(shards, 1),
        "the controller": [pool.port],
        "a shard and the controller": [*dice.sample(shards, 1), pool.port],
        "all": [*shards, pool.port],
    }[what]
    for pid in [pid for port in ports if (pid := listener(port)) is not None]:
        os.kill(pid, signal.SIGKILL)
    return what
