"""The benchmark of a trainer and a shard on the same cores: it runs, and prints no figure of wrong answers."""

import json
from collections.abc import Iterator

import pytest
import torch

from mempool.bench.serve import contention


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_both_ways_are_measured_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    contention.main(["--rounds", "2", "--slots", "256", "--threads", "1"])
    document = json.loads(capsys.readouterr().out)
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
