"""Trainers that are cut off from a shard, and shards that stand still: what tests and longer drivers share."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from tests.integration.pools import RayPool, Training, listener, port_of, wait_for
from tests.integration.proxy import Proxy, cut_at

PATIENCE_S = 120.0
"""Deadline of the trainer's calls: it waits for what comes back."""


@dataclass(frozen=True)
class Silence:
    """What a silence did.

    Attributes:
        what: It.
        silent_s: How long it was.
        rescale_s: Seconds of the rescale that was asked for meanwhile; calls: how often.
        longest_s: Of the trainer's steps.
    """

    what: str
    silent_s: float
    rescale_s: float
    calls: int
    longest_s: float

    def __str__(self) -> str:
        return (
            f"{self.what} for {self.silent_s:.1f} s: the rescale took {self.rescale_s:.1f} s in {self.calls} call(s), "
            f"the longest step {self.longest_s:.1f} s; every step is there once"
        )


def cut_off(pool: RayPool, *, shard: int, method: str) -> Silence:
    """Cut a trainer off from one shard as it sends a message, for longer than its lease, while a rescale runs.

    The pool has three shards before and after. Raises AssertionError where a step is not there exactly once.
    """
    with pool.connect() as watcher, ExitStack() as stack:
        watcher.rescale(3)
        address = next(status.info.address for status in watcher.status().shards if status.info.shard == shard)
        proxy = stack.enter_context(closing(Proxy(address)))
        armed = stack.enter_context(cut_at({address: proxy}, method, proxy))
        client = stack.enter_context(pool.connect(timeout_s=PATIENCE_S))
        training = Training(client, "cut", layout="rows")
        with _trains(training) as steps_s:
            armed.set()
            wait_for("the cut", lambda: not armed.is_set())
            cut_s = time.monotonic()
            try:
                watcher.rescale(2)
                rescale_s = time.monotonic() - cut_s
                time.sleep(max(0.0, 2 * pool.trainer_lease_s - rescale_s))
            finally:
                silent_s = time.monotonic() - cut_s
                proxy.heal()
            healed = len(steps_s)
            wait_for("steps after it", lambda: len(steps_s) >= healed + 3)
        training.assert_exact(client)
        client.drop_table("cut")
        watcher.rescale(3)
    return Silence(f"cut off from shard {shard} at a {method}", silent_s, rescale_s, 1, max(steps_s))


def stopped_shard(pool: RayPool, *, for_s: float) -> Silence:
    """Stop a shard's process for so long while a trainer runs, and ask for a rescale meanwhile, until it succeeds."""
    with pool.connect() as watcher, pool.connect(timeout_s=PATIENCE_S) as client:
        watcher.rescale(3)
        training = Training(client, "stopped", layout="rows")
        pid = listener(port_of(next(s.info for s in watcher.status().shards if s.info.shard == 1)))
        assert pid is not None
        stopper = threading.Thread(target=_stop, args=(pid, for_s))
        with _trains(training) as steps_s:
            began_s, calls = time.monotonic(), 0
            stopper.start()
            try:
                time.sleep(min(1.0, for_s / 4))
                while True:
                    calls += 1
                    if pool.run_here("scale", "--shards", "2", "--pool", pool.name, expect=None).code == 0:
                        break
                    assert time.monotonic() < began_s + for_s + PATIENCE_S
                rescale_s = time.monotonic() - began_s
            finally:
                stopper.join(for_s + 10)
            woken = len(steps_s)
            wait_for("steps after it", lambda: len(steps_s) >= woken + 3)
        training.assert_exact(client)
        client.drop_table("stopped")
        watcher.rescale(3)
    return Silence("shard 1 stopped", for_s, rescale_s, calls, max(steps_s))


@contextmanager
def _trains(training: Training) -> Iterator[list[float]]:
    """Steps on a thread, and how long each took. Raises what the trainer raised."""
    enough, steps_s, failures = threading.Event(), list[float](), list[BaseException]()

    def train() -> None:
        try:
            while not enough.is_set():
                began_s = time.monotonic()
                training.step()
                steps_s.append(time.monotonic() - began_s)
        except BaseException as error:
            failures.append(error)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        wait_for("first steps", lambda: len(steps_s) >= 3 or failures)
        yield steps_s
    finally:
        enough.set()
        trainer.join(PATIENCE_S + 10)
        assert not failures, failures
    assert not trainer.is_alive()


def _stop(pid: int, for_s: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(for_s)
    finally:
        os.kill(pid, signal.SIGCONT)
