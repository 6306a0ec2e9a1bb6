"""Constants are found again, read strictly, and times by them can be counted by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest

from mempool.config import SGD, TableConfig, resolve
from mempool.errors import ConfigError
from mempool.sizing import Hosts, Kernels, Machine, Model, Path, split
from mempool.sizing.fit import fitted, total
from mempool.sizing.times import here_s, step_time, wire_s
from mempool.sizing.traffic import client_amounts, update_amounts

from .machines import COSTS, MACHINE

TABLE = TableConfig(name="a", num_slots=2**20, value_dim=256, optimizer=SGD(0.1), layout="columns", block_dim=64)
MODEL = Model(heads=2, topk=8, tokens=100)
PAIRS = 1600


def test_constants_are_found_again_and_none_is_negative() -> None:
    points = [{"call": 1, "pair": pairs, "column": columns} for pairs in (10, 100, 1000) for columns in (8, 64)]
    constants = {"call": 2e-3, "pair": 3e-6, "column": 0.0}
    found = fitted(points, [total(constants, point) for point in points])
    assert found == pytest.approx(constants, rel=1e-6, abs=1e-12)
    down = fitted(points, [2e-3 - 1e-6 * point["pair"] for point in points], [2e-3] * len(points))
    assert all(seconds >= 0 for seconds in down.values())
    assert (down["pair"], down["column"]) == (0, 0)


def test_errors_count_by_what_was_measured() -> None:
    # Of two points that contradict each other, the one that was measured in more detail says more.
    assert fitted([{"call": 1}, {"call": 1}], [1.0, 2.0], [0.001, 1.0])["call"] == pytest.approx(1.0, rel=1e-3)


def test_a_call_on_the_machine() -> None:
    found = split(resolve(TABLE), 4)
    calls = 5e-3 + 3 * 2e-3 + 4 * PAIRS * 4e-8
    gather = PAIRS * 1e-8 + PAIRS * 64 * 4 * 1e-10
    given: dict[str, Any] = {"bags": 100, "pairs": PAIRS}
    assert here_s(MACHINE, "gRPC", "gather", found, cores=4, **given) == pytest.approx(calls + gather)
    assert here_s(MACHINE, "gRPC", "gather", found, cores=2, **given) == pytest.approx(calls + 2 * gather)
    turns = replace(COSTS, wall={**COSTS.wall, "sharing": 1.0})
    taking_turns = replace(MACHINE, paths={"gRPC": Path(gather=turns, step=turns)})
    assert here_s(taking_turns, "gRPC", "gather", found, cores=4, **given) == pytest.approx(calls + 4 * gather)
    update = update_amounts(found.busiest, found, pairs=PAIRS)
    touched = (update["byte"] - PAIRS * 256) / (2 * 256)
    assert PAIRS - 3 < touched < PAIRS, "a row that is drawn twice is written once"
    assert here_s(MACHINE, "gRPC", "step", found, cores=4, **given) == pytest.approx(
        calls + gather + 2e-8 * PAIRS + 2e-10 * update["byte"]
    )


def test_rows_are_sent_once_and_looked_at_by_each() -> None:
    rows = split(resolve(TABLE.model_copy(update={"layout": "rows"})), 4)
    assert client_amounts(rows, bags=100, pairs=PAIRS) == {
        "call": 1, "shard": 3, "pair": PAIRS, "sort": PAIRS, "filter": 4 * PAIRS, "column": 100 * 4 * 256,
    }  # fmt: skip
    columns = split(resolve(TABLE), 4)
    assert client_amounts(columns, bags=100, pairs=PAIRS) == {
        "call": 1, "shard": 3, "pair": 4 * PAIRS, "sort": 0, "filter": 0, "column": 100 * 256,
    }  # fmt: skip


def test_a_step_on_other_hosts_is_its_parts() -> None:
    found = split(resolve(TABLE), 4)
    one = step_time(MACHINE, "gRPC", found, MODEL, Hosts(shards=4, cores=4))
    assert one.client == pytest.approx(1e-3 + 3e-3 + 4 * PAIRS * 2e-8)
    assert one.calls == pytest.approx(2e-3 + PAIRS * 1e-8)
    assert one.waits == pytest.approx(5e-3 - 1e-3 - 2e-3)
    assert one.limit == "client"
    many = step_time(
        MACHINE, "gRPC", found, MODEL.model_copy(update={"trainers": 8, "layers": 3}), Hosts(shards=4, cores=4)
    )
    assert (many.client, many.waits) == pytest.approx((3 * one.client, 3 * one.waits))
    assert (many.calls, many.gather, many.update) == pytest.approx((24 * one.calls, 24 * one.gather, 24 * one.update))
    crowded = step_time(MACHINE, "gRPC", found, MODEL, Hosts(shards=4, cores=2))
    assert (crowded.calls, crowded.gather) == pytest.approx((2 * one.calls, 2 * one.gather))
    shared = step_time(MACHINE, "gRPC", found, MODEL, Hosts(shards=4, cores=4, memory_gb_per_s=0.1))
    assert shared.gather > 10 * one.gather


def test_the_narrower_network_counts() -> None:
    found = split(resolve(TABLE), 4)
    alone = wire_s(found, MODEL, Hosts(shards=1, latency_us=0, nic_gbit_per_s=8))
    sent = 4 * (PAIRS * 8 + 101 * 8 + PAIRS * 4) + 2 * 100 * 256 * 4
    assert alone == pytest.approx(sent / 1e9)
    beside = wire_s(found, MODEL.model_copy(update={"trainers": 8}), Hosts(shards=4, latency_us=0, nic_gbit_per_s=8))
    assert beside == pytest.approx(8 * alone), "four shards of one host answer eight trainers"
    far = wire_s(found, MODEL, Hosts(shards=1, latency_us=50, nic_gbit_per_s=8))
    assert far - alone == pytest.approx(8 * 50e-6)


def test_kernels_of_a_gpu_are_measured_or_guessed_by_bandwidth() -> None:
    found = split(resolve(TABLE), 4)
    on_cpu = step_time(MACHINE, "gRPC", found, MODEL, Hosts(shards=4))
    guessed = step_time(MACHINE, "gRPC", found, MODEL, Hosts(gpus=4, gpu_gb_per_s=3000))
    assert guessed.gather == pytest.approx(on_cpu.gather / 300)
    gpu = Kernels(gather={"row": 1e-11}, update={"row": 1e-10})
    measured = replace(MACHINE, kernels={**MACHINE.kernels, "cuda": gpu})
    assert step_time(measured, "gRPC", found, MODEL, Hosts(gpus=4)).update == pytest.approx(1e-10 * PAIRS)


def test_constants_are_kept_as_json() -> None:
    kept = json.loads(json.dumps(MACHINE.document()))
    assert Machine.of(kept, where="x") == MACHINE
    assert Machine.of({"constants": kept, "tried": []}, where="x") == MACHINE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"constants_format": 2}, "holds no constants of a machine in format 1"),
        ({"paths": {}}, "lacks kernels of the CPU, a path"),
        ({"kernels": {}}, "lacks kernels"),
        ({"copy_bytes_per_s": 0}, "the copy's bandwidth"),
        (
            {"kernels": {"cpu": {"gather": {"row": -1}, "update": {}}}},
            "damaged, or was edited: ValueError row = -1 is no",
        ),
        ({"kernels": {"cpu": {"gather": {"bits": 1}, "update": {}}}}, "unknown term 'bits'"),
        ({"kernels": {"cpu": {"gather": {"row": float("nan")}, "update": {}}}}, "row = nan is no number of seconds"),
        ({"paths": {"gRPC": {"gather": {}}}}, "KeyError"),
        ({"paths": [1]}, "AttributeError"),
    ],
)
def test_files_that_hold_none_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Machine.of({**MACHINE.document(), **change}, where="a.json")
    assert "a.json" in raised.value.message
    assert "mempool bench plan --out DIR" in raised.value.message


@pytest.mark.parametrize("held", [None, [], {}, {"constants": None}, {"constants": 3}])
def test_other_files_are_refused(held: object) -> None:
    with pytest.raises(ConfigError, match="x holds no constants of a machine"):
        Machine.of(held, where="x")
