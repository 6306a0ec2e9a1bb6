"""What `tests.hostile.thousand_steps` does to a pool while trainers step on it, one process after the other."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

from mempool.errors import MempoolError
from tests.integration.pools import RayPool, descendants, listener, parent, port_of, wait_for
from tests.integration.trainers import DEADLINE_S, Trainers

STEPS = 1000
KILLS = ("shard",) * 4 + ("controller",) * 3 + ("trainer",) * 3
RESCALES = (4, 3)
WITHIN_S = 0.5
"""From when a step is acknowledged to what is done behind it."""


class Rescale:
    """Asks for a number of shards until the pool has it, whatever dies meanwhile."""

    def __init__(self, pool: RayPool, shards: int) -> None:
        self._pool, self.shards, self.calls = pool, shards, 0
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._enough.is_set():
            self.calls += 1
            try:
                with self._pool.connect(timeout_s=DEADLINE_S) as client:
                    client.rescale(self.shards)
                return
            except MempoolError:
                self._enough.wait(0.2)

    def give_up(self) -> None:
        """It is not asked for any more."""
        self._enough.set()

    def end(self) -> None:
        """Wait for it."""
        self._thread.join(2 * DEADLINE_S)
        self.give_up()
        assert not self._thread.is_alive(), f"a rescale to {self.shards} shards that does not end"


class Scenario:
    """One run.

    Args:
        pool: It is up, with three shards, and has no tables.
        steps: How many are taken; at least 60.
        seed: Of what is done when.
    """

    def __init__(self, pool: RayPool, *, steps: int, seed: int) -> None:
        self._pool, self._steps, self._dice = pool, steps, random.Random(seed)
        self._began_s = time.monotonic()
        self._rescales: list[Rescale] = []
        self._sizes = list(RESCALES)
        self._done: Counter[str] = Counter()
        self._trainers = Trainers(pool, last=steps)

    def run(self) -> str:
        """Until the last step; what came of it. Raises AssertionError where anything failed, or differs."""
        try:
            for step, what in self._plan():
                self._trainers.wait_for_step(step)
                time.sleep(self._dice.uniform(0.0, WITHIN_S))
                self._say(f"kill -9 of the {what}" if what in KILLS else what)
                self._done[what] += 1
                self._actions[what]()
            self._trainers.end()
            for rescale in self._rescales:
                rescale.end()
        finally:
            self._trainers.close()
            for rescale in self._rescales:
                rescale.give_up()
        self._say("the last step; the same steps are taken undisturbed")
        self._trainers.require_undisturbed()
        kills = sum(self._done[what] for what in set(KILLS))
        return (
            f"{self._steps} steps acknowledged = applied, at every owner; {kills} kills, {len(self._rescales)} "
            f"rescales (in {[rescale.calls for rescale in self._rescales]} calls), {self._done['power cut']} power "
            f"cut; trainers found the pool at {self._trainers.taken_over}; longest wait "
            f"{self._trainers.longest_s:.1f} s"
        )

    def _plan(self) -> list[tuple[int, str]]:
        """What is done behind which step, in order. Something is done to each rescale as it runs."""
        what = [*KILLS, *(["rescale"] * len(RESCALES)), "power cut"]
        while True:
            self._dice.shuffle(what)
            if all(what[place + 1 : place + 2] not in ([], ["rescale"]) for place in _places(what, "rescale")):
                break
        when = sorted(self._dice.sample(range(10, self._steps - 10), len(what)))
        for place in _places(what, "rescale"):
            when[place + 1] = when[place]
        return list(zip(when, what, strict=True))

    @property
    def _actions(self) -> dict[str, Callable[[], None]]:
        return {
            "shard": self._kill_shard,
            "controller": lambda: _kill(wait_for("the controller", lambda: listener(self._pool.port))),
            "trainer": self._replace_trainer,
            "rescale": self._rescale,
            "power cut": self._cut_power,
        }

    def _kill_shard(self) -> None:
        _kill(self._dice.choice(wait_for("a shard", lambda: shard_pids(self._pool))))

    def _replace_trainer(self) -> None:
        self._trainers.kill()
        self._trainers.begin()

    def _rescale(self) -> None:
        for before in self._rescales:
            before.end()
        self._say(f"to {self._sizes[0]} shards, until it is done")
        self._rescales.append(Rescale(self._pool, self._sizes.pop(0)))

    def _cut_power(self) -> None:
        """All that runs of the pool, its trainer and its Ray dies at once; then `mempool up -f`."""
        top = parent(parent(wait_for("the controller", lambda: listener(self._pool.port))))
        self._trainers.process.kill()
        kill_all(top)
        self._trainers.close()
        self._say(*(line for line in self._pool.up().out.splitlines() if "brought back" in line))
        self._trainers.begin()

    def _say(self, *lines: str) -> None:
        for line in lines:
            at_s = time.monotonic() - self._began_s
            print(f"{at_s:6.1f} s, behind step {self._trainers.acknowledged}: {line}", flush=True)


def shard_pids(pool: RayPool) -> list[int]:
    """The processes of a pool's shards that serve."""
    with pool.connect(timeout_s=DEADLINE_S) as client:
        shards = [port_of(shard.info) for shard in client.status().shards if shard.info.address]
    return [pid for port in shards if (pid := listener(port)) is not None]


def kill_all(top: int) -> None:
    """SIGKILL to a process and all below it, at once."""
    doomed = descendants(top)
    for pid in doomed:
        _kill(pid)
    wait_for("them to end", lambda: not any(_runs(pid) for pid in doomed))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _places(what: list[str], wanted: str) -> list[int]:
    return [place for place, one in enumerate(what) if one == wanted]
