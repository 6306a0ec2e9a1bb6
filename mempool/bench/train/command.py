"""`mempool bench train` as a command: what is printed and kept, which files are written, how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import mempool
from mempool.bench import machine, peers
from mempool.bench.bars import bars
from mempool.bench.command import ended, require_plot, say
from mempool.bench.report import failed_document, goal_lines, table
from mempool.bench.train.measured import LOCAL, Measured
from mempool.bench.train.run import Options, Outcome, Workload, run

FORMAT = 1
_HEADER = ("work", "threads", "contender", "median ms", "p95", "p99", "beside local")


def bench_train(
    options: Options,
    *,
    as_json: bool = False,
    out: Path | None = None,
    plot_file: Path | None = None,
    workload: Workload | None = None,
) -> int:
    """Run, print the report (or its JSON alone), write files.

    Args:
        options: What to run.
        as_json: Print the result as JSON on stdout, progress on stderr.
        out: Folder of the result file, ``<machine>-train.json``, made if it is missing.
        plot_file: The PNG.
        workload: As for ``run``.

    Returns:
        The exit code: 1 if any result was wrong.

    Raises:
        OptionsError: A plot is asked for, and there is no matplotlib.
        ChildError: A process of the benchmark does not start, or ends.
    """
    require_plot(plot_file)
    outcome = run(options, say=say, workload=workload)
    found = document(outcome)
    panels = [(case["name"], case["contenders"]) for case in found["cases"]]
    return ended(
        found, lines(outcome), outcome.failed,
        as_json=as_json, out=out, what="train", plot_file=plot_file,
        draw=lambda file: bars(found, panels, "a step", file),
    )  # fmt: skip


def document(outcome: Outcome) -> dict[str, Any]:
    """What the result file holds."""
    device, options = torch.device("cpu"), outcome.options
    return {
        "format": FORMAT,
        "mempool": mempool.__version__,
        "machine": machine.describe(device),
        "versions": machine.versions(("grpcio",)),
        "implementation": machine.implementation(device),
        "options": {
            "quick": options.quick,
            "rounds": options.rounds,
            "only": list(options.only),
            "seed": options.seed,
        },
        "value_dim": outcome.workload.value_dim,
        "goals": [standing.document() for standing in outcome.standings],
        "cases": [one.document() for one in outcome.measured],
        "failed": failed_document(outcome.failed),
        "peers_missing": outcome.peers_missing,
    }


def lines(outcome: Outcome) -> list[str]:
    """The report for people."""
    here = machine.describe(torch.device("cpu"))
    out = [f"{here['model']}, {here['cores']} cores; {outcome.workload.value_dim} columns of float32"]
    if outcome.measured:
        out += ["", *table(_HEADER, [row for one in outcome.measured for row in _rows(one)])]
        out.append(f"beside local: how many times longer than {LOCAL}, the median of rounds")
    said = [standing for standing in outcome.standings if standing.measured is not None or not outcome.options.only]
    out += ["", *goal_lines(said)] if said else []
    if outcome.peers_missing:
        out += ["", f"peers that are not installed: {', '.join(outcome.peers_missing)}; to get them: {peers.INSTALL}"]
    return out


def _rows(one: Measured) -> list[tuple[str, ...]]:
    return [
        (
            "" if number else one.work.name,
            "" if number else f"{one.threads}",
            name,
            f"{times.median_ms:.2f}",
            f"{times.quantile_ms(0.95):.2f}",
            f"{times.quantile_ms(0.99):.2f}",
            f"{one.ratio(name, LOCAL):.2f}",
        )
        for number, (name, times) in enumerate(one.times.items())
    ]
