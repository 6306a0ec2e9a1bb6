"""``mempool bench``: speed of this machine. What is measured and how is ``mempool.bench``'s."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mempool.cli.outcome import UsageError, reported, undone_by_signals

app = typer.Typer(help="Measure the speed of this machine.", no_args_is_help=True)

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, with stable keys, and nothing else.")]
_Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write the result, named by machine.")]


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
    as_json: _AsJson = False,
    out: _Out = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Where to draw the roofline, a PNG.")
    ] = None,
) -> None:
    """Time every kernel beside its peers, after a correctness gate; ends with 1 if any result is wrong."""
    with reported():
        from mempool.bench.command import bench_kernels
        from mempool.bench.run import Options

        _run(
            lambda: bench_kernels(
                Options(device=device, quick=quick, rounds=rounds, only=_names(only)),
                as_json=as_json,
                out=out,
                plot_file=plot,
            )
        )


@app.command()
def serve(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, and shorter.")] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Turns of a contender; fewer where they take long.")
    ] = 300,
    only: Annotated[str, typer.Option("--only", metavar="NAMES", help="Parts, with commas: lookups,shards,load.")] = "",
    ray: Annotated[
        bool, typer.Option("--ray/--no-ray", help="Let a Ray actor take part; starts a Ray of its own.")
    ] = True,
    as_json: _AsJson = False,
    out: _Out = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Where to draw the look-ups' bars, a PNG.")
    ] = None,
) -> None:
    """Time look-ups in pools beside torch's rpc, a Ray actor and bare echoes; ends with 1 if any answer is wrong."""
    with reported():
        from mempool.bench.serve.command import bench_serve
        from mempool.bench.serve.run import Options

        _run(
            lambda: bench_serve(
                Options(quick=quick, rounds=rounds, only=_names(only), ray=ray),
                as_json=as_json,
                out=out,
                plot_file=plot,
            )
        )


@app.command()
def train(
    quick: Annotated[bool, typer.Option("--quick", help="One optimizer, and shorter.")] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Timed steps; fewer where they take long.")
    ] = 50,
    only: Annotated[
        str, typer.Option("--only", metavar="NAMES", help="Parts, with commas: steps,shards,peers,layers,overlap.")
    ] = "",
    as_json: _AsJson = False,
    out: _Out = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Where to draw the steps' bars, a PNG.")
    ] = None,
) -> None:
    """Time training steps in pools beside the same with the table in this process; ends with 1 if any is wrong."""
    with reported():
        from mempool.bench.train.command import bench_train
        from mempool.bench.train.run import Options

        _run(
            lambda: bench_train(
                Options(quick=quick, rounds=rounds, only=_names(only)), as_json=as_json, out=out, plot_file=plot
            )
        )


@app.command()
def plan(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Rounds of a path; fewer where they take long, but 5.")
    ] = 15,
    only: Annotated[
        str,
        typer.Option(
            "--only", metavar="NAMES", help="Paths, with commas: embedded,gRPC (if not given), shared-memory."
        ),
    ] = "",
    machine: Annotated[
        Path | None,
        typer.Option("--machine", metavar="FILE", help="Try the constants of this result; measure no new ones."),
    ] = None,
    as_json: _AsJson = False,
    out: _Out = None,
) -> None:
    """Measure the constants that `mempool plan` predicts by, and try them on other sizes and numbers of shards."""
    with reported():
        from mempool.bench.plan.command import bench_plan
        from mempool.bench.plan.run import Options
        from mempool.cli.plan import read_machine

        given = None if machine is None else read_machine(machine)
        _run(
            lambda: bench_plan(
                Options(quick=quick, rounds=rounds, only=_names(only), machine=given), as_json=as_json, out=out
            )
        )


def _names(only: str) -> tuple[str, ...]:
    return tuple(name for name in only.split(",") if name)


def _run(command: Callable[[], int]) -> None:
    """Ends with the command's exit code; a wrong option is a usage error."""
    from mempool.bench.run import OptionsError

    try:
        with undone_by_signals():  # what was started ends with it
            code = command()
    except OptionsError as error:
        raise UsageError(str(error)) from error
    if code:
        raise typer.Exit(code)
