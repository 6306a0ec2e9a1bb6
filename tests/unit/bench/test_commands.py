"""`mempool bench serve` and `train` on the command line, and their bars."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mempool.bench.bars import bars
from mempool.bench.serve import command as serve
from mempool.bench.serve.run import Options as ServeOptions
from mempool.bench.train import command as train
from mempool.bench.train.run import Options as TrainOptions
from mempool.cli.app import app

_HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.parametrize("code", [0, 1])
def test_options_and_exit_codes(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    given: list[tuple[Any, dict[str, Any]]] = []

    def called(options: Any, **rest: Any) -> int:
        given.append((options, rest))
        return code

    monkeypatch.setattr(serve, "bench_serve", called)
    monkeypatch.setattr(train, "bench_train", called)
    line = ["--quick", "--rounds", "3", "--json", "--out", "x", "--only"]
    assert CliRunner().invoke(app, ["bench", "serve", "--no-ray", *line, "lookups,load"]).exit_code == code
    assert CliRunner().invoke(app, ["bench", "train", *line, "steps"]).exit_code == code
    rest = {"as_json": True, "out": Path("x"), "plot_file": None}
    assert given == [
        (ServeOptions(quick=True, rounds=3, only=("lookups", "load"), ray=False), rest),
        (TrainOptions(quick=True, rounds=3, only=("steps",)), rest),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--only", "lookup"], "unknown cases lookup; known: lookups, shards, load"),
        (["train", "--only", "step"], "unknown cases step; known: steps, shards, peers, layers"),
        pytest.param(
            ["serve", "--plot", "x.png"], "--plot needs matplotlib",
            marks=pytest.mark.skipif(_HAS_MATPLOTLIB, reason="matplotlib is installed"),
        ),
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.skipif(not _HAS_MATPLOTLIB, reason="matplotlib is not installed")
@pytest.mark.filterwarnings("default")
def test_the_bars_are_a_png(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bars.png"
    figures = {"median_ms": 1.0, "p95_ms": 2.0}
    found = {"machine": {"model": "a processor", "cores": 2}}
    contenders = {"torch embedding_bag": figures, "mempool embedded": figures, "grpc.aio echo": figures}
    bars(found, [("1024 bags x 128", contenders), ("8 bags x 32", contenders)], "a look-up", path)
    assert path.read_bytes().startswith(b"\x89PNG")
