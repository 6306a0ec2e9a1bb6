"""Faults of a pool with storage while a trainer steps on it, and what came of them: a test and a driver share it.

In the end the pool is, bit for bit, what the acknowledged steps make of one that nobody disturbs.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from mempool.checkpoint import looking
from mempool.checkpoint.stores import open_store
from mempool.errors import MempoolError
from tests.integration.faults import WEIGHTS, Faults, SmallDisk, WorkerNodes
from tests.integration.pools import RayPool, wait_for
from tests.integration.trainers import DEADLINE_S, Trainers


@dataclass
class Survived:
    """What happened, the steps that were acknowledged, rescales and checkpoints that ended, what was said of others."""

    faults: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    trainers: int = 1
    longest_s: float = 0.0
    rescales: int = 0
    checkpoints: int = 0
    refusals: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} x {what}" for what, count in sorted(self.faults.items()))
        return (
            f"{counts}; {self.steps} steps acknowledged = applied, by {self.trainers} trainers, the longest wait "
            f"{self.longest_s:.1f} s; {self.rescales} rescales, {self.checkpoints} checkpoints, {len(self.refusals)} "
            "that did not end"
        )


class Changes:
    """Asks for another number of shards, or a checkpoint, again and again, whatever becomes of it, until it is told to
    end.

    Args:
        place: Of checkpoints.
    """

    def __init__(self, pool: RayPool, survived: Survived, *, seed: int, place: Path) -> None:
        self._pool, self._survived, self._dice, self._place = pool, survived, random.Random(seed), place
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._change)
        self._thread.start()

    def _change(self) -> None:
        while not self._enough.is_set():
            if not self._done(self._dice.choice((1, 2, 3, None))):
                self._enough.wait(0.5)

    def end(self) -> None:
        """And a last one of both must succeed, once all is up again; the newest checkpoint is whole."""
        self._enough.set()
        self._thread.join(2 * DEADLINE_S)
        assert not self._thread.is_alive()
        wait_for("a rescale that nothing disturbs", lambda: self._done(2))
        wait_for("a checkpoint that nothing disturbs", lambda: self._done(None))
        store = open_store(self._place)
        newest = looking.checkpoints(store)[-1]["name"]
        damages = looking.verify(store, newest).damages
        assert not damages, f"checkpoint {newest} is damaged: {damages}"

    def _done(self, shards: int | None) -> bool:
        """shards: None: a checkpoint."""
        try:
            with self._pool.connect(timeout_s=DEADLINE_S) as client:
                if shards is None:
                    client.checkpoint(self._place, keep=2)
                else:
                    client.rescale(shards)
        except MempoolError as error:
            self._survived.refusals.append(error.message)
            return False
        self._survived.rescales += shards is not None
        self._survived.checkpoints += shards is None
        return True


def disturb(
    pool: RayPool,
    *,
    storage: Path,
    faults: int,
    seed: int,
    within_s: float,
    kinds: Collection[str] = tuple(WEIGHTS),
    disk: SmallDisk | None = None,
    nodes: WorkerNodes | None = None,
    changes: Path | None = None,
    ends_s: float = float("inf"),
    say: Callable[[str], None] = lambda _: None,
) -> Survived:
    """Let so many faults happen, one after the other, each once training has gone on after the one before.

    Args:
        storage, kinds, disk, nodes: As ``Faults`` has them.
        within_s: The next one comes within so many seconds from when training goes on.
        changes: Beside that the number of shards is changed all the time, and checkpoints are taken, there.
        ends_s: Nothing happens any more from then on, on the monotonic clock.
        say: Told each.

    Raises:
        AssertionError: Training failed, did not go on, or its tables are not bit for bit the undisturbed ones.
    """
    dice, survived = random.Random(seed), Survived()
    trainers = Trainers(pool, proxied=True)
    happening = Faults(pool, trainers, storage=storage, dice=dice, kinds=kinds, disk=disk, nodes=nodes)
    survived.faults = happening.counts
    beside = None if changes is None else Changes(pool, survived, seed=seed, place=changes)
    try:
        trainers.wait_for_steps(2)
        number = 0
        while number < faults and time.monotonic() < ends_s:
            number += 1
            time.sleep(dice.uniform(0.0, within_s))
            say(f"{number}, behind step {trainers.acknowledged}: {happening.happen()}")
            trainers.wait_for_steps(2)
        trainers.end()
    finally:
        trainers.close()
        if beside is not None:
            beside.end()
    survived.steps, survived.trainers = trainers.acknowledged, len(trainers.taken_over)
    survived.longest_s = trainers.longest_s
    trainers.require_undisturbed()
    return survived
