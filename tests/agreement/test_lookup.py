"""Keys in the pool: top-k with exact ties equals brute force, and the same keys in a model find the same."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mempool
from mempool.nn import MemoryLayer
from mempool.nn.scoring import product_topk

from .conftest import Pools
from .reference import Reference, all_rows, relative_error


def integers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: dot products are exact in float32 and many are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def brute_force(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Scores and ids of the best of [..., N], by (score descending, id ascending): one sort that keeps the order."""
    best = torch.sort(scores, dim=-1, descending=True, stable=True)
    return best.values[..., :topk], best.indices[..., :topk]


def product_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, H, D], [H, 2, N, D / 2] -> scores of all slots [B, H, N * N]."""
    first, second = queries.chunk(2, dim=-1)
    scores1 = torch.einsum("bhd,hnd->bhn", first, keys[:, 0])
    scores2 = torch.einsum("bhd,hnd->bhn", second, keys[:, 1])
    return (scores1[..., :, None] + scores2[..., None, :]).flatten(-2)


@pytest.mark.parametrize("topk", [1, 5, 32, 17**2])
@pytest.mark.parametrize("shards", [1, 3])
def test_product_keys_with_ties_equal_brute_force(pools: Pools, shards: int, topk: int) -> None:
    table = pools.table(
        shards=shards, num_slots=17**2, value_dim=12, block_dim=4, keys=mempool.ProductKeys(heads=3, key_dim=6)
    )
    keys, queries = integers(3, 2, 17, 3, seed=1), integers(25, 3, 6, seed=2)
    table.write_keys(keys)
    found = table.lookup(queries, topk=topk)
    assert_found(found, *brute_force(product_scores(queries, keys), topk), values=all_rows(table))


@pytest.mark.parametrize("topk", [1, 8, 100, 330])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_flat_keys_with_ties_equal_brute_force(pools: Pools, shards: int, topk: int) -> None:
    table = pools.table(shards=shards, num_slots=330, value_dim=12, page_slots=16, keys=mempool.FlatKeys(key_dim=5))
    keys, queries = integers(330, 5, seed=3), integers(25, 5, seed=4)
    table.write_keys(keys)
    found = table.lookup(queries, topk=topk)
    scores, ids = brute_force(queries @ keys.T, topk)
    assert torch.equal(found.scores, scores)
    assert torch.equal(found.ids, ids)
    expected = torch.einsum("bk,bkv->bv", torch.softmax(scores.double(), dim=-1), all_rows(table)[ids].double())
    assert relative_error(found.values, expected) < 1e-6


def assert_found(found: mempool.Lookup, scores: Tensor, ids: Tensor, *, values: Tensor) -> None:
    assert torch.equal(found.scores, scores)
    assert torch.equal(found.ids, ids)
    weights = torch.softmax(scores.double(), dim=-1)
    assert relative_error(found.weights, weights) < 1e-6
    assert relative_error(found.values, torch.einsum("bhk,bhkv->bv", weights, values[ids].double())) < 1e-6


def exact(layer: MemoryLayer) -> MemoryLayer:
    """The same layer with keys and queries of few bits, so that no scoring can round and ties are ties everywhere."""
    with torch.no_grad():
        layer.keys.copy_(integers(*layer.keys.shape, seed=5))
        layer.query.weight.copy_(integers(*layer.query.weight.shape, seed=6))
        layer.query.bias.zero_()
    return layer


@pytest.mark.parametrize(("shards", "topk"), [(1, 4), (2, 9), (4, 40)])
def test_lookup_finds_what_a_layer_with_the_same_keys_finds(pools: Pools, shards: int, topk: int) -> None:
    table = pools.table(
        shards=shards, num_slots=16**2, value_dim=20, block_dim=8, keys=mempool.ProductKeys(heads=2, key_dim=8)
    )
    layer = exact(MemoryLayer(10, table=table, heads=2, topk=topk, key_dim=8, gate="none"))
    table.write_keys(layer.scoring_keys())
    x = integers(30, 10, seed=7)
    scores, ids = product_topk(layer.scoring_queries(x), layer.scoring_keys(), topk=topk, stride=table.schema.stride)
    found = table.lookup(layer.scoring_queries(x), topk=topk)
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.scores, scores)
    torch.testing.assert_close(found.weights, torch.softmax(scores, dim=-1), rtol=1e-6, atol=1e-7)
    assert layer.out is not None
    torch.testing.assert_close(layer.out(found.values), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norms", [{}, {"qk_norm": True}, {"query_norm": True}], ids=str)
def test_lookup_equals_a_trained_layers_bags_whatever_its_norms(pools: Pools, norms: dict[str, Any]) -> None:
    torch.manual_seed(8)
    table = pools.table(num_slots=20**2, value_dim=20, block_dim=8, keys=mempool.ProductKeys(heads=2, key_dim=8))
    layer = MemoryLayer(10, table=table, heads=2, topk=6, key_dim=8, **norms)
    table.write_keys(layer.scoring_keys())
    x = torch.randn(30, 10)
    expected = Reference.of(layer, all_rows(table)).bags(x.double())
    assert relative_error(table.lookup(layer.scoring_queries(x), topk=6).values, expected) < 2e-6
