"""Controllers killed in the middle of rescales, while a trainer runs: what a test and a longer driver share."""

import random
import statistics
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from mempool.errors import MempoolError
from tests.integration.pools import RayPool, Training, kill_listener, listener, wait_for


@dataclass
class Outcome:
    """Of some kills.

    Attributes:
        deaths: How many rescales had their controller killed before they had ended by themselves.
        repeats: How often the same command had to be given again, by kill: once is enough.
        refusals: What was said where once was not.
        told: How often the new controller's status said that the pool was not yet as wanted.
        steps_s: Seconds of every training step.
    """

    deaths: int = 0
    repeats: list[int] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    told: int = 0
    steps_s: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        longest, usual = max(self.steps_s), statistics.median(self.steps_s)
        return (
            f"{len(self.repeats)} kills, {self.deaths} of them in a rescale, {self.told} that status told of; the same "
            f"command ended it after {max(self.repeats)} more call(s) at most; {len(self.steps_s)} steps, longest "
            f"{1e3 * longest:.0f} ms, usual {1e3 * usual:.0f} ms"
        )


def kill_controllers(pool: RayPool, training: Training, *, kills: int, seed: int, after_s: float) -> Outcome:
    """Rescale between 2, 4 and 3 shards, each time kill the controller within ``after_s``, and give the command
    again, as `mempool scale` and as `mempool apply` in turn.

    The trainer steps all the while. Raises what it raised, and AssertionError where a command does not end it.
    """
    chance, outcome = random.Random(seed), Outcome()
    enough, failures = threading.Event(), list[BaseException]()

    def train() -> None:
        try:
            while not enough.is_set():
                began_s = time.monotonic()
                training.step()
                outcome.steps_s.append(time.monotonic() - began_s)
        except BaseException as error:
            failures.append(error)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        wait_for("first steps", lambda: len(outcome.steps_s) >= 3 or failures)
        for number in range(kills):
            after = chance.uniform(0.0, after_s)
            _kill_in_a_rescale(pool, (4, 2, 3)[number % 3], after, outcome, apply=number % 2 == 1)
            assert not failures, failures
            steps = len(outcome.steps_s)
            wait_for("training to go on", lambda before=steps: len(outcome.steps_s) > before or failures)
    finally:
        enough.set()
        trainer.join(120)
    assert not trainer.is_alive()
    assert not failures, failures
    return outcome


def _kill_in_a_rescale(pool: RayPool, shards: int, after_s: float, outcome: Outcome, *, apply: bool) -> None:
    began, ended = threading.Event(), threading.Event()

    def rescale() -> None:
        with pool.connect() as client, suppress(MempoolError):
            client.rescale(shards, progress=lambda _: began.set())
        ended.set()

    watcher = threading.Thread(target=rescale)
    watcher.start()
    try:
        assert began.wait(60)
        ended.wait(after_s)
        outcome.deaths += not ended.is_set()
        killed = kill_listener(pool.port)
    finally:
        watcher.join(60)
    assert not watcher.is_alive()
    wait_for("the controller to come back", lambda: (listener(pool.port) or killed) != killed)
    found = pool.status()
    if found["wanted_shards"] == shards != len(found["shards"]):
        assert str(shards) in found["unfinished"], found
        outcome.told += 1
    for repeat in range(1, 4):
        if apply:
            again = pool.apply_shards(shards)
        else:
            again = pool.run_here("scale", "--shards", str(shards), "--pool", pool.name, expect=None)
        if again.code == 0:
            break
        outcome.refusals.append(again.err)
        assert repeat < 3, again.err
    outcome.repeats.append(repeat)
    status = pool.status()
    assert (len(status["shards"]), status["unfinished"], status["wanted_shards"]) == (shards, "", shards), status
    assert {shard["state"] for shard in status["shards"]} == {"ready"}
