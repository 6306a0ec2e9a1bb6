"""`mempool bench plan` as a command: what is printed and kept, which files are written, how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import mempool
from mempool.bench import machine
from mempool.bench.command import ended, say
from mempool.bench.plan.fitting import median_error
from mempool.bench.plan.points import Workload
from mempool.bench.plan.run import Options, Outcome, run
from mempool.bench.report import failed_document, goal_lines, table
from mempool.sizing import Machine

FORMAT = 1
_COSTS = ("beside kernels and bytes", "ms", "a further shard", "CPU client", "a further shard", "CPU shard")
_HEADER = ("call", "measured ms", "predicted", "off by")


def bench_plan(
    options: Options, *, as_json: bool = False, out: Path | None = None, workload: Workload | None = None
) -> int:
    """Run, print the report (or its JSON alone), write the file.

    Args:
        options: What to run.
        as_json: Print the result as JSON on stdout, progress on stderr.
        out: Folder of the result file, ``<machine>-plan.json``, made if it is missing: `mempool plan` reads it.
        workload: As for ``run``.

    Returns:
        The exit code: 1 if any result was wrong.

    Raises:
        ChildError: A process of the benchmark does not start, or ends.
    """
    outcome = run(options, say=say, workload=workload)
    return ended(
        document(outcome), lines(outcome), outcome.failed,
        as_json=as_json, out=out, what="plan", plot_file=None, draw=lambda _: None,
    )  # fmt: skip


def document(outcome: Outcome) -> dict[str, Any]:
    """What the result file holds. Times are milliseconds; ``constants`` are seconds."""
    device, options = torch.device("cpu"), outcome.options
    return {
        "format": FORMAT,
        "mempool": mempool.__version__,
        "machine": machine.describe(device),
        "versions": machine.versions(("grpcio",)),
        "implementation": machine.implementation(device),
        "threads": 1,
        "options": {
            "quick": options.quick,
            "rounds": options.rounds,
            "only": list(options.only),
            "seed": options.seed,
            "given_constants": options.machine is not None,
        },
        "table_bytes": outcome.workload.table_bytes,
        "goals": [standing.document() for standing in outcome.standings],
        "median_error": median_error(outcome.tried),
        "median_error_by_path": _by_path(outcome),
        "constants": None if outcome.machine is None else outcome.machine.document(),
        "fitted": [
            {
                **point.document(),
                "measured_ms": found.wall,
                "client_cpu_ms": found.client,
                "server_cpu_ms": found.server,
            }
            for point, found in outcome.times.items()
        ],
        "tried": [
            {
                **one.point.document(),
                "measured_ms": one.measured_ms,
                "predicted_ms": one.predicted_ms,
                "error": one.error,
            }
            for one in outcome.tried
        ],
        "failed": failed_document(outcome.failed),
    }


def lines(outcome: Outcome) -> list[str]:
    """The report for people."""
    here = machine.describe(torch.device("cpu"))
    size = outcome.workload.table_bytes >> 20
    out = [f"{here['model']}, {here['cores']} cores; tables of {size} MiB of float32, Adagrad"]
    if outcome.machine is not None:
        out += ["", *table(_COSTS, _costs(outcome.machine))]
    if outcome.tried:
        rows = [
            (one.point.name, f"{one.measured_ms:.3f}", f"{one.predicted_ms:.3f}", f"{one.error:.0%}")
            for one in outcome.tried
        ]
        out += ["", *table(_HEADER, rows), ""]
        out += [f"{path}: median error {error:.0%}" for path, error in _by_path(outcome).items()]
    if outcome.standings:
        out += ["", *goal_lines(outcome.standings)]
    return out


def _costs(found: Machine) -> list[tuple[str, ...]]:
    return [
        (
            f"{name} {call}",
            *(f"{1e3 * costs.wall.get(term, 0.0):.3f}" for term in ("call", "shard")),
            *(f"{1e3 * costs.client.get(term, 0.0):.3f}" for term in ("call", "shard")),
            f"{1e3 * costs.server['call']:.3f}" if "call" in costs.server else "-",
        )
        for name, path in found.paths.items()
        for call, costs in (("gather", path.gather), ("step", path.step))
    ]


def _by_path(outcome: Outcome) -> dict[str, float]:
    found = {}
    for path in dict.fromkeys(one.point.path for one in outcome.tried):
        error = median_error([one for one in outcome.tried if one.point.path == path])
        assert error is not None, "there are points of it"
        found[path] = error
    return found
