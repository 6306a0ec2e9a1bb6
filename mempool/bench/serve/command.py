"""`mempool bench serve` as a command: what is printed, which files are written, how it ends."""

from __future__ import annotations

from pathlib import Path

from mempool.bench.bars import bars
from mempool.bench.command import ended, require_plot, say
from mempool.bench.serve import report
from mempool.bench.serve.run import Options, Workload, run


def bench_serve(
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
        out: Folder of the result file, ``<machine>-serve.json``, made if it is missing.
        plot_file: The PNG.
        workload: As for ``run``.

    Returns:
        The exit code: 1 if any answer was wrong.

    Raises:
        OptionsError: A plot is asked for, and there is no matplotlib.
        ChildError: A process of the benchmark does not start, or ends.
    """
    require_plot(plot_file)
    outcome = run(options, say=say, workload=workload)
    found = report.document(outcome)
    panels = [(f"{shape['bags']} bags x {shape['pairs']}", shape["contenders"]) for shape in found["lookups"]]
    return ended(
        found, report.lines(outcome), outcome.failed,
        as_json=as_json, out=out, what="serve", plot_file=plot_file,
        draw=lambda file: bars(found, panels, "a look-up", file),
    )  # fmt: skip
