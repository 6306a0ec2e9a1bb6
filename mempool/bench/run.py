"""A run of `mempool bench kernels`: every case gated, then timed beside its peers and the machine's ceilings."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mempool.bench import machine, peers
from mempool.bench.cases import FAMILIES, Case, Prepared, Tables, Workload, all_cases
from mempool.bench.gate import GateError
from mempool.bench.goals import Standing, standings
from mempool.bench.measured import Measured
from mempool.bench.measuring import Copy, Product, interleaved

Say = Callable[[str], None]

_DEVICES = ("cpu", "cuda")
_BUDGET_S = 8.0


class OptionsError(ValueError):
    """What is asked for does not exist, or not on this machine."""


def require_options(only: Sequence[str], known: Sequence[str], rounds: int) -> None:
    """Raises OptionsError for cases that are none, or no round."""
    unknown = [name for name in only if name not in known]
    if unknown:
        raise OptionsError(f"unknown cases {', '.join(unknown)}; known: {', '.join(known)}")
    if rounds < 1:
        raise OptionsError(f"rounds must be at least 1, got {rounds}")


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        device: "cpu" or "cuda".
        quick: The headline's cases only.
        rounds: Rounds of a case; a case that takes long ends after fewer, but 5.
        only: Families; none for all.
        seed: Of tables, ids and samples.

    Raises:
        OptionsError: An unknown name, or no such device.
    """

    device: str = "cpu"
    quick: bool = False
    rounds: int = 15
    only: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require_options(self.only, FAMILIES, self.rounds)
        if self.device not in _DEVICES:
            raise OptionsError(f"device must be {' or '.join(_DEVICES)}, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise OptionsError("this machine has no CUDA device that torch can use; run with --device cpu")


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        options: What was asked.
        measured: Cases that passed their gate.
        failed: Cases whose gate is red: no time was taken.
        skipped: What was left out or made smaller, and why.
        peers_missing: Packages of peers that are not installed.
        standings: The goals.
    """

    options: Options
    measured: list[Measured] = field(default_factory=list)
    failed: list[GateError] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    peers_missing: list[str] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)


def run(options: Options, *, say: Say, workload: Workload | None = None) -> Outcome:
    """Run cases one after the other.

    Args:
        options: Which, and how long.
        say: Told of each case as it ends.
        workload: Sizes; those of the device if not given.
    """
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    outcome = Outcome(options, peers_missing=peers.missing(device))
    if outcome.peers_missing:
        say(f"peers that are not installed: {', '.join(outcome.peers_missing)}; to get them: {peers.INSTALL}")
    workload = workload or Workload.of(device.type, machine.memory_bytes(device))
    tables = Tables(device, options.seed)
    skipped: list[str] = []
    cases = all_cases(workload, tables, skipped.append)
    chosen = [case for case in cases if _wanted(case, options)]
    if not options.quick:
        outcome.skipped += [line for line in skipped if not options.only or line.partition(" ")[0] in options.only]
    ceilings = Ceilings(workload, device)
    for number, case in enumerate(chosen, 1):
        try:
            measured = run_case(case, case.prepare(), ceilings, options)
        except GateError as error:
            outcome.failed.append(error)
            say(f"[{number}/{len(chosen)}] {case.name}: WRONG, not timed: {error}")
        else:
            outcome.measured.append(measured)
            say(f"[{number}/{len(chosen)}] {_line(measured)}")
        gc.collect()
    order = {family: place for place, family in enumerate(FAMILIES)}
    outcome.measured.sort(key=lambda one: (order[one.case.family], not one.case.headline))
    outcome.standings = standings(device.type, outcome.measured)
    return outcome


class Ceilings:
    """The machine's copy and its square product, timed in the rounds of every case."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.copy = Copy(workload.copy_bytes, device)
        self.product = Product(workload.product_size, device)


def run_case(case: Case, prepared: Prepared, ceilings: Ceilings, options: Options) -> Measured:
    """Gate a case, then time it.

    Raises:
        GateError: A contender's result is wrong: nothing was timed.
    """
    checks = prepared.check()
    if not all(check.passed for check in checks):
        raise GateError(case.name, checks)
    ceiling = ceilings.product.contender if case.of_keys else ceilings.copy.contender
    work = ceilings.product.num_flops if case.of_keys else ceilings.copy.num_bytes
    times = interleaved(
        [*prepared.contenders, ceiling],
        num_inputs=prepared.num_inputs,
        rounds=options.rounds,
        budget_s=_BUDGET_S,
        device=options.device,
    )
    return Measured(
        case=case,
        times={contender.name: times[contender.name] for contender in prepared.contenders},
        ceiling=times[ceiling.name],
        ceiling_work=work,
        num_bytes=prepared.num_bytes,
        num_flops=prepared.num_flops,
        checks=checks,
        notes=prepared.notes,
    )


def _wanted(case: Case, options: Options) -> bool:
    return (case.headline or not options.quick) and (not options.only or case.family in options.only)


def _line(measured: Measured) -> str:
    return f"{measured.case.name}: " + ", ".join(
        f"{name} {times.median_ms:.2f} ms" for name, times in measured.times.items()
    )
