"""Checks of a caller's queries."""

import numpy as np
import pytest
import torch

from mempool.client.lookup import Lookup, answered, checked_queries, checked_topk
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, ProductKeySpec
from tests.support.faulty import make_schema

PRODUCT = make_schema(keys=ProductKeySpec(heads=2, key_dim=6), stride=8)
FLAT = make_schema(keys=FlatKeySpec(key_dim=5))


def test_queries_become_float32_with_heads() -> None:
    queries = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    checked = checked_queries(queries, schema=PRODUCT)
    assert checked.dtype == torch.float32
    assert not checked.requires_grad
    assert torch.equal(checked, queries.float())
    flat = torch.randn(3, 5)
    assert torch.equal(checked_queries(flat, schema=FLAT), flat[:, None])
    assert checked_queries(flat[:0], schema=FLAT).shape == (0, 1, 5)


@pytest.mark.parametrize(
    ("schema", "queries", "text"),
    [
        (make_schema(), torch.zeros(1, 5), "table 'facts' has no keys in the pool"),
        (FLAT, [[1.0]], "must be a floating torch.Tensor, not list"),
        (FLAT, torch.zeros(1, 5, dtype=torch.long), "not torch.int64"),
        (FLAT, torch.zeros(1, 4), "queries has shape [1, 4], its keys ask for [B, 5]"),
        (FLAT, torch.zeros(5), "shape [5]"),
        (FLAT, torch.tensor(1.0), "shape []"),
        (PRODUCT, torch.zeros(1, 12), "its keys ask for [B, 2, 6]"),
        (FLAT, torch.tensor([[0, 0, torch.nan, 0, 0.0]]), "queries[0, 2] = nan; queries must be finite"),
        (PRODUCT, torch.full((1, 2, 6), torch.inf), "queries[0, 0, 0] = inf"),
    ],
)
def test_mistakes_are_named(schema, queries, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidRequest) as raised:
        checked_queries(queries, schema=schema)
    assert text in str(raised.value)


@pytest.mark.parametrize("topk", [1, 64, np.int64(7), np.uint8(64), torch.tensor(3)])
def test_topk_is_any_kind_of_integer(topk: int) -> None:
    count = checked_topk(topk, schema=FLAT)
    assert type(count) is int
    assert count == topk


@pytest.mark.parametrize("topk", [0, 65, -1, True, np.bool_(True), torch.tensor(True), 2.0, "2", None, np.ones(2)])
def test_a_wrong_topk_is_named(topk: object) -> None:
    with pytest.raises(InvalidRequest, match="must be a whole number from 1 to its 64 slots") as raised:
        checked_topk(topk, schema=FLAT)
    assert f"topk = {topk!r}" in str(raised.value)


def test_flat_lookups_have_no_heads() -> None:
    lookup = Lookup(
        ids=torch.ones(2, 1, 3), scores=torch.ones(2, 1, 3), weights=torch.ones(2, 1, 3), values=torch.ones(2, 7)
    )
    found = answered(lookup, schema=FLAT, device=torch.device("cpu"))
    assert [tuple(part.shape) for part in found] == [(2, 3), (2, 3), (2, 3), (2, 7)]
