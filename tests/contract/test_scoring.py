"""Top-k of keys in the pool: by (score descending, id ascending), exact ties included."""

import pytest
import torch
from torch import Tensor

from mempool.types import FlatKeySpec, ProductKeySpec

from .driver import Driver, make_schema
from .layouts import LAYOUTS


def _best(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Of [B, N] by (score descending, id ascending)."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :topk]
    return scores.gather(1, order), order


def _merge(candidates: list[tuple[Tensor, Tensor]], topk: int) -> tuple[Tensor, Tensor]:
    scores, ids = (torch.cat(parts, dim=1) for parts in zip(*candidates, strict=True))
    by_id = ids.argsort(dim=1, stable=True)
    scores, ids = scores.gather(1, by_id), ids.gather(1, by_id)
    scores, order = _best(scores, topk)
    return scores, ids.gather(1, order)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("topk", [1, 5, 50])
def test_flat_keys(driver: Driver, layout: str, topk: int) -> None:
    driver.create(make_schema(keys=FlatKeySpec(key_dim=3)), layout)
    keys = torch.randint(-2, 3, (50, 3)).float()  # few different scores: many exact ties
    driver.write("keys", torch.arange(50), keys)
    queries = torch.randint(-2, 3, (4, 1, 3)).float()
    candidates = []
    for heads, scores, ids in driver.score(queries, topk).values():
        assert heads == (0,)
        assert scores.shape == ids.shape == (4, 1, topk)
        assert torch.equal(ids == -1, scores == float("-inf"))
        candidates.append((scores[:, 0], torch.where(ids[:, 0] < 0, 10**6, ids[:, 0])))
    scores, ids = _merge(candidates, topk)
    expected_scores, expected_ids = _best(queries[:, 0] @ keys.T, topk)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("key_owners", [[0, 0, 0], [1, 0, 1]])
@pytest.mark.parametrize("topk", [1, 4, 7])
def test_product_keys(driver: Driver, key_owners: list[int], topk: int) -> None:
    schema = make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=3, key_dim=4))
    driver.create(schema, "columns", key_owners)
    keys = torch.randint(-2, 3, (3, 2, 7, 2)).float()
    driver.write("keys", torch.arange(3), keys.reshape(3, -1))
    queries = torch.randint(-2, 3, (5, 3, 4)).float()
    first = torch.einsum("bhd,hnd->bhn", queries[..., :2], keys[:, 0])
    second = torch.einsum("bhd,hnd->bhn", queries[..., 2:], keys[:, 1])
    answered: list[int] = []
    for shard, (heads, scores, ids) in driver.score(queries, topk).items():
        assert [key_owners[head] for head in heads] == [shard] * len(heads)
        answered += heads
        for place, head in enumerate(heads):
            # The two-stage selection of the paper: ties of half-keys are cut by index before sums are compared.
            for bag in range(5):
                _, i1 = _best(first[bag, head][None], topk)
                _, i2 = _best(second[bag, head][None], topk)
                pairs = [
                    (-float(first[bag, head, a] + second[bag, head, b]), int(a) * 7 + int(b))
                    for a in i1[0]
                    for b in i2[0]
                ]
                expected = sorted(pairs)[:topk]
                assert scores[bag, place].tolist() == [-score for score, _ in expected]
                assert ids[bag, place].tolist() == [slot for _, slot in expected]
    assert sorted(answered) == [0, 1, 2]


def test_no_queries(driver: Driver) -> None:
    driver.create(make_schema(keys=FlatKeySpec(key_dim=3)), "one")
    heads, scores, ids = driver.score(torch.empty(0, 1, 3), 4)[0]
    assert heads == (0,)
    assert scores.shape == ids.shape == (0, 1, 4)
