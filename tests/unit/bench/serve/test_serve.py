"""`mempool bench serve` at sizes that take seconds: contenders are right, figures have stable keys, nothing is left."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mempool.bench.gate import GateError
from mempool.bench.processes.child import Child, ChildError
from mempool.bench.serve import command, lookups, report, run
from mempool.bench.serve.contenders import LookUp, echoes, here, rpc
from mempool.bench.serve.shapes import Pairs, Shape, TableSize, drawn_pairs

TABLE = TableSize(64, 8)
TINY = run.Workload(table=TABLE, shapes=(Shape(4, 3), Shape(2, 2)), budget_s=5.0, batch_s=0.001)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    pids = children.read_text().split() if children.exists() else []
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids]
    assert [line for line in lines if "mempool.bench" in line] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = run.Options(rounds=2, only=("lookups",), ray=False)
    assert command.bench_serve(options, out=tmp_path, workload=TINY) == 0
    said = capsys.readouterr()
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"{found['machine']['name']}-serve-partly.json"
    assert list(found) == [
        "format", "mempool", "machine", "versions", "implementation", "threads", "options", "table", "goals", "lookups",
        "failed", "skipped",
    ]  # fmt: skip
    assert (found["failed"], found["skipped"]) == ([], [])
    assert [shape["name"] for shape in found["lookups"]] == ["4x3", "2x2"]
    for shape in found["lookups"]:
        assert list(shape["contenders"]) == [
            "torch embedding_bag", "mempool's kernel", "mempool embedded", "mempool over gRPC",
            "torch.distributed.rpc", "grpc.aio echo", "Unix socket echo",
        ]  # fmt: skip
        assert shape["rounds"] == 2
        for name, figures in shape["contenders"].items():
            assert list(figures) == [
                "median_ms", "p95_ms", "p99_ms", "min_ms", "max_ms", "added_ms", "client_cpu_ms", "server_cpu_ms",
                "gate_error",
            ]  # fmt: skip
            assert 0 < figures["min_ms"] <= figures["median_ms"] <= figures["p95_ms"] <= figures["max_ms"]
            assert figures["gate_error"] < 1e-5
            assert name in said.out
        assert shape["contenders"]["torch embedding_bag"]["added_ms"] == 0.0
    large = found["lookups"][0]
    assert (large["request_bytes"], large["reply_bytes"]) == (4 * 3 * 8, 4 * 8 * 4)
    assert {goal["standing"] for goal in found["goals"]} == {"not measured"}, "no shape of the goals was measured"


def test_a_wrong_answer_is_not_timed() -> None:
    right = here.here(TABLE)
    asked: list[Pairs] = []

    def wrong(pairs: Pairs) -> torch.Tensor:
        asked.append(pairs)
        return 1.01 * right[0].run(pairs)

    contenders = [*right, LookUp("wrong", TABLE, wrong)]
    with pytest.raises(GateError, match=r"4x3: wrong is off by 0.01"):
        lookups.measure(Shape(4, 3), TABLE, contenders, rounds=2, budget_s=1.0, batch_s=0.0, seed=0)
    assert len(asked) == 1


def test_an_echo_that_answers_too_little_is_found() -> None:
    echo = echoes.Echo("short", TABLE, lambda _, wanted: bytes(wanted - 1))
    (pairs,) = drawn_pairs(Shape(2, 2), TABLE, seed=0, num_sets=1)
    assert not echo.check(pairs).passed


def test_wrong_answers_stand_in_the_file_and_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = here.here(TABLE)
    wrong = LookUp("wrong", TABLE, lambda pairs: torch.full((pairs.ids.shape[0], 8), torch.nan))
    monkeypatch.setattr(run, "_contenders", lambda *_: [*right, wrong])
    assert command.bench_serve(run.Options(rounds=1, only=("lookups",)), as_json=True, workload=TINY) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["lookups"] == []
    assert [line["name"] for line in found["failed"]] == ["4x3", "2x2"]
    assert "wrong, so not timed: 4x3: wrong is off by nan" in said.err


def test_a_peer_that_does_not_start_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: TableSize) -> None:
        raise RuntimeError("no such interface")

    monkeypatch.setattr(rpc, "rpc", broken)
    outcome = run.Outcome(run.Options(ray=False), TINY)
    run.add_peers(lambda _: pytest.fail("it does not start"), outcome, lambda _: None)
    assert outcome.skipped == ["torch.distributed.rpc: does not start: no such interface"]


def test_report_of_a_run_without_figures() -> None:
    outcome = run.Outcome(run.Options(), TINY, skipped=["Ray actor: not installed"])
    assert report.lines(outcome)[-1] == "not as planned: Ray actor: not installed"


def test_a_process_that_ends_or_does_not_answer_is_named() -> None:
    with Child("mempool.bench.nothing:serve") as child, pytest.raises(ChildError, match=r"mempool.bench.nothing:serve"):
        child.hear()
    with (
        Child("mempool.bench.processes.echoes:serve_grpc") as child,
        pytest.raises(ChildError, match="did not answer within 0 s"),
    ):
        child.hear(timeout_s=0.0)
