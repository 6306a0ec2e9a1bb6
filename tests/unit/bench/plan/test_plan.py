"""`mempool bench plan` at sizes that take seconds: constants come of it and are tried; what is wrong is not timed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mempool
from mempool.bench.plan import command, fitting, points, run
from mempool.bench.plan.fitting import Measured, machine_of, tried
from mempool.bench.plan.points import EMBEDDED, GRPC, KERNELS, NEAR, Point, Workload
from mempool.bench.processes.pool import PoolProcess
from mempool.bench.run import OptionsError
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.bench.train.tables import LocalTable
from mempool.sizing import Machine
from mempool.sizing.fit import total
from mempool.sizing.times import here_s
from mempool.sizing.traffic import client_amounts
from tests.unit.sizing.machines import MACHINE

TINY = Workload(
    table_bytes=256 * 32 * 4,
    widths=(8, 32),
    other_widths=(16,),
    shapes=(Shape(2, 2), Shape(4, 4)),
    other_shapes=(Shape(3, 2),),
    shards={EMBEDDED: (1, 2), GRPC: (1, 2)},
    other_shards={EMBEDDED: (3,), GRPC: ()},
    kernel_widths=(8, 32),
    kernel_shapes=(Shape(2, 2), Shape(4, 4)),
    copy_bytes=1 << 12,
    budget_s=5.0,
    batch_s=0.001,
)


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool in a process of its own takes seconds to start; it is measured by the same lines as an embedded one."""

    @contextmanager
    def process(*, shards: int, memory_bytes: int) -> Iterator[PoolProcess]:
        assert memory_bytes > 2**30
        yield PoolProcess(f"{shards}", [])

    def connected(address: str, *, near: bool) -> mempool.Pool:
        assert not near
        return mempool.local(shards=int(address), device="cpu", timeout_s=60)

    monkeypatch.setattr(points, "pool_process", process)
    monkeypatch.setattr(points, "connected", connected)


def test_a_run_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.bench_plan(run.Options(rounds=1), out=tmp_path, workload=TINY) == 0
    said = capsys.readouterr()
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"{found['machine']['name']}-plan.json"
    assert list(found) == [
        "format", "mempool", "machine", "versions", "implementation", "threads", "options", "table_bytes", "goals",
        "median_error", "median_error_by_path", "constants", "fitted", "tried", "failed",
    ]  # fmt: skip
    assert found["failed"] == []
    machine = Machine.of(found, where="x")
    assert list(machine.paths) == [EMBEDDED, GRPC]
    assert machine.name == found["machine"]["name"]
    # 1 shard, and 2 by columns and by rows; 2 widths, 2 shapes, 2 calls. Kernels: 2 widths, 2 shapes, 2 calls, twice.
    by = {way: [one for one in found["fitted"] if one["path"] == way] for way in (EMBEDDED, GRPC, KERNELS)}
    assert {way: len(points) for way, points in by.items()} == {EMBEDDED: 24, GRPC: 24, KERNELS: 16}
    assert all(one["client_cpu_ms"] > 0 for one in by[EMBEDDED])
    # Other widths and shapes on 1 shard, and, embedded, on 3.
    assert [(one["path"], one["shards"], one["call"]) for one in found["tried"]] == [
        *((EMBEDDED, 1, "gather"), (EMBEDDED, 1, "step")),
        *((EMBEDDED, 3, "gather"), (EMBEDDED, 3, "step")) * 2,
        *((GRPC, 1, "gather"), (GRPC, 1, "step")),
    ]
    for one in found["tried"]:
        assert one["error"] == pytest.approx(abs(one["predicted_ms"] / one["measured_ms"] - 1))
        assert (one["bags"], one["pairs"], one["value_dim"]) == (3, 2, 16)
    assert f"embedded: median error {found['median_error_by_path'][EMBEDDED]:.0%}" in said.out
    assert "predicted times at other points, median error" in said.out
    costs = [line.split()[:2] for line in said.out.splitlines() if line.split()[1:2] in (["gather"], ["step"])]
    assert costs[:4] == [[path, call] for path in (EMBEDDED, GRPC) for call in ("gather", "step")]


def test_constants_of_an_earlier_run_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    options = run.Options(rounds=1, only=(EMBEDDED,), machine=MACHINE)
    assert command.bench_plan(options, as_json=True, workload=TINY) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fitted"], len(found["tried"])) == ([], 6)
    assert found["constants"] == MACHINE.document()
    assert found["options"]["given_constants"]


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalTable, "commit", lambda _: None)
    outcome = run.run(run.Options(rounds=1, only=(EMBEDDED,)), say=lambda _: None, workload=TINY)
    assert [error.case for error in outcome.failed] == [EMBEDDED]
    assert (outcome.machine, outcome.tried, outcome.times) == (None, [], {})


def test_paths_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionsError, match="unknown cases rdma; known: embedded, gRPC, shared-memory"):
        run.Options(only=("rdma",))
    monkeypatch.setattr(run, "supported", lambda: False)
    with pytest.raises(OptionsError, match="shared-memory: this system has no memory"):
        run.Options(only=(NEAR,))


def made(path: str, call: Any, shards: int, layout: Any, width: int, shape: Shape, *, fits: bool) -> Point:
    schema = points.mempool_schema(TableSize(2**16, width), layout, blocks=8 if layout == "columns" else 1)
    return Point(path, call, shape, schema, shards, fits, lambda _: None, (1,) if path == GRPC else ())


def test_a_machine_that_is_as_its_constants_is_found_again() -> None:
    shapes = (Shape(8, 32), Shape(256, 32), Shape(1024, 128))
    alone = [
        made(KERNELS, call, 1, "columns", width, shape, fits=True)
        for width in (16, 64, 256)
        for shape in shapes
        for call in ("gather", "step")
    ]
    fitted = [
        made(GRPC, call, shards, layout, width, shape, fits=True)
        for shards, layout in ((1, "columns"), (4, "columns"), (4, "rows"))
        for width in (64, 256)
        for shape in shapes
        for call in ("gather", "step")
    ]
    others = [
        made(GRPC, call, 2, layout, 128, Shape(64, 32), fits=False)
        for layout in ("columns", "rows")
        for call in ("gather", "step")
    ]
    no_path = MACHINE.paths[GRPC]
    times = {}
    for point in alone:
        given: Any = {"bags": point.bags, "pairs": point.pairs, "cores": 2}
        calls = total(no_path.gather.wall, client_amounts(point.split, bags=point.bags, pairs=point.pairs))
        times[point] = Measured(1e3 * (here_s(MACHINE, GRPC, point.call, point.split, **given) - calls))
    for point in fitted:
        given = {"bags": point.bags, "pairs": point.pairs, "cores": 2}
        times[point] = Measured(1e3 * here_s(MACHINE, GRPC, point.call, point.split, **given), 1.0, 1.0)
    found = machine_of("again", times, copy_bytes_per_s=1e10, cores=2)
    truth = {
        point: Measured(
            1e3 * here_s(MACHINE, GRPC, point.call, point.split, bags=point.bags, pairs=point.pairs, cores=2)
        )
        for point in others
    }
    for one in tried(found, truth, cores=2):
        assert one.error < 0.01, one.point.name
    assert fitting.median_error([]) is None
