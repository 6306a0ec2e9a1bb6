"""Checks of a caller's queries."""

import pytest
import torch

from mempool.client.lookup import Lookup, checked_queries, without_heads
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, ProductKeySpec

from .fakes import make_schema

PRODUCT = make_schema(keys=ProductKeySpec(heads=2, key_dim=6), stride=8)
FLAT = make_schema(keys=FlatKeySpec(key_dim=5))


def test_queries_become_float32_with_heads() -> None:
    queries = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    checked = checked_queries(queries, 4, schema=PRODUCT)
    assert checked.dtype == torch.float32
    assert not checked.requires_grad
    assert torch.equal(checked, queries.float())
    flat = torch.randn(3, 5)
    assert torch.equal(checked_queries(flat, 64, schema=FLAT), flat[:, None])
    assert checked_queries(flat[:0], 1, schema=FLAT).shape == (0, 1, 5)


@pytest.mark.parametrize(
    ("schema", "queries", "topk", "text"),
    [
        (make_schema(), torch.zeros(1, 5), 1, "table 'facts' has no keys in the pool"),
        (FLAT, [[1.0]], 1, "must be a floating torch.Tensor, not list"),
        (FLAT, torch.zeros(1, 5, dtype=torch.long), 1, "not torch.int64"),
        (FLAT, torch.zeros(1, 4), 1, "queries has shape [1, 4], its keys ask for [B, 5]"),
        (FLAT, torch.zeros(5), 1, "shape [5]"),
        (FLAT, torch.tensor(1.0), 1, "shape []"),
        (PRODUCT, torch.zeros(1, 12), 1, "its keys ask for [B, 2, 6]"),
        (FLAT, torch.zeros(1, 5), 0, "topk = 0 must be from 1 to its 64 slots"),
        (FLAT, torch.zeros(1, 5), 65, "topk = 65 must be"),
        (FLAT, torch.zeros(1, 5), True, "topk = True must be"),
        (FLAT, torch.tensor([[0, 0, torch.nan, 0, 0.0]]), 1, "queries[0, 2] = nan; queries must be finite"),
        (PRODUCT, torch.full((1, 2, 6), torch.inf), 1, "queries[0, 0, 0] = inf"),
    ],
)
def test_mistakes_are_named(schema, queries, topk, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidRequest) as raised:
        checked_queries(queries, topk, schema=schema)
    assert text in str(raised.value)


def test_flat_lookups_have_no_heads() -> None:
    lookup = Lookup(
        ids=torch.ones(2, 1, 3), scores=torch.ones(2, 1, 3), weights=torch.ones(2, 1, 3), values=torch.ones(2, 7)
    )
    assert [tuple(part.shape) for part in without_heads(lookup)] == [(2, 3), (2, 3), (2, 3), (2, 7)]
