"""Product keys of several parts, and of slots that are no power: against brute force over all slots."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool import kernels
from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer
from mempool.nn.keys import product
from mempool.nn.scoring import product_topk
from mempool.nn.sizes import codebook_size
from tests.agreement.reference import Reference, dense_parameters, leaf, product_scores, relative_error

from .stand_in import local_table, session_of


@settings(max_examples=80, deadline=None)
@given(bags=st.integers(0, 4), heads=st.integers(1, 2), ways=st.integers(2, 5), width=st.integers(1, 2), data=st.data())
def test_the_choice_is_the_true_topk_of_the_slots_that_are_there(
    bags: int, heads: int, ways: int, width: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, {2: 12, 3: 5, 4: 4, 5: 3}[ways]))
    num_slots = data.draw(st.integers(1, size**ways))
    topk = data.draw(st.integers(1, min(40, num_slots)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    # Whole numbers: sums are exact and ties are everywhere.
    queries = torch.randint(-2, 3, (bags, heads, ways * width), generator=generator).float()
    keys = torch.randint(-1, 2, (heads, ways, size, width), generator=generator).float()
    scores, ids = product_topk(queries, keys, topk=topk, stride=size, num_slots=num_slots)
    best = product_scores(queries, keys)[..., :num_slots].sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, best.values[..., :topk])
    assert torch.equal(ids, best.indices[..., :topk])


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 2), ways=st.integers(2, 4), not_a_number=st.booleans(), data=st.data())
def test_the_choice_is_the_true_topk_of_some_ranges_of_slots(
    heads: int, ways: int, not_a_number: bool, data: st.DataObject
) -> None:
    size = data.draw(st.integers(2, {2: 12, 3: 5, 4: 4}[ways]))
    edges = sorted(data.draw(st.sets(st.integers(0, size**ways), min_size=2, max_size=6)))
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    there = torch.zeros(size**ways, dtype=torch.bool)
    for first, end in ranges:
        there[first:end] = True
    topk = data.draw(st.integers(1, min(40, int(there.sum()))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    queries = torch.randint(-2, 3, (3, heads, ways), generator=generator).float()
    keys = torch.randint(-1, 2, (heads, ways, size, 1), generator=generator).float()
    if not_a_number:
        queries[0] = torch.nan
        keys[0, data.draw(st.integers(0, ways - 1))] = torch.nan
    scores, ids = product_topk(queries, keys, topk=topk, stride=size, ranges=ranges)
    assert there[ids].all()
    if not not_a_number:
        every = product_scores(queries, keys).masked_fill(~there, -torch.inf)
        best = every.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(scores, best.values[..., :topk])
        assert torch.equal(ids, best.indices[..., :topk])


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 2),
    ways=st.integers(3, 5),
    numbers=st.sampled_from(["any", "whole", "one", "not finite"]),
    data=st.data(),
)
def test_one_pass_over_a_query_gives_the_bits_that_pairs_give(
    heads: int, ways: int, numbers: str, data: st.DataObject
) -> None:
    size, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    first = data.draw(st.integers(0, size - 1))
    box = ((first, data.draw(st.integers(first + 1, size))), *[(0, size)] * (ways - 1))
    topk = data.draw(st.integers(1, box[0][1] - first))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    queries = torch.randn(5, heads, ways * width, generator=generator)
    keys = torch.randn(heads, ways, size, width, generator=generator)
    if numbers == "whole":  # with ties
        queries, keys = queries.round(), keys.round()
    elif numbers == "one":  # nothing but ties
        queries[0], keys[0] = 0.0, 1.0
    elif numbers == "not finite":
        queries[1, 0, 0], keys[0, 1, 0] = torch.inf, torch.nan
    one_pass = kernels.parts_topk(queries, keys, topk, box)
    assert one_pass is not None
    if data.draw(st.booleans()) and topk == 1:  # of which pairs are others than the kernel's: it is not asked
        box = (box[0], (size - 1, size), *box[2:])
        expected = product._merged(box, queries, keys, topk, True)
        assert torch.equal(
            product._best_in(box, queries, keys, topk, True).scores.nan_to_num(7.0), expected.scores.nan_to_num(7.0)
        )
        return
    left_open = one_pass[1][0, ..., 0] < 0
    assert numbers != "any" or not left_open.any()
    expected = product._merged(box, queries, keys, topk, True)
    found = product._best_in(box, queries, keys, topk, True)
    assert torch.equal(found.scores.nan_to_num(7.0), expected.scores.nan_to_num(7.0))
    for part, own, whole in zip(one_pass[1], found.parts, expected.parts, strict=True):
        assert torch.equal(own, whole)
        assert torch.equal(part[~left_open], whole[~left_open])


def test_one_pass_says_what_it_does_not_take() -> None:
    queries, keys, whole = torch.randn(2, 1, 6), torch.randn(1, 3, 5, 2), ((0, 5),) * 3
    assert kernels.parts_topk(queries, keys, 6, whole) is None  # more than a part has: pairs do
    with pytest.raises(ValueError, match=r"ranges must be \(first, end\) of each of 3 parts, within 5; got"):
        kernels.parts_topk(queries, keys, 1, ((0, 5), (0, 6), (0, 5)))
    with pytest.raises(ValueError, match="k must lie in"):
        kernels.parts_topk(queries, keys, 126, whole)
    with pytest.raises(ValueError, match="queries"):
        kernels.parts_topk(queries[..., :5], keys, 1, whole)


@pytest.mark.parametrize("num_slots", [40**2 - 1, 40**2 - 40, 40**2 - 41, 39**2 + 1])
def test_slots_that_are_cut_off_are_never_chosen_however_good(num_slots: int) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.rand(20, 2, 8, generator=generator), torch.rand(2, 2, 40, 4, generator=generator)
    keys[:, 0, -2:] += 10.0  # the rows that are cut are the best by far
    scores, ids = product_topk(queries, keys, topk=50, stride=40, num_slots=num_slots)
    best = product_scores(queries.double(), keys.double())[..., :num_slots].topk(50)
    torch.testing.assert_close(scores.double(), best.values, rtol=1e-6, atol=1e-6)
    assert torch.equal(ids, best.indices)


@pytest.mark.parametrize(("ways", "num_slots"), [(2, 391), (3, 8**3), (3, 7**3 + 19), (4, 5**4 - 130), (5, 3**5)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_layer_and_all_its_gradients_equal_the_float64_reference(ways: int, num_slots: int, qk_norm: bool) -> None:
    torch.manual_seed(3)
    table = local_table(num_slots=num_slots, value_dim=7)
    layer = MemoryLayer(12, table=table, heads=2, topk=9, key_dim=4 * ways, ways=ways, qk_norm=qk_norm)
    x = torch.randn(11, 12, requires_grad=True)
    reference, x64 = Reference.of(layer, session_of(table).values), leaf(x)
    y, expected = layer(x), reference(x64)
    assert relative_error(y, expected, floor=0.1) < 3e-6
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction.double())
    assert relative_error(x.grad, x64.grad, floor=1.0) < 3e-6  # type: ignore[arg-type]
    for name, parameter in dense_parameters(layer).items():
        assert relative_error(parameter.grad, reference.parameters[name].grad, floor=1.0) < 3e-6, name  # type: ignore[arg-type]


def test_a_token_has_the_same_bits_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 3, 20, 8, generator=generator)
    queries = torch.randn(37, 2, 24, generator=generator).requires_grad_()

    def scored(part: slice) -> list[Tensor]:
        scores, ids = product_topk(queries[part], keys, topk=8, stride=20, num_slots=7000)
        (grads,) = torch.autograd.grad(scores.sum(), queries)
        return [scores.detach(), ids, grads[part]]

    whole = scored(slice(None))
    for first, end in ((0, 1), (5, 14), (1, 37)):
        part = scored(slice(first, end))
        assert all(torch.equal(one, of[first:end]) for one, of in zip(part, whole, strict=True))


@pytest.mark.parametrize(("ways", "size", "num_slots"), [(2, 9, 66), (3, 5, 101), (4, 3, 80)])
@pytest.mark.parametrize("in_keys", [False, True])
def test_numbers_that_are_none_lead_to_no_slot_that_is_not_there(
    ways: int, size: int, num_slots: int, in_keys: bool
) -> None:
    generator = torch.Generator().manual_seed(7)
    queries, keys = torch.randn(6, 2, 2 * ways, generator=generator), torch.randn(2, ways, size, 2, generator=generator)
    if in_keys:
        keys[:, 0, 1:] = keys[1, -1] = torch.nan
    else:
        queries[0], queries[1, 0, 0], queries[2, :, -1] = torch.nan, torch.nan, torch.inf
    for topk in (3, num_slots):
        _, ids = product_topk(queries, keys, topk=topk, stride=size, num_slots=num_slots)
        assert ids.min() >= 0
        assert ids.max() < num_slots


@pytest.mark.parametrize("num_slots", [1, 2, 3, 24, 25, 26, 2**24, 2**24 + 1, 10**12 + 1])
@pytest.mark.parametrize("ways", [2, 3, 4])
def test_codebooks_are_the_smallest_that_are_enough(num_slots: int, ways: int) -> None:
    if ways > 2 and num_slots < 2**ways:
        with pytest.raises(InvalidRequest, match=rf"ways = {ways} needs {2**ways} slots.*give at most"):
            codebook_size("facts", num_slots, ways)
        return
    size = codebook_size("facts", num_slots, ways)
    assert (size - 1) ** ways < num_slots <= size**ways


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "ways must be at least 2, got 1"),
        ({"ways": 2.5}, "ways must be an integer"),
        ({"ways": 7}, "ways = 7 needs 128 slots, .* table 'facts' has 100: give at most 6 ways"),
        ({"ways": 3, "key_dim": 64}, "key_dim must be a multiple of 3 .* got 64: 66"),
        ({"keys": "pools"}, "keys = 'pools': must be \"product\""),
    ],
)
def test_senseless_keys_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        MemoryLayer(8, table=local_table(num_slots=100), topk=2, **options)


def test_the_default_key_dim_can_be_cut() -> None:
    layer = MemoryLayer(8, table=local_table(num_slots=1000), ways=3)
    assert layer.key_dim == 129
    assert layer.keys.shape == (4, 3, 10, 43)
