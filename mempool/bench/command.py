"""One run as a command: what is printed, which files are written, how it ends. Shared by command lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
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
    show(found, report.lines(outcome), as_json=as_json)
    if out is not None:
        say(f"result: {report.write(found, out)}")
    if plot_file is not None:
        plot(found, plot_file)
        say(f"plot: {plot_file}")
    return exit_code(outcome.failed)


def require_plot(plot_file: Path | None) -> None:
    """Raises OptionsError where a plot is asked for, and there is no matplotlib: before anything is measured."""
    if plot_file is not None and not can_plot():
        raise OptionsError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def show(found: dict[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Print a result, or the report of it."""
    print(json.dumps(found, indent=1, allow_nan=False) if as_json else "\n".join(["", *lines]))


def exit_code(failed: Sequence[GateError]) -> int:
    """1 if anything was wrong, which is said on stderr."""
    for error in failed:
        print(f"mempool: wrong, so not timed: {error}", file=sys.stderr)
    return FAILED if failed else 0


def say(line: str) -> None:
    """Progress goes where it disturbs no JSON."""
    print(line, file=sys.stderr, flush=True)
