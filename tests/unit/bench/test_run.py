"""Whole runs at sizes that take seconds: what is said, written and drawn, and how wrong results end them."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mempool import kernels
from mempool.bench import command, machine, peers, plot, report
from mempool.bench.cases import FAMILIES, Workload
from mempool.bench.goals import standings
from mempool.bench.run import Options, OptionsError, run
from mempool.cli.app import app


def silent(_: str) -> None:
    pass


@pytest.mark.usefixtures("no_peers")
def test_a_whole_run_and_its_file(tiny: Workload, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command.bench_kernels(Options(rounds=2, quick=True), out=tmp_path, workload=tiny)
    said = capsys.readouterr()
    assert code == 0, said.err
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"{found['machine']['name']}-partly.json"
    assert list(found) == [
        "format", "mempool", "machine", "versions", "implementation", "threads", "options", "copy_bytes_per_s",
        "matmul_flops_per_s", "goals", "cases", "failed", "skipped", "peers_missing",
    ]  # fmt: skip
    assert {case["family"] for case in found["cases"]} == set(FAMILIES)
    assert found["peers_missing"] == ["fbgemm_gpu", "faiss"]
    assert (found["failed"], found["implementation"]) == ([], "torch")
    assert found["copy_bytes_per_s"] > 0 < found["matmul_flops_per_s"]
    for case in found["cases"]:
        own = case["contenders"]["mempool"]
        assert case["rounds"] == 2
        assert 0 < own["min_ms"] <= own["median_ms"] <= own["max_ms"]
        assert (own["share_of_copy"] is None) == (case["ceiling"] == "matmul")
        for name, ratio in case["ratios"].items():
            peer = case["contenders"][name]
            assert peer["min_ms"] / own["max_ms"] <= ratio <= peer["max_ms"] / own["min_ms"]
        assert case["name"] in said.out
    assert {goal["standing"] for goal in found["goals"]} <= {"ok", "below", "not measured"}
    by_peer = {goal["what"]: goal["standing"] for goal in found["goals"]}
    assert by_peer["flat top-32 beside faiss"] == "not measured"
    assert "peers that are not installed: fbgemm_gpu, faiss; to get them: `make bench`" in said.out


@pytest.mark.usefixtures("no_peers")
def test_a_run_of_every_size_says_what_does_not_fit(tiny: Workload, tmp_path: Path) -> None:
    outcome = run(Options(rounds=1, only=("rows", "weight-gradient", "forward")), say=silent, workload=tiny)
    assert outcome.failed == []
    sizes = {(one.case.num_slots, one.case.value_dim, one.case.bag_size, one.case.ids) for one in outcome.measured}
    assert {(256, 16, 4, "uniform"), (256, 16, 4, "zipf"), (64, 128, 4, "uniform"), (256, 16, 2, "uniform")} <= sizes
    assert [line for line in outcome.skipped if not line.startswith("forward float32 of 256 x 128")] == []
    found = report.document(outcome)
    assert found["skipped"] == outcome.skipped
    assert report.write({**found, "options": {"quick": False, "only": []}}, tmp_path).name.endswith("-cores.json")


@pytest.mark.usefixtures("no_peers")
def test_a_wrong_result_is_not_timed(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = kernels.weighted_sum
    monkeypatch.setattr(kernels, "weighted_sum", lambda *given, **dtype: right(*given, **dtype) * 1.01)
    code = command.bench_kernels(Options(rounds=2, quick=True, only=("forward", "rows")), workload=tiny)
    said = capsys.readouterr()
    assert code == 1
    wrong = "mempool is off by 0.01 of the largest number, 1e-05 is allowed"
    assert f"forward float32 2^8x16 bags of 4: {wrong}" in said.err
    assert "forward" not in said.out
    assert "rows float32" in said.out, "other cases go on"


@pytest.mark.usefixtures("no_peers")
def test_wrong_results_stand_in_the_file(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gather_rows", lambda paged, ids: torch.full((ids.numel(), paged.width), torch.nan))
    outcome = run(Options(rounds=1, quick=True, only=("rows",)), say=silent, workload=tiny)
    assert outcome.measured == []
    found = report.document(outcome)
    json.dumps(found, allow_nan=False)
    assert found["cases"] == []
    assert found["failed"][0]["wrong"] == [{"contender": "mempool", "error": "nan", "tolerance": 1e-5}]


@pytest.mark.usefixtures("no_peers")
def test_a_wrong_step_is_found(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.fused_step

    def twice(*given: object) -> None:
        right(*given)  # type: ignore[arg-type]
        right(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "fused_step", twice)
    outcome = run(Options(rounds=1, quick=True, only=("commit", "update")), say=silent, workload=tiny)
    assert {error.case.split()[1] for error in outcome.failed} >= set(kernels.ALGORITHMS)
    assert [one.case.name for one in outcome.measured if one.case.what in kernels.ALGORITHMS] == []


@pytest.mark.usefixtures("no_peers")
def test_a_step_of_bfloat16_that_is_too_small_is_found(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.fused_step

    def small(*given: object) -> None:
        *others, step = given
        right(*others, dataclasses.replace(step, lr=0.75 * step.lr))  # type: ignore[arg-type, type-var, attr-defined]

    monkeypatch.setattr(kernels, "fused_step", small)
    outcome = run(Options(rounds=1, quick=True, only=("commit",)), say=silent, workload=tiny)
    assert len([error for error in outcome.failed if "bfloat16" in error.case]) == 2


@pytest.mark.skipif(any(not peers.installed(name) for name in peers.PACKAGES["cpu"]), reason="peers are not installed")
@pytest.mark.filterwarnings("default")
def test_every_peer_passes_the_gate(tiny: Workload) -> None:
    outcome = run(Options(rounds=1), say=silent, workload=tiny)
    assert outcome.failed == []
    ran = {name for one in outcome.measured for name in one.times}
    assert {"mempool", "fbgemm", "faiss IndexFlatIP", "torch embedding_bag", "torch sparse"} <= ran


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionsError, match="unknown cases backward; known: forward, rows"):
        Options(only=("backward",))
    with pytest.raises(OptionsError, match="rounds must be at least 1, got 0"):
        Options(rounds=0)
    with pytest.raises(OptionsError, match="device must be cpu or cuda, got 'tpu'"):
        Options(device="tpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "backward"], "unknown cases backward"),
        (["--device", "tpu"], "device must be"),
        pytest.param(
            ["--plot", "x.png"], "--plot needs matplotlib",
            marks=pytest.mark.skipif(plot.can_plot(), reason="matplotlib is installed"),
        ),
    ],
)  # fmt: skip
def test_usage_errors_of_the_command(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize("code", [0, 1])
def test_exit_code_and_options_of_the_command(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    given = {}

    def called(options: Options, **rest: object) -> int:
        given.update({"options": options, **rest})
        return code

    monkeypatch.setattr(command, "bench_kernels", called)
    line = ["bench", "kernels", "--quick", "--rounds", "3", "--only", "rows,forward", "--json", "--out", "x"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == code
    assert given == {
        "options": Options(quick=True, rounds=3, only=("rows", "forward")),
        "as_json": True,
        "out": Path("x"),
        "plot_file": None,
    }


def test_needs_no_package_of_the_server() -> None:
    missing = ["typer", "rich", "pydantic", "ray", "grpc", "matplotlib", "fbgemm_gpu", "faiss", "google.protobuf"]
    script = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({missing!r})); "
        "sys.argv = ['bench', '--only', 'backward']; runpy.run_module('mempool.bench', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "unknown cases backward" in done.stderr


def test_machines_are_named_by_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-xeon-cpu-2-20ghz"
    assert machine.slug("") == "unknown"
    monkeypatch.setattr(machine, "processor", lambda: "AMD EPYC")
    monkeypatch.setattr(machine, "num_cores", lambda: 2)
    assert machine.describe(torch.device("cpu"))["name"] == "amd-epyc-2-cores"


def test_goals_of_a_run_without_cases() -> None:
    for device in ("cpu", "cuda"):
        assert {standing.standing for standing in standings(device, [])} == {"not measured"}


@pytest.mark.usefixtures("no_peers")
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.filterwarnings("default")
def test_the_plot_is_a_png(tiny: Workload, tmp_path: Path) -> None:
    path = tmp_path / "new" / "roofline.png"
    options = Options(rounds=1, quick=True, only=("forward", "product-topk"))
    assert command.bench_kernels(options, plot_file=path, workload=tiny) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
