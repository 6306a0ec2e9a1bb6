"""One run as a command: what is printed, which files are written, how it ends. Shared by command lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mempool.bench import report
from mempool.bench.cases import Workload
from mempool.bench.gate import GateError
from mempool.bench.plot import can_plot, plot
from mempool.bench.run import Options, OptionsError, run

FAILED = 1


def bench_kernels(
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
        out: Folder of the result file, made if it is missing.
        plot_file: The PNG.
        workload: As for ``run``.

    Returns:
        The exit code: 1 if any result was wrong.

    Raises:
        OptionsError: A plot is asked for, and there is no matplotlib.
    """
    require_plot(plot_file)
    outcome = run(options, say=say, workload=workload)
    found = report.document(outcome)
    return ended(
        found, report.lines(outcome), outcome.failed,
        as_json=as_json, out=out, plot_file=plot_file, draw=lambda file: plot(found, file),
    )  # fmt: skip


def require_plot(plot_file: Path | None) -> None:
    """Raises OptionsError where a plot is asked for, and there is no matplotlib: before anything is measured."""
    if plot_file is not None and not can_plot():
        raise OptionsError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def ended(
    found: dict[str, Any],
    lines: Sequence[str],
    failed: Sequence[GateError],
    *,
    as_json: bool,
    out: Path | None,
    what: str = "",
    plot_file: Path | None,
    draw: Callable[[Path], None],
) -> int:
    """How each run ends: its result is printed, or the report of it; files are written; what was wrong is on stderr.

    Args:
        found: What the result file holds.
        lines: The report for people.
        failed: What was wrong, and not timed.
        as_json: Print the result in place of the report.
        out: Folder of the result file.
        what: As for ``report.write``.
        plot_file: The PNG, which ``draw`` makes.

    Returns:
        The exit code: 1 if anything was wrong.
    """
    print(json.dumps(found, indent=1, allow_nan=False) if as_json else "\n".join(["", *lines]))
    if out is not None:
        say(f"result: {report.write(found, out, what)}")
    if plot_file is not None:
        draw(plot_file)
        say(f"plot: {plot_file}")
    for error in failed:
        print(f"mempool: wrong, so not timed: {error}", file=sys.stderr)
    return FAILED if failed else 0


def say(line: str) -> None:
    """Progress goes where it disturbs no JSON."""
    print(line, file=sys.stderr, flush=True)
