"""A run of `bench serve` as people read it, and as the file that is kept by machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import mempool
from mempool.bench import machine
from mempool.bench.report import failed_document, goal_lines, table
from mempool.bench.serve.load import Load
from mempool.bench.serve.lookups import LookUps
from mempool.bench.serve.run import Outcome
from mempool.bench.serve.shards import KINDS
from mempool.types import StageTime

FORMAT = 1
_PACKAGES = ("grpcio", "ray")


def document(outcome: Outcome) -> dict[str, Any]:
    """What the result file holds."""
    device = torch.device("cpu")
    options, size = outcome.options, outcome.workload.table
    return {
        "format": FORMAT,
        "mempool": mempool.__version__,
        "machine": machine.describe(device),
        "versions": machine.versions(_PACKAGES),
        "implementation": machine.implementation(device),
        "threads": 1,
        "options": {
            "quick": options.quick,
            "rounds": options.rounds,
            "only": list(options.only),
            "ray": options.ray,
            "seed": options.seed,
        },
        "table": {"num_slots": size.num_slots, "value_dim": size.value_dim},
        "goals": [standing.document() for standing in outcome.standings],
        "lookups": [one.document() for one in outcome.lookups],
        "shards": [one.document() for one in outcome.shards],
        "load": [one.document() for one in outcome.load],
        "stages": {
            stage.stage: {
                "count": stage.count,
                "mean_ms": stage.total_s * 1e3 / stage.count,
                "p50_ms": stage.p50_s * 1e3,
                "p99_ms": stage.p99_s * 1e3,
                "max_ms": stage.max_s * 1e3,
            }
            for stage in outcome.stages
        },
        "flood": {
            target: {name: one.document() for name, one in found.items()} for target, found in outcome.flood.items()
        },
        "failed": failed_document(outcome.failed),
        "skipped": outcome.skipped,
    }


def lines(outcome: Outcome) -> list[str]:
    """The report for people."""
    here, size = machine.describe(torch.device("cpu")), outcome.workload.table
    out = [
        f"{here['model']}, {here['cores']} cores; {size.num_slots} slots x {size.value_dim} float32, one thread a shard"
    ]
    for one in outcome.lookups:
        out += ["", f"one client, {one.shape.bags} bags x {one.shape.pairs}", *table(_LOOKUPS, _lookup_rows(one))]
    for scaling in outcome.shards:
        shape = scaling.measured.shape
        out += ["", f"tables by {scaling.layout}, {shape.bags} bags x {shape.pairs}"]
        out += table(_LOOKUPS, _lookup_rows(scaling.measured))
        for kind in KINDS:
            further_ms = scaling.further_ms(kind)
            out += [f"{kind}: a further shard costs {further_ms:.3f} ms of CPU here"] if further_ms is not None else []
    if outcome.lookups or outcome.shards:
        out += [
            "",
            "added: median of the rounds' differences to torch's embedding_bag in the trainer's process. CPU:"
            " milliseconds a call, all threads; of what is embedded, or in the trainer, all of it is the client's.",
        ]
    if outcome.load:
        out += ["", *table(_LOAD, [_load_row(one) for one in outcome.load])]
        out.append("open loop: Poisson arrivals; ms from the moment at which a call was to begin")
    if outcome.stages:
        out += ["", "the shard's stages under all of this load", *table(_STAGES, _stage_rows(outcome.stages))]
    if outcome.flood:
        rows = [
            (target, name, *_load_row(one)[3:])
            for target, found in outcome.flood.items()
            for name, one in found.items()
        ]
        out += ["", f"one client, {outcome.workload.shapes[1].name}", *table(("asked", "", *_LOAD[3:]), rows)]
    said = [standing for standing in outcome.standings if standing.measured is not None or not outcome.options.only]
    out += ["", *goal_lines(said)] if said else []
    out += ["", *(f"not as planned: {line}" for line in outcome.skipped)] if outcome.skipped else []
    return out


_LOOKUPS = ("contender", "median ms", "p95", "p99", "added", "CPU client", "CPU server")


def _lookup_rows(one: LookUps) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{times.median_ms:.3f}",
            f"{one.calls[name].quantile_ms(0.95):.3f}",
            f"{one.calls[name].quantile_ms(0.99):.3f}",
            f"{one.added_ms(name):.3f}",
            number(one.cpu[name].client_ms),
            number(one.cpu[name].server_ms),
        )
        for name, times in one.times.items()
    ]


_LOAD = ("shape, clients", "loop", "asked", "calls/s", "median ms", "p95", "p99", "CPU server", "late")


def _load_row(one: Load) -> tuple[str, ...]:
    return (
        f"{one.shape.name}, {one.clients}",
        one.loop if one.offered_per_s is None else f"{one.loop}, {one.offered_per_s:.0f}/s",
        one.target,
        f"{one.calls_per_s:.1f}",
        f"{one.times.median_ms:.3f}",
        f"{one.times.quantile_ms(0.95):.3f}",
        f"{one.times.quantile_ms(0.99):.3f}",
        number(one.server_cpu_ms),
        f"{one.unserved}",
    )


_STAGES = ("stage", "count", "mean ms", "p50", "p99", "max")


def _stage_rows(stages: Sequence[StageTime]) -> list[tuple[str, ...]]:
    rows = []
    for stage in stages:
        times_s = (stage.total_s / stage.count, stage.p50_s, stage.p99_s, stage.max_s)
        rows.append((stage.stage, f"{stage.count}", *(f"{time_s * 1e3:.3f}" for time_s in times_s)))
    return rows


def number(value: float | None) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value:.3f}"
