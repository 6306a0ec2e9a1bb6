"""The best slots of product keys whose last products are no slots, by candidates of each part: against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool import optim
from mempool.client.keys.layout import KeyLayout
from mempool.config import ProductKeys, TableConfig, resolve
from mempool.nn.scoring import product_topk
from mempool.types.keys import least_root

HEADS, WIDTH = 2, 2


def layout_of(num_slots: int) -> KeyLayout:
    keys = ProductKeys(heads=HEADS, key_dim=2 * WIDTH, optimizer=optim.SGD(lr=1.0))
    layout = KeyLayout.of(resolve(TableConfig(name="facts", num_slots=num_slots, value_dim=4, keys=keys)))
    assert layout is not None
    return layout


def candidates(layout: KeyLayout, queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What shards answer: of each section the best rows, by (score descending, id ascending)."""
    parts = layout.section_queries(queries)
    scores = torch.einsum("bsw,snw->bsn", parts, keys.flatten(0, 1))
    best = scores.sort(dim=-1, descending=True, stable=True)
    firsts = torch.arange(layout.sections)[:, None] * layout.slots
    return best.values[..., :count], best.indices[..., :count] + firsts


@settings(max_examples=150, deadline=None)
@given(
    num_slots=st.integers(1, 150),
    whole_numbers=st.booleans(),
    best_row=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_they_are_those_of_keys_in_the_model(
    num_slots: int, whole_numbers: bool, best_row: bool, seed: int, data: st.DataObject
) -> None:
    layout, size = layout_of(num_slots), least_root(num_slots, 2)
    topk = data.draw(st.integers(1, min(num_slots, 12)) | st.just(num_slots))
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(7, HEADS, 2 * WIDTH, generator=generator)
    keys = torch.randn(HEADS, 2, size, WIDTH, generator=generator)
    if whole_numbers:  # sums are exact, and ties are everywhere
        queries, keys = queries.round(), keys.round()
    if best_row:  # the cut row, and columns that it lacks
        queries, keys[:, 0, num_slots // size :], keys[:, 1, num_slots % size :] = queries.abs(), 9.0, 9.0
    found = layout.chosen(*candidates(layout, queries, keys, layout.candidates(topk)), topk)
    scores, ids = found.scores, found.ids
    if found.left_open is not None:
        some = queries[found.left_open]
        whole = layout.chosen(*candidates(layout, some, keys, layout.rows), topk)
        assert whole.left_open is None
        scores[found.left_open], ids[found.left_open] = whole.scores, whole.ids
    expected_scores, expected = product_topk(queries, keys, topk=topk, stride=size, num_slots=num_slots)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-6, atol=1e-6)
    if whole_numbers:
        assert torch.equal(ids, expected)
        assert torch.equal(scores, expected_scores)


def test_all_keys_are_asked_for_only_where_the_cut_row_is_the_best() -> None:
    layout = layout_of(100 - 5)  # the last row has 5 of 10
    queries, keys = torch.ones(3, HEADS, 2 * WIDTH), torch.rand(HEADS, 2, 10, WIDTH)
    keys[:, 1, 5:] += 2.0
    for best, left_open in ((False, None), (True, [0, 1, 2])):
        keys[:, 0, 9] = 5.0 if best else 0.0
        found = layout.chosen(*candidates(layout, queries, keys, layout.candidates(3)), 3)
        assert (None if found.left_open is None else found.left_open.tolist()) == left_open


@pytest.mark.parametrize(
    ("num_slots", "topk", "count"), [(100, 3, 3), (99, 3, 4), (91, 3, 4), (90, 3, 4), (83, 3, 5), (83, 83, 10)]
)
def test_as_many_more_are_asked_for_as_are_cut_off(num_slots: int, topk: int, count: int) -> None:
    assert layout_of(num_slots).candidates(topk) == count
