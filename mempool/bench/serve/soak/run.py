"""A soak: clients at saturation, both ways; one after the other is killed and replaced, and the shard is watched."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mempool
from mempool.bench.processes.child import Child, ChildError
from mempool.bench.run import Say
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.bench.serve.soak.footprint import Footprint, slope
from mempool.rayhost.actors import kernel_variables

#: Python's pools of threads and gRPC's grow as they are used, up to about so many: no leak.
POOLED_THREADS = 8
#: Memory that a shard may take in addition, a minute.
SLOPE_MIB = 1.0
_NURSERY = "mempool.bench.serve.soak.nursery:serve"
_SETTLE_TIMEOUT_S = 20.0
_SETTLE_S = 0.25
_STOP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        soak_s: How long.
        first_s: Before it: clients as in it, so that the shard has what it makes once.
        warm_up_s: Of the soak; what is sampled later gives the slope.
        kill_every_s: In the mean.
        sample_s: Between two looks at the shard.
        clients: At the same time, the ways in turn.
        threads: Of each client.
        pause_s: Between two calls of a thread.
        ways: Of clients.
        table: Of the shard.
        shapes: Look-ups.
        seed: Of who is killed, and when.
    """

    soak_s: float = 600.0
    first_s: float = 10.0
    warm_up_s: float = 60.0
    kill_every_s: float = 2.0
    sample_s: float = 1.0
    clients: int = 4
    threads: int = 2
    pause_s: float = 0.0
    ways: Sequence[str] = pools.REMOTE
    table: TableSize = field(default_factory=lambda: TableSize(2**16, 256))
    shapes: Sequence[Shape] = (Shape(1024, 128), Shape(64, 32))
    seed: int = 0


@dataclass
class Outcome:
    """What a soak gave.

    Attributes:
        base: The shard's process before, with no client.
        peak: The most of each figure during it.
        after: With no client again.
        samples: [minute, MiB, MiB of its own] of the soak.
        slope_mib, own_slope_mib: MiB a minute behind the warm-up.
        kills: Clients that were killed.
        calls_per_s: Look-ups that the shard answered.
        failed: What went wrong.
    """

    base: Footprint
    peak: Footprint
    after: Footprint
    samples: list[tuple[float, float, float]]
    slope_mib: float
    own_slope_mib: float
    kills: int
    calls_per_s: float
    failed: list[str]

    @property
    def left(self) -> Footprint:
        """What is there afterwards that was not there before."""
        return self.after.less(self.base)

    @property
    def leaks(self) -> list[str]:
        """What clients have left behind, in words."""
        left, found = self.left, []
        if left.descriptors > 0:
            found.append(f"{left.descriptors} descriptors")
        if left.shared_mappings > 0:
            found.append(f"{left.shared_mappings} mappings of memory that was shared")
        if left.threads > POOLED_THREADS:
            found.append(f"{left.threads} threads")
        return found

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "left": asdict(self.left), "leaks": self.leaks}


class _Clients:
    """Those of the nursery."""

    def __init__(self, nursery: Child, plan: Plan) -> None:
        self._nursery, self._plan = nursery, plan
        self._draw = random.Random(plan.seed)
        self._running: dict[int, str] = {}
        self.failed: list[str] = []
        self.kills = 0

    def start(self) -> None:
        """As many as are to run."""
        for number in range(self._plan.clients):
            self._start(self._plan.ways[number % len(self._plan.ways)])

    def replace_one(self) -> None:
        """Kill one, start one that asks the same way."""
        number = self._draw.choice(list(self._running))
        way = self._running.pop(number)
        self.kills += 1
        self._require(number, way, self._asked("kill", number), -signal.SIGKILL)
        self._start(way)

    def stop(self) -> None:
        """Let all of them end."""
        while self._running:
            number, way = self._running.popitem()
            self._require(number, way, self._asked("stop", number), 0)

    def until_next_s(self) -> float:
        """Until the next one is to be killed."""
        return self._draw.uniform(0.0, 2.0 * self._plan.kill_every_s)

    def _start(self, way: str) -> None:
        self._running[self._asked("start", way)] = way

    def _asked(self, what: str, given: object) -> Any:
        self._nursery.say([what, given])
        return self._nursery.hear(_STOP_TIMEOUT_S)

    def _require(self, number: int, way: str, code: int | None, wanted: int) -> None:
        if code != wanted:
            how = "did not end when it was to" if code is None else f"ended with {code}"
            self.failed.append(f"client {number}, {way}: {how}; what it said is above")


def run(plan: Plan, *, say: Say) -> Outcome:
    """Soak. All that was started has ended when this returns, or raises.

    Raises:
        ChildError: A process does not start, or ends.
    """
    asked = {
        "size": asdict(plan.table),
        "shapes": [[shape.bags, shape.pairs] for shape in plan.shapes],
        "threads": plan.threads,
        "pause_s": plan.pause_s,
    }
    with pools.serving(plan.table) as serving:
        (pid,) = serving.process.pids
        arguments = {**asked, "address": serving.process.address}
        with Child(_NURSERY, arguments, variables=kernel_variables(1)) as nursery:
            nursery.hear()
            clients = _Clients(nursery, plan)
            clients.start()
            time.sleep(plan.first_s)
            clients.stop()
            base = _settled(pid, lambda before, now: now.descriptors == before.descriptors)
            say(f"before: {base}")
            return _soaked(plan, pid, serving.pool, clients, base, say)


def _soaked(plan: Plan, pid: int, pool: mempool.Pool, clients: _Clients, base: Footprint, say: Say) -> Outcome:
    calls, begin_s = _answered(pool), time.monotonic()
    peak, samples = base, []
    clients.start()
    next_kill_s, next_sample_s, next_said_s = begin_s + clients.until_next_s(), begin_s, begin_s
    while (now_s := time.monotonic()) < begin_s + plan.soak_s:
        if now_s >= next_sample_s:
            found = _footprint(pid)
            peak = found.most(peak)
            samples.append(((now_s - begin_s) / 60.0, found.resident_mib, found.own_mib))
            next_sample_s += plan.sample_s
            if now_s >= next_said_s:
                say(f"{(now_s - begin_s) / 60.0:.1f} min, {clients.kills} killed: {found}")
                next_said_s += max(plan.soak_s / 20.0, plan.sample_s)
        if now_s >= next_kill_s:
            clients.replace_one()
            next_kill_s = now_s + clients.until_next_s()
        time.sleep(max(0.0, min(next_sample_s, next_kill_s, begin_s + plan.soak_s) - time.monotonic()))
    calls_per_s = (_answered(pool) - calls) / (time.monotonic() - begin_s)
    clients.stop()
    most_threads = base.threads + POOLED_THREADS
    after = _settled(pid, lambda _, now: now.descriptors <= base.descriptors and now.threads <= most_threads)
    say(f"after: {after}")
    counted = [sample for sample in samples if sample[0] >= plan.warm_up_s / 60.0]
    return Outcome(
        base=base,
        peak=peak,
        after=after,
        samples=samples,
        slope_mib=slope([(minute, mib) for minute, mib, _ in counted]),
        own_slope_mib=slope([(minute, mib) for minute, _, mib in counted]),
        kills=clients.kills,
        calls_per_s=calls_per_s,
        failed=clients.failed,
    )


def _settled(pid: int, enough: Callable[[Footprint, Footprint], bool]) -> Footprint:
    """The process once no memory is shared and so much is enough, of the look before and of now; or after a while."""
    before, end_s = _footprint(pid), time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        time.sleep(_SETTLE_S)
        now = _footprint(pid)
        if time.monotonic() >= end_s or (not now.shared_mappings and enough(before, now)):
            return now
        before = now


def _footprint(pid: int) -> Footprint:
    try:
        return Footprint.of(pid)
    except OSError as error:
        raise ChildError(f"process {pid}, the shard's, cannot be looked at: {error}") from None


def _answered(pool: mempool.Pool) -> int:
    (shard,) = pool.status().shards
    return next((stage.count for stage in shard.stages if stage.stage == "kernel"), 0)
