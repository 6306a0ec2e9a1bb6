"""A run of `mempool bench plan`: each path's points timed in the same rounds, fitted, and tried on other points."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from mempool.bench import machine as described
from mempool.bench.gate import GateError
from mempool.bench.goals import Standing, stand
from mempool.bench.measuring import Contender, Copy, interleaved
from mempool.bench.plan.fitting import Measured, Tried, machine_of, median_error, tried
from mempool.bench.plan.points import (
    EMBEDDED,
    GRPC,
    KERNELS,
    NEAR,
    PATHS,
    Point,
    Points,
    Workload,
    kernels_alone,
    on_path,
)
from mempool.bench.run import OptionsError, Say, require_options
from mempool.bench.serve.callers import cpu_of_calls
from mempool.bench.serve.lookups import cpu_of_batches
from mempool.bench.serve.shapes import NUM_INPUTS
from mempool.sizing import Machine
from mempool.wire.lines.line import supported

_GOAL = 0.15
_ROUNDS = 15
_USUAL = (EMBEDDED, GRPC)


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        quick: Fewer rounds.
        rounds: Rounds of a path; fewer where they take long, but 5.
        only: Paths; none for an embedded pool and gRPC.
        seed: Of tables and pairs.
        machine: Constants to be tried; None: they are measured in the same rounds.

    Raises:
        OptionsError: An unknown path, or one that this system has not, or no round.
    """

    quick: bool = False
    rounds: int = _ROUNDS
    only: Sequence[str] = ()
    seed: int = 0
    machine: Machine | None = None

    def __post_init__(self) -> None:
        require_options(self.only, PATHS, self.rounds)
        if NEAR in self.only and not supported():
            raise OptionsError(f"{NEAR}: this system has no memory that two processes can share so; leave it out")

    @property
    def paths(self) -> list[str]:
        return [path for path in PATHS if path in (self.only or _USUAL)]


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        options: What was asked.
        workload: Of which sizes.
        machine: The constants; None where something was wrong.
        times: What they come from.
        tried: Predictions at other points, beside what was measured.
        failed: What was wrong, and not timed.
        standings: The goals.
    """

    options: Options
    workload: Workload
    machine: Machine | None = None
    times: dict[Point, Measured] = field(default_factory=dict)
    tried: list[Tried] = field(default_factory=list)
    failed: list[GateError] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)


def run(options: Options, *, say: Say, workload: Workload | None = None) -> Outcome:
    """Measure path after path, then fit and try. Everything that is started has ended when this returns, or raises.

    Args:
        options: Which, and how long.
        say: Told of what is done.
        workload: Sizes, if not the usual ones.

    Raises:
        ChildError: A process of the benchmark does not start, or ends.
    """
    workload = workload or Workload()
    if options.quick:
        workload = replace(workload, budget_s=workload.budget_s / 6, batch_s=workload.batch_s / 4)
    outcome = Outcome(options, workload, options.machine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    others: dict[Point, Measured] = {}
    copies: list[float] = []
    try:
        for path in options.paths:
            try:
                found, copied = _path(outcome, path, say)
            except GateError as error:
                outcome.failed.append(error)
                say(f"WRONG, not timed: {error}")
                continue
            finally:
                gc.collect()
            outcome.times |= {point: times for point, times in found.items() if point.fits}
            others |= {point: times for point, times in found.items() if not point.fits}
            copies.append(copied)
    finally:
        torch.set_num_threads(threads)
    cores = described.num_cores()
    if outcome.machine is None and copies:
        name = described.describe(torch.device("cpu"))["name"]
        outcome.machine = machine_of(name, outcome.times, copy_bytes_per_s=max(copies), cores=cores)
    if outcome.machine is not None:
        known = {point: times for point, times in others.items() if point.path in outcome.machine.paths}
        outcome.tried = tried(outcome.machine, known, cores=cores)
    what = "predicted times at other points, median error"
    outcome.standings = [stand(what, _GOAL, median_error(outcome.tried), under=True)]
    return outcome


def _path(outcome: Outcome, path: str, say: Say) -> tuple[dict[Point, Measured], float]:
    """Times of the points of one path, of the kernels, and bytes a second of a copy. Raises GateError."""
    options, workload = outcome.options, outcome.workload
    fits = options.machine is None
    with ExitStack() as stack:
        say(f"{path}: starting pools")
        alone = kernels_alone(workload, options.seed) if fits else Points()
        there = on_path(stack, path, workload, options.seed, fits=fits)
        checks = alone.checks + there.checks
        if not all(check.passed for check in checks):
            raise GateError(path, checks)
        points = alone.points + there.points
        say(f"{path}: timing {len(points)} calls")
        copy = Copy(workload.copy_bytes, "cpu")
        ways = {point: Contender(f"{number} {point.name}", point.run) for number, point in enumerate(points)}
        # Small ones behind each other: what a large step leaves to be done after it was answered is no part of them.
        in_order = [ways[point] for point in sorted(points, key=lambda point: (point.pairs, point.call))]
        times = interleaved(
            [*in_order, copy.contender],
            num_inputs=NUM_INPUTS,
            rounds=options.rounds,
            budget_s=workload.budget_s,
        )
        counted = {way.name: point for point, way in ways.items() if point.fits and point.path != KERNELS}
        spent = cpu_of_batches(
            {name: partial(cpu_of_calls, ways[point].run, point.pids, NUM_INPUTS) for name, point in counted.items()},
            {name: times[name].median_ms for name in counted},
            batch_s=workload.batch_s,
        )
        found = {}
        for point, way in ways.items():
            cpu = spent.get(way.name)
            wall = times[way.name].median_ms
            found[point] = (
                Measured(wall) if cpu is None else Measured(wall, cpu.client_ms, cpu.server_ms if point.pids else None)
            )
        return found, copy.num_bytes / times[Copy.NAME].median_ms * 1e3
