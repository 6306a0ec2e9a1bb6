"""One run on one seed: a pool, its trainers, its faults; then no faults, an end within bounds, and the check.

``python -m tests.simulation.run --seeds 200 --seed 1`` runs many; its last line says seeds, violations, seeds a second.
"""

import argparse
import asyncio
import gc
import hashlib
import sys
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import torch

from mempool.checkpoint.format.manifest import Manifest
from tests.simulation.branches import counted, missed
from tests.simulation.faults import Chaos, Faults
from tests.simulation.history import History
from tests.simulation.loop import Scheduler, Stuck
from tests.simulation.marks import Marks
from tests.simulation.network import Network
from tests.simulation.observing import observed
from tests.simulation.places import Place, placed
from tests.simulation.processes import Park
from tests.simulation.workload import Workload

START_S = 60.0
PROGRESS_S = 240.0
"""Seconds in which all that was begun has ended, and every trainer has committed once more, after the last fault."""
ENOUGH = 200
"""Seeds in which every rare branch must have been met."""


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    seed: int
    violations: list[str]
    digest: str
    marks: Counter[str]
    simulated_s: float
    calls: int
    checked: int
    versions: int
    faults: Faults


@dataclass
class Run:
    """One run; made, played once, and looked at. What is not said is drawn by the seed."""

    seed: int
    faults: Faults | None = None
    encode: bool | None = None
    storage: bool | None = None
    saves: bool | None = None
    pins: bool = False
    marks: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.around: AbstractContextManager[object] = nullcontext()
        self.scheduler = Scheduler(self.seed)
        random = self.scheduler.random("run")
        disks = self.scheduler.random("storage")
        if self.storage is None:  # faults that were asked for are the whole of it
            self.storage = self.faults is None and disks.random() < 0.5
        drawn = self.faults is None
        self.faults = self.faults or Faults.draw(random)
        if self.storage and drawn:
            self.faults = replace(
                self.faults,
                restarts=disks.random() < 0.8,
                disks=disks.random() < 0.3,
                flips=disks.random() < 0.06,
            )
        if self.saves is None:
            self.saves = drawn and disks.random() < (0.5 if self.storage else 0.1)
        if drawn:
            self.faults = replace(self.faults, disk_traps=disks.choice((0, 0, 1, 2, 4)))
        encode = random.random() < 0.1 if self.encode is None else self.encode
        self.lasts_s = random.choice((6.0, 12.0, 24.0))
        self.network = Network(self.scheduler, encode=encode)
        self.history = History()
        self.history.watch(self.network)
        self.park = Park(
            self.scheduler,
            self.network,
            drift=random.choice((0.02, 0.3)) if self.faults.drift or self.faults.scene.drifts else 0.0,
            lease_s=random.choice((3.0, 10.0)),
            storage=self.storage,
            journal_limit=disks.choice((2**13, 2**14, 2**16)),
        )
        self.place = Place(self.park.place, self.scheduler.random("names"), on_manifest=self._saved)
        self.park.on_failure = self.history.say
        self.park.on_lost = self.history.shard_killed
        Marks(self.marks).watch(self.network)
        self.park.on_shard.append(lambda shard: self.history.shard_started(shard.info, shard.loop.name))
        self.workload = Workload(
            self.park,
            self.history,
            self.marks,
            scene=self.faults.scene,
            place=self.place if self.saves else None,
            disks_refuse=self.faults.disks,
            pins=self.pins,
        )
        self.shards = random.choice((1, 2, 2, 3, 3, 4))

    def play(self) -> Outcome:
        """Raises nothing: what goes wrong is a violation."""
        enabled = gc.isenabled()
        gc.disable()  # when garbage is collected is no part of a seed
        try:
            with placed(self.place), self.around, observed(self.history, self.park.store_now), counted(self.marks):
                self._play()
        except Stuck as stuck:
            self.history.say(f"no progress: {stuck}; {self.workload.waiting()}")
        except Exception as error:
            self.history.say(f"the run ended with {type(error).__name__}: {error}")
        finally:
            digest = self._digest()  # before what is left is cancelled, in no order
            self.network.cut.clear()
            self.scheduler.close()
            if enabled:
                gc.enable()
        for process, context in self.scheduler.errors:
            error = context.get("exception")
            if "never retrieved" not in context.get("message", ""):
                self.history.say(f"{process}: {context.get('message')}: {error!r}")
        violations = self.history.check()
        return Outcome(
            seed=self.seed,
            violations=violations,
            digest=digest,
            marks=self.marks,
            simulated_s=self.scheduler.now_s,
            calls=self.network.calls,
            checked=self.history.checked,
            versions=len(self.history.decided),
            faults=self.faults,  # type: ignore[arg-type]
        )

    def _play(self) -> None:
        scheduler, workload = self.scheduler, self.workload
        controller = self.park.start_controller(shards=self.shards)
        scheduler.run_until(lambda: controller.ready or controller.life.done(), limit_s=START_S)
        scheduler.run(workload.begin(), limit_s=2 * START_S)
        chaos = Chaos(
            self.faults,  # type: ignore[arg-type]
            self.park,
            trainers=workload.trainers,
            kill_trainer=workload.kill_trainer,
            kill_shard=workload.kill_shard,
            rescales=workload.rescales,
            tables=workload.changes_tables,
            saves=bool(self.saves),
        )
        chaos.begin()
        going = scheduler.world.create_task(chaos.go_on())
        ended_s = scheduler.now_s + self.lasts_s
        scheduler.run(asyncio.sleep(self.lasts_s), limit_s=ended_s + 1.0)
        chaos.end()
        going.cancel()
        half_made = self.history.half_told or workload.restoring
        awaited = half_made or self.faults.restarts  # type: ignore[union-attr]
        if self.faults.controller_dies and workload.rescaling and not awaited:  # type: ignore[union-attr]
            # For good: what it froze thaws by itself, and trainers go on. Shards that come back wait for one, and so
            # does a table that not every shard knows to be made, and who restores one asks until it is answered.
            self.park.kill_controller(comes_back_s=10 * PROGRESS_S)
            self.marks["a controller that died in a rescale and did not come back"] += 1
        scheduler.run(workload.end(), limit_s=scheduler.now_s + PROGRESS_S)

    def _saved(self, manifest: Manifest) -> None:
        self.history.saved.note(manifest, self.scheduler.now_s)

    def _digest(self) -> str:
        """The same for the same run, whatever process it is in."""
        history = self.history
        text = repr(
            (
                self.scheduler.now_s,
                self.scheduler.handles,
                self.network.calls,
                sorted(self.network.counts.items()),
                sorted((key, decided.step_id.step) for key, decided in history.decided.items()),
                sorted(self.marks.items()),
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def play(seed: int) -> Outcome:
    """One run of a seed."""
    return Run(seed, pins=seed % 4 == 1).play()


def prepare_worker() -> None:
    """A process for many runs: one thread, nothing said, and nothing collected that lives anyhow."""
    torch.set_num_threads(1)
    import logging

    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="the first of them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--marks", action="store_true", help="say how often each rare branch was met")
    options = parser.parse_args()
    began_s = time.monotonic()
    marks: Counter[str] = Counter()
    failed: list[int] = []
    done = 0
    totals: Counter[str] = Counter()
    seeds = range(options.seed, options.seed + options.seeds)
    with get_context("spawn").Pool(options.processes, prepare_worker, maxtasksperchild=1000) as pool:
        for outcome in pool.imap(play, seeds):
            marks.update(outcome.marks)
            totals.update(
                calls=outcome.calls, checked=outcome.checked, versions=outcome.versions, simulated=outcome.simulated_s
            )
            done += 1
            if done % 50 == 0:
                print(f"... {done} seeds, {time.monotonic() - began_s:.0f} s", flush=True)
            if outcome.violations:
                failed.append(outcome.seed)
                print(f"seed {outcome.seed}: {len(outcome.violations)} violations", flush=True)
                for text in outcome.violations[:5]:
                    print(f"  {text}")
                print(f"  again: make simulate SEEDS=1 SEED={outcome.seed}", flush=True)
    if options.marks:
        for name, count in sorted(marks.items()):
            print(f"{count:8,}  {name}")
    spent_s = time.monotonic() - began_s
    print(
        f"{totals['simulated']:,.0f} simulated s, {totals['calls']:,} calls, {totals['versions']:,} steps, "
        f"{totals['checked']:,} answers compared"
    )
    never = missed(marks) if len(seeds) >= ENOUGH else []
    for name in never:
        print(f"never met: {name}")
    print(f"{len(seeds)} seeds, {len(failed)} with violations, {len(seeds) / spent_s:.2f} seeds/s")
    return 1 if failed or never else 0


if __name__ == "__main__":
    sys.exit(main())
