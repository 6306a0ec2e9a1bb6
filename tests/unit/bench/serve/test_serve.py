"""`mempool bench serve` at sizes that take seconds: contenders are right, figures have stable keys, nothing is left."""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mempool
from mempool.bench.gate import GateError
from mempool.bench.processes.child import Child, ChildError
from mempool.bench.processes.pool import PoolProcess, connected, pool_process
from mempool.bench.serve import callers, client, command, load, lookups, report, run
from mempool.bench.serve.contenders import LookUp, echoes, here, pools, rpc
from mempool.bench.serve.shapes import Pairs, Shape, TableSize, drawn_pairs
from tests.support.waiting import until

TABLE = TableSize(64, 8)
TINY = run.Workload(
    table=TABLE,
    shapes=(Shape(4, 3), Shape(2, 2)),
    budget_s=5.0,
    batch_s=0.001,
    clients=(1,),
    spells=1,
    spell_s=0.01,
    settle_s=0.0,
)
LOAD_KEYS = [
    "target", "shape", "clients", "loop", "offered_per_s", "calls_per_s", "calls", "median_ms", "p95_ms", "p99_ms",
    "min_ms", "max_ms", "unserved", "server_cpu_ms", "stages",
]  # fmt: skip


class ThreadChild:
    """A client in a thread of this process: what it is asked and answers goes through JSON all the same. Its pid is
    that of a process which only waits, and may be stopped."""

    def __init__(
        self, what: str, arguments: dict[str, Any], *, variables: dict[str, str], name: str = "", **_: float
    ) -> None:
        served = {"mempool.bench.serve.client:serve": client.serve, "mempool.bench.serve.callers:serve": callers.serve}
        assert arguments.get("kind", "") == name
        assert variables["OMP_NUM_THREADS"] == "1"
        self._waiting = subprocess.Popen(["sleep", "600"])
        self.pid = self._waiting.pid
        asked: SimpleQueue[str] = SimpleQueue()
        answers: SimpleQueue[str] = SimpleQueue()
        parent = SimpleNamespace(
            say=lambda message: answers.put(json.dumps(message)), hear=lambda: json.loads(asked.get(timeout=30.0))
        )
        given = json.loads(json.dumps(arguments))
        self._thread = threading.Thread(target=served[what], args=(parent,), kwargs=given, daemon=True)
        self._thread.start()
        self.say = lambda message: asked.put(json.dumps(message))
        self.hear = lambda timeout_s=30.0: json.loads(answers.get(timeout=timeout_s))

    def __enter__(self) -> "ThreadChild":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        assert _state(self.pid) != "T", "one that stands still does not learn that it shall end"
        self.say(None)
        self._thread.join(30.0)
        assert not self._thread.is_alive()
        self._waiting.kill()
        self._waiting.wait()


def _children() -> set[str]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(listed.read_text().split()) if listed.exists() else set()


def _state(pid: int) -> str:
    """One letter; "T": it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


@pytest.fixture(autouse=True)
def _nothing_is_left(served: PoolProcess) -> Iterator[None]:  # noqa: ARG001  # it starts before, and stays
    before = _children()
    yield
    left = _children() - before
    assert [pid for pid in left if b"mempool.bench" in _command(pid)] == []


@pytest.fixture(scope="module")
def served() -> Iterator[PoolProcess]:
    with pool_process() as process:
        yield process


@pytest.fixture
def one_pool(served: PoolProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same processes for each pool: they take seconds to start."""

    @contextmanager
    def again(**_: object) -> Iterator[PoolProcess]:
        try:
            yield served
        finally:
            with mempool.connect(served.address) as pool:
                pool.drop_table("facts")

    monkeypatch.setattr(pools, "pool_process", again)


@pytest.mark.usefixtures("one_pool")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_and_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "Child", ThreadChild)
    kinds = {kind: opened for kind, opened in callers.KINDS.items() if kind not in pools.REMOTE[1:]}
    kinds[pools.GRPC] = pools.served
    for module in (callers, run):
        monkeypatch.setattr(module, "KINDS", kinds)
    options = run.Options(rounds=2, only=("lookups",), ray=False)
    assert command.bench_serve(options, out=tmp_path, workload=TINY) == 0
    said = capsys.readouterr()
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"{found['machine']['name']}-serve-partly.json"
    assert list(found) == [
        "format", "mempool", "machine", "versions", "implementation", "threads", "options", "table", "goals", "lookups",
        "shards", "load", "stages", "flood", "failed", "skipped",
    ]  # fmt: skip
    assert (found["failed"], found["skipped"]) == ([], [])
    assert [shape["name"] for shape in found["lookups"]] == ["4x3", "2x2"]
    for shape in found["lookups"]:
        assert list(shape["contenders"]) == [
            "torch embedding_bag", "mempool's kernel", "mempool embedded", "mempool over gRPC",
            "mempool over TCP", "mempool, shared memory", "torch.distributed.rpc", "grpc.aio echo", "Unix socket echo",
        ]  # fmt: skip
        assert (shape["rounds"], shape["calls_a_round"]) == (2, 5)
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

    caller = callers.Within(TABLE, [*right, LookUp("wrong", TABLE, wrong)])
    with pytest.raises(GateError, match=r"4x3: wrong is off by 0.01"):
        lookups.measure(Shape(4, 3), TABLE, [caller], rounds=2, budget_s=1.0, batch_s=0.0, seed=0)
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
    monkeypatch.setattr(run, "_callers", lambda *_: [callers.Within(TABLE, [*right, wrong])])
    assert command.bench_serve(run.Options(rounds=1, only=("lookups",)), as_json=True, workload=TINY) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["lookups"] == []
    assert [line["name"] for line in found["failed"]] == ["4x3", "2x2"]
    assert "wrong, so not timed: 4x3: wrong is off by nan" in said.err


def test_what_goes_by_grpc_all_the_same_is_not_called_shared_memory(
    monkeypatch: pytest.MonkeyPatch, served: PoolProcess
) -> None:
    monkeypatch.setattr(pools, "_LINE_TIMEOUT_S", 0.1)
    with connected(served.address, near=False) as pool:
        table = pools.made(pool, TABLE)
        try:
            until(lambda: not pool.status().shards[0].near_clients)  # of the tests before
            until(lambda: not pool.status().shards[0].tcp_line_clients)
            assert not any(pools.goes(way, pool, table) for way in (pools.NEAR, pools.TCP))
            monkeypatch.undo()
            for way in (pools.NEAR, pools.TCP):
                with pools.client(served.address, way) as other:
                    assert pools.goes(way, other, other.table("facts"))
        finally:
            pool.drop_table("facts")


def test_a_peer_that_does_not_start_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def broken(_: TableSize) -> Iterator[list[LookUp]]:
        raise RuntimeError("no such interface")
        yield []

    monkeypatch.setattr(callers, "Child", ThreadChild)
    monkeypatch.setattr(callers, "KINDS", {rpc.RPC: broken, pools.EMBEDDED: broken})
    outcome = run.Outcome(run.Options(ray=False), TINY)
    monkeypatch.setattr(run, "KINDS", [rpc.RPC])
    with ExitStack() as stack:
        assert run._callers(stack, outcome, lambda _: None) == []
    said = "torch.distributed.rpc does not start: RuntimeError: no such interface"
    assert outcome.skipped == [said]
    monkeypatch.setattr(run, "KINDS", [pools.EMBEDDED])
    with (
        ExitStack() as stack,
        pytest.raises(ChildError, match="mempool embedded does not start: RuntimeError: no such"),
    ):
        run._callers(stack, outcome, lambda _: None)


def test_turns_move_on_and_nobody_gets_the_pairs_of_the_call_before() -> None:
    asked: list[tuple[str, list[int]]] = []

    class Recorded(callers.Within):
        def turn(self, name: str, sets: Sequence[int]) -> list[float]:
            asked.append((name, list(sets)))
            return [5.0, 1.0, 2.0, 3.0, 100.0]

    found = here.here(TABLE)
    apart = [Recorded(TABLE, [one]) for one in found]
    measured = lookups.measure(Shape(2, 2), TABLE, apart, rounds=40, budget_s=60.0, batch_s=0.0, seed=0)
    assert [name for name, _ in asked] == [found[turn // 2 % 2 ^ turn % 2].name for turn in range(84)]
    assert all(len(set(sets)) == 1 + lookups.TURN_CALLS for _, sets in asked), (
        "rows of a turn's calls are not there yet"
    )
    assert all(before[-1] != behind[0] for (_, before), (_, behind) in itertools.pairwise(asked))
    for one in found:
        assert measured.times[one.name].rounds_ms == (3.0,) * 40
        assert measured.calls[one.name].quantile_ms(0.99) == 100.0


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is stopped elsewhere")
def test_a_caller_stands_still_with_its_servers_but_for_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    server = subprocess.Popen(["sleep", "600"])
    states: list[list[str]] = []

    def states_now() -> list[str]:
        return [_state(pid) for pid in (server.pid, caller._child.pid)]

    def look_up(pairs: Pairs) -> torch.Tensor:
        states.append(states_now())
        return right.run(pairs)

    @contextmanager
    def opened(_: TableSize) -> Iterator[list[LookUp]]:
        yield [LookUp("one", TABLE, look_up, [server.pid])]

    (right, _) = here.here(TABLE)
    monkeypatch.setattr(callers, "Child", ThreadChild)
    monkeypatch.setattr(callers, "KINDS", {"some": opened})
    try:
        with callers.Apart("some", TABLE) as caller:
            caller.open()
            until(lambda: states_now() == ["T", "T"])
            (check,) = caller.prepare(Shape(2, 2), seed=0)
            assert check.passed
            until(lambda: states_now() == ["T", "T"])
            assert len(caller.turn("one", [3, 1, 2])) == 2
            until(lambda: states_now() == ["T", "T"])
            assert caller.spend("one", 2).client_ms is not None
            assert [state for both in states for state in both if state == "T"] == []
            assert len(states) == 1 + 3 + 3
            with pytest.raises(TypeError, match="not JSON serializable"):
                caller._asked("turn", object())
            until(lambda: states_now() == ["T", "T"])
        assert _state(server.pid) != "T"
    finally:
        server.kill()
        server.wait()


def test_report_of_a_run_without_figures() -> None:
    outcome = run.Outcome(run.Options(), TINY, skipped=["Ray actor: not installed"])
    assert report.lines(outcome)[-1] == "not as planned: Ray actor: not installed"


def test_a_process_that_ends_or_does_not_answer_is_named() -> None:
    with Child("mempool.bench.nothing:serve") as child:
        with pytest.raises(ChildError, match=r"mempool.bench.nothing:serve\) ended with 1"):
            child.hear()
        with pytest.raises(ChildError, match="ended with 1"):
            child.say("anything")
    with (
        Child("mempool.bench.processes.echoes:serve_grpc") as child,
        pytest.raises(ChildError, match="did not answer within 0 s"),
    ):
        child.hear(timeout_s=0.0)


@pytest.mark.usefixtures("one_pool")
def test_load_of_many_clients_and_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "Child", ThreadChild)
    outcome = run.run(run.Options(rounds=1, only=("load",)), say=lambda _: None, workload=TINY)
    assert outcome.failed == []
    found = report.document(outcome)
    asked = {(one["target"], one["shape"], one["loop"]) for one in found["load"]}
    both = {(target, shape) for target in (*pools.REMOTE, echoes.GRPC_ECHO) for shape in ("4x3", "2x2")}
    alone = {(echoes.UNIX_ECHO, shape, "closed") for shape in ("4x3", "2x2")}
    assert asked == {(*pair, loop) for pair in both for loop in ("closed", "open")} | alone
    assert list(found["flood"]) == list(pools.REMOTE)
    assert all(list(both) == ["alone", "beside a flood"] for both in found["flood"].values())
    for one in [*found["load"], *(one for both in found["flood"].values() for one in both.values())]:
        assert list(one) == LOAD_KEYS
        assert one["calls"] >= 1
        assert 0 < one["median_ms"] <= one["p99_ms"] <= one["max_ms"]
        assert one["calls_per_s"] > 0
        assert (one["offered_per_s"] is None) == (one["loop"] == "closed")
    own = next(one for one in found["load"] if one["target"] == pools.GRPC)
    assert own["stages"]["kernel"]["count"] == own["calls"]
    assert found["stages"]["kernel"]["p99_ms"] > 0
    assert pools.GRPC in "\n".join(report.lines(outcome))
