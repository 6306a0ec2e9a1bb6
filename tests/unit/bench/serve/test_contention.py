"""The benchmark of a trainer and a shard on the same cores: it runs, and prints no figure of wrong answers."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import mempool
from mempool.bench.serve import contention
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.load import Spent
from mempool.bench.serve.shapes import Shape, TableSize


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_both_ways_are_measured_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    contention.main(["--rounds", "2", "--slots", "256", "--threads", "1", "--clients", "0"])
    document = json.loads(capsys.readouterr().out)
    assert (document["beside_a_trainer"], document["goals"]) == ([], [])
    lines = document["figures"]
    assert {line["shape"] for line in lines} == set(contention.SHAPES)
    assert len({line["way"] for line in lines}) == 2
    assert all(line["rounds"] == 2 and 0 < line["gather_median_ms"] <= line["step_median_ms"] for line in lines)


def test_a_shard_that_answers_wrongly_is_not_measured() -> None:
    class Wrong:
        num_slots = 16

        def rows(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(ids), 4)

        def gather(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
            return 1.01 * weights.sum(1, keepdim=True).expand(-1, 4)

    with pytest.raises(RuntimeError, match="nothing was measured"):
        contention._Step(Wrong(), bags=8, pairs=2).check()


def test_clients_ask_at_a_share_of_what_they_reach_beside_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Clients:
        address, remote = "here", (pools.GRPC, pools.NEAR)

        def __init__(self, _: ExitStack, size: TableSize, shapes: list[Shape], **how: Any) -> None:
            asked.append((size.num_slots, [shape.name for shape in shapes], how["count"], how["threads"]))

        def closed(self, target: str, _: Shape, clients: int, length_s: float) -> Spent:
            asked.append((target, clients, length_s))
            return Spent([1.0], 200.0, 0, 1, None, {})

        def open(self, target: str, _: Shape, clients: int, length_s: float, rate: float, *more: Any) -> Spent:  # noqa: ARG002
            asked.append((target, clients, length_s, rate))
            return Spent([1.0] * 98 + [4.0] * 2, 140.0, 3, 100, None, {})

    @contextmanager
    def client(address: str, way: str) -> Iterator[mempool.Pool]:
        assert address == "here"
        with mempool.local(name="near" if way == pools.NEAR else "far", device="cpu") as pool:
            pool.create_table(mempool.TableConfig(name="facts", num_slots=256, value_dim=4))
            yield pool

    monkeypatch.setattr(contention, "Clients", Clients)
    monkeypatch.setattr(pools, "client", client)
    found = contention.beside(clients=2, seconds=0.5, threads=1, num_slots=256)
    each = [[(target, 2, 0.5), (target, 2, 0.5, pytest.approx(140.0))] for target in (pools.GRPC, pools.NEAR)]
    assert asked == [(256, ["64x32"], 2, 1), *each[0], *each[1]]
    assert [(one.target, one.offered_per_s, one.p99_over_p50, one.unserved) for one in found] == [
        (pools.GRPC, 140.0, 4.0, 3), (pools.NEAR, 140.0, 4.0, 3),
    ]  # fmt: skip
    assert all(0 < one.trainer_p50_ms <= one.trainer_p99_ms for one in found)
    stands = contention.standings([found[0], replace(found[1], p99_over_p50=5.1)], threads=1)
    assert [(goal.goal, goal.measured, goal.standing) for goal in stands] == [(5.0, 4.0, "ok"), (5.0, 5.1, "above")]


def test_a_trainer_that_fails_beside_clients_is_said() -> None:
    def fails() -> tuple[float, float]:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"), contention._training(fails, 1):  # type: ignore[arg-type]
        pass
