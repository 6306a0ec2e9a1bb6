"""`mempool bench train` at sizes that take seconds: contenders are right, what is wrong is not timed, keys stay."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import mempool
from mempool.bench import peers
from mempool.bench.measuring import Times
from mempool.bench.run import OptionsError
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.bench.train import command, layers, measured, run
from mempool.bench.train.goals import standings
from mempool.bench.train.tables import LocalTable, pool_table

TINY = run.Workload(slots=64, peer_slots=256, value_dim=8, shape=Shape(4, 4), heads=2, shards=(1, 2), budget_s=5.0)
HERE = ["mempool's kernels here", "mempool embedded"]
POOLS = [*HERE, "mempool over gRPC", "mempool, shared memory"]
SHARDED = [
    HERE[0],
    *(f"mempool embedded, {by}, {count}" for by in ("columns", "rows") for count in ("1 shard", "2 shards")),
]


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool in a process of its own takes seconds to start; it is measured by the same lines as an embedded one."""

    @contextmanager
    def here(_: object) -> Iterator[dict[str, mempool.Pool]]:
        with mempool.local(name="served", device="cpu") as pool:
            yield dict.fromkeys(POOLS[2:], pool)

    monkeypatch.setattr(run, "_served", here)
    installed = peers.installed
    monkeypatch.setattr(peers, "installed", lambda name: name != "fbgemm_gpu" and installed(name))


def test_a_run_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.bench_train(run.Options(rounds=2), out=tmp_path, workload=TINY) == 0
    said = capsys.readouterr()
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"{found['machine']['name']}-train.json"
    assert list(found) == [
        "format", "mempool", "machine", "versions", "implementation", "options", "value_dim", "goals",
        "cases", "failed", "peers_missing",
    ]  # fmt: skip
    assert (found["failed"], found["peers_missing"]) == ([], ["fbgemm_gpu"])
    assert [(case["name"], list(case["contenders"])) for case in found["cases"]] == [
        ("gather sgd 4x4 of 2^6", POOLS),
        ("step sgd 4x4 of 2^6", POOLS),
        ("gather adagrad 4x4 of 2^6", POOLS),
        ("step adagrad 4x4 of 2^6", POOLS),
        ("sharded gather sgd 4x4 of 2^6", SHARDED),
        ("sharded step sgd 4x4 of 2^6", SHARDED),
        ("gather adagrad 4x4 of 2^8", [*HERE, "torch sparse"]),
        ("step adagrad 4x4 of 2^8", [*HERE, "torch sparse"]),
        ("layer sgd 4x4 of 2^6", POOLS),
        ("overlap sgd 4x4 of 2^6", [POOLS[0], *(name + how for name in POOLS[2:] for how in ("", ", overlapped"))]),
    ]
    for case in found["cases"]:
        assert case["rounds"] == 2
        assert case["name"] in said.out
        for figures in case["contenders"].values():
            assert list(figures) == [
                "median_ms", "p95_ms", "p99_ms", "min_ms", "max_ms", "beside_local", "gate_error",
            ]  # fmt: skip
            assert 0 < figures["min_ms"] <= figures["median_ms"] <= figures["max_ms"]
        assert case["contenders"]["mempool's kernels here"]["beside_local"] == 1.0
    standing = {goal["what"]: goal["standing"] for goal in found["goals"]}
    assert list(standing.values()).count("not measured") == 6, "FBGEMM is not installed, and no pool has 8 shards"


def test_goals_beside_fbgemm() -> None:
    both = [
        measured.Measured(
            measured.Work(family, "adagrad", 2**20, 1024, 128),
            {measured.EMBEDDED: Times((1.0, 2.0)), measured.FBGEMM: Times((times, 2 * times))},
            [],
            threads=2,
        )
        for family, times in ((measured.GATHER, 2.4), (measured.STEP, 7.4))
    ]
    found = [one for one in standings(both, slots=2**18, peer_slots=2**20) if one.measured is not None]
    assert [(one.goal, one.measured, one.standing) for one in found] == [(2.4, 2.4, "ok"), (7.5, 7.4, "below")]


def test_a_step_that_changes_nothing_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalTable, "commit", lambda _: None)
    assert command.bench_train(run.Options(rounds=1, only=("steps", "layers")), as_json=True, workload=TINY) == 1
    found = json.loads(capsys.readouterr().out)
    assert [case["name"] for case in found["cases"]] == ["gather sgd 4x4 of 2^6", "gather adagrad 4x4 of 2^6"]
    assert [line["name"] for line in found["failed"]] == [
        "step sgd 4x4 of 2^6", "step adagrad 4x4 of 2^6", "layer sgd 4x4 of 2^6",
    ]  # fmt: skip
    assert {wrong["contender"] for line in found["failed"] for wrong in line["wrong"]} == {"mempool's kernels here"}


def test_wrong_gradients_of_weights_and_wrong_outputs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LocalTable.weight_gradient
    monkeypatch.setattr(LocalTable, "weight_gradient", lambda *given: 1.01 * right(*given))
    outcome = run.run(run.Options(rounds=1, only=("steps",), quick=True), say=lambda _: None, workload=TINY)
    assert [error.case for error in outcome.failed] == ["step adagrad 4x4 of 2^6"]
    monkeypatch.undo()
    dense = layers.Model.forward
    monkeypatch.setattr(layers.Model, "forward", lambda model, x: dense(model, x) + 0.1 * torch.ones_like(x))
    with mempool.local(device="cpu") as pool:
        table = pool_table(pool, TableSize(64, 8), "sgd")
        model = layers.trained(8, table, heads=2, topk=2, seed=0)
        checks = layers.checked("layer", TableSize(64, 8), model, torch.randn(4, 8), torch.randn(4, 8))
    assert [check.passed for check in checks] == [False, True]


def test_parts_are_named() -> None:
    with pytest.raises(OptionsError, match="unknown cases layer; known: steps, shards, peers, layers, overlap"):
        run.Options(only=("layer",))
