"""Counts of use of steps that are applied in parts, and what is told in pieces while others are served."""

from types import GeneratorType

import pytest
import torch

from mempool import kernels
from mempool.errors import StalePlacement
from mempool.shard.usage import telling
from mempool.types.usage import Tally, UsageRequest
from tests.contract.bags import make_bags
from tests.contract.driver import make_schema
from tests.contract.test_usage import counts, pairs_of, tally

from .conftest import MakeDriver


@pytest.mark.parametrize("want_norm", [True, False])
def test_a_slot_of_more_pairs_than_fit_counts_all_of_them(make_driver: MakeDriver, want_norm: bool) -> None:
    driver = make_driver(commit_memory_bytes=2**16).create(make_schema(usage=True), "one")
    bags = make_bags(1, lengths=(3, 0, 5, 20_000))
    bags.ids[100:15_000] = 7
    assert int((bags.ids == 7).sum()) > 10 * kernels.RUN_PIECE
    driver.train(1, {1: (bags, torch.randn(4, 10)), 2: (make_bags(2), torch.randn(4, 10))}, want_norm=want_norm)
    assert torch.equal(counts(driver), pairs_of(bags, make_bags(2)))


def test_it_is_told_in_pieces_and_anew_where_pages_move(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "_AT_ONCE", 8)  # a page of it
    driver = make_driver(2).create(make_schema(usage=True), "one")
    bags = make_bags(1)
    driver.train(1, {1: (bags, torch.randn(4, 10))})
    assert counts(driver).sum() == 9  # waits until it is applied: from here on the shard has nothing to do
    answers = driver.hosted[0].host._answers  # type: ignore[attr-defined]

    def told() -> "GeneratorType[None, None, object]":
        pieces = answers.usage(UsageRequest(envelope=driver.envelope(0), older_than=1))
        assert isinstance(pieces, GeneratorType)
        return pieces

    pieces = told()
    assert sum(1 for _ in pieces) == driver.schema.num_row_pages
    pieces = told()
    next(pieces)
    driver.move([[1] * 3] * 7)
    with pytest.raises(StalePlacement):
        next(pieces)
    assert (tally(driver).histogram == Tally.of(pairs_of(bags).numpy()).histogram).all()
