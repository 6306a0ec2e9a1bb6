"""A run of `bench serve` as people read it, and as the file that is kept by machine."""

from __future__ import annotations

from typing import Any

import torch

import mempool
from mempool.bench import machine
from mempool.bench.report import failed_document, goal_lines, table
from mempool.bench.serve.lookups import LookUps
from mempool.bench.serve.run import Outcome

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
    if outcome.lookups:
        out += [
            "",
            "added: median of the rounds' differences to torch's embedding_bag in this process. CPU: milliseconds a"
            " call, all threads; of what is embedded, or in this process, all of it is the client's.",
        ]
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
            f"{times.quantile_ms(0.95):.3f}",
            f"{times.quantile_ms(0.99):.3f}",
            f"{one.added_ms(name):.3f}",
            number(one.cpu[name].client_ms),
            number(one.cpu[name].server_ms),
        )
        for name, times in one.times.items()
    ]


def number(value: float | None) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value:.3f}"
