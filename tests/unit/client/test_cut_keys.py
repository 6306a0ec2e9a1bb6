"""The best slots of product keys whose last products are no slots, by candidates of each part: against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool import optim
from mempool.client.keys.layout import KeyLayout
from mempool.config import ProductKeys, TableConfig, resolve
from mempool.types.keys import least_root
from tests.agreement.reference import product_scores

HEADS, WIDTH = 2, 2


def layout_of(num_slots: int, ways: int = 2) -> KeyLayout:
    keys = ProductKeys(heads=HEADS, key_dim=ways * WIDTH, ways=ways, optimizer=optim.SGD(lr=1.0))
    layout = KeyLayout.of(resolve(TableConfig(name="facts", num_slots=num_slots, value_dim=4, keys=keys)))
    assert layout is not None
    return layout


def cuts(num_slots: int, size: int, ways: int) -> list[int]:
    """Of each part the half-key from which on products are cut off, if those before it are in the rows that are cut."""
    first, *others = (num_slots // size ** (ways - 1 - way) for way in range(ways))
    return [first, *(each % size for each in others)]


def candidates(layout: KeyLayout, queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What shards answer: of each section the best rows, by (score descending, id ascending)."""
    parts = layout.section_queries(queries)
    scores = torch.einsum("bsw,snw->bsn", parts, keys.flatten(0, 1))
    best = scores.sort(dim=-1, descending=True, stable=True)
    firsts = torch.arange(layout.sections)[:, None] * layout.slots
    return best.values[..., :count], best.indices[..., :count] + firsts


@settings(max_examples=100, deadline=None)
@given(
    ways=st.integers(2, 5),
    whole_numbers=st.booleans(),
    best_rows=st.integers(0, 5),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_they_are_those_of_all_products_of_the_slots_that_are_there(
    ways: int, whole_numbers: bool, best_rows: int, seed: int, data: st.DataObject
) -> None:
    num_slots = data.draw(st.integers(1 if ways == 2 else 2**ways, 250))
    layout, size = layout_of(num_slots, ways), least_root(num_slots, ways)
    topk = data.draw(st.integers(1, min(num_slots, 12)) | st.just(num_slots))
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(7, HEADS, ways * WIDTH, generator=generator)
    keys = torch.randn(HEADS, ways, size, WIDTH, generator=generator)
    if whole_numbers:  # sums are exact, and ties are everywhere
        queries, keys = queries.round(), keys.round()
    if best_rows:  # cut rows, and what these lack
        queries = queries.abs()
        for way, cut in list(enumerate(cuts(num_slots, size, ways)))[:best_rows]:
            keys[:, way, cut:] = 9.0
    found = layout.chosen(*candidates(layout, queries, keys, layout.candidates(topk)), topk)
    scores, ids = found.scores, found.ids
    if found.left_open is not None:
        some = queries[found.left_open]
        whole = layout.chosen(*candidates(layout, some, keys, layout.rows), topk)
        assert whole.left_open is None
        scores[found.left_open], ids[found.left_open] = whole.scores, whole.ids
    every = product_scores(queries, keys)[..., :num_slots].sort(dim=-1, descending=True, stable=True)
    expected_scores, expected = every.values[..., :topk], every.indices[..., :topk]
    torch.testing.assert_close(scores, expected_scores, rtol=1e-6, atol=1e-5)
    if whole_numbers:
        assert torch.equal(ids, expected)
        assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize(("num_slots", "ways", "size"), [(95, 2, 10), (750, 3, 10), (550, 4, 5)])
def test_all_keys_are_asked_for_only_where_a_cut_row_is_among_the_best(num_slots: int, ways: int, size: int) -> None:
    layout = layout_of(num_slots, ways)
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.ones(3, HEADS, ways * WIDTH), torch.rand(HEADS, ways, size, WIDTH, generator=generator)
    first, second, *_ = cuts(num_slots, size, ways)
    keys[:, 1, second:] += 2.0
    for best, left_open in ((False, None), (True, [0, 1, 2])):
        keys[:, 0, first] = 5.0 if best else 0.0
        found = layout.chosen(*candidates(layout, queries, keys, layout.candidates(3)), 3)
        assert (None if found.left_open is None else found.left_open.tolist()) == left_open


@pytest.mark.parametrize(
    ("num_slots", "ways", "topk", "count"),
    [
        (100, 2, 3, 3), (99, 2, 3, 4), (91, 2, 3, 4), (90, 2, 3, 4), (83, 2, 3, 5), (83, 2, 83, 10), (1000, 3, 3, 3),
        (999, 3, 3, 4), (730, 3, 3, 6), (730, 3, 8, 10),
    ],
)  # fmt: skip
def test_as_many_more_are_asked_for_as_are_cut_off(num_slots: int, ways: int, topk: int, count: int) -> None:
    assert layout_of(num_slots, ways).candidates(topk) == count
