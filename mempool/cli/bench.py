"""``mempool bench``: speed of this machine. What is measured and how is ``mempool.bench``'s."""

from pathlib import Path
from typing import Annotated

import typer

from mempool.cli.outcome import UsageError, reported

app = typer.Typer(help="Measure the speed of kernels on this machine.", no_args_is_help=True)


@app.callback()
def _main() -> None:
    pass


@app.command()
def kernels(
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where to run.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="The headline's cases only.")] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Rounds of a case; long cases end after fewer, but 5.")
    ] = 15,
    only: Annotated[
        str, typer.Option("--only", metavar="NAMES", help="Families of cases, with commas: forward,commit.")
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, with stable keys, and nothing else.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write the result, named by machine.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Where to draw the roofline, a PNG.")
    ] = None,
) -> None:
    """Time every kernel beside its peers, after a correctness gate; ends with 1 if any result is wrong."""
    with reported():
        from mempool.bench.command import bench_kernels
        from mempool.bench.run import Options, OptionsError

        families = tuple(name for name in only.split(",") if name)
        try:
            options = Options(device=device, quick=quick, rounds=rounds, only=families)
            code = bench_kernels(options, as_json=as_json, out=out, plot_file=plot)
        except OptionsError as error:
            raise UsageError(str(error)) from error
        if code:
            raise typer.Exit(code)
