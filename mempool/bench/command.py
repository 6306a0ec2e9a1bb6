"""One run as a command: what is printed, which files are written, how it ends. Shared by both command lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mempool.bench import report
from mempool.bench.cases import Workload
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
    if plot_file is not None and not can_plot():
        raise OptionsError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    outcome = run(options, say=_say, workload=workload)
    found = report.document(outcome)
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        print("\n".join(["", *report.lines(outcome)]))
    if out is not None:
        _say(f"result: {report.write(found, out)}")
    if plot_file is not None:
        plot(found, plot_file)
        _say(f"plot: {plot_file}")
    for error in outcome.failed:
        print(f"mempool: wrong, so not timed: {error}", file=sys.stderr)
    return FAILED if outcome.failed else 0


def _say(line: str) -> None:
    """Progress goes where it disturbs no JSON."""
    print(line, file=sys.stderr, flush=True)
