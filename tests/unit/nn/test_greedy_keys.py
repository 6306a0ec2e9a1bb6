"""Hierarchical keys and Tucker scores: choices against brute force, gradients against float64, what is refused."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer
from mempool.nn.keys.hierarchical import HierarchicalKeys
from mempool.nn.keys.tucker import TuckerKeys
from tests.agreement.reference import dense_parameters, leaf, relative_error, rms_normalised

from .stand_in import local_table, session_of

KINDS: list[dict[str, Any]] = [
    {"keys": "hierarchical", "groups": 20, "probes": 4},
    {"keys": "hierarchical", "qk_norm": True},
    {"score": "tucker"},
    {"score": "tucker", "rank": 4, "probes": 6, "qk_norm": True},
]


def make_layer(*, num_slots: int = 300, **options: Any) -> MemoryLayer:
    torch.manual_seed(5)
    options = {"heads": 2, "topk": 9, "key_dim": 16} | options
    layer = MemoryLayer(12, table=local_table(num_slots=num_slots, value_dim=7), **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "search.core":
                parameter += 0.3 * torch.randn_like(parameter)
    return layer


def double_scores(layer: MemoryLayer, queries: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Of every slot, [B, H, slots] float64, in the words of the formulas."""

    def keys(name: str) -> Tensor:
        return rms_normalised(parameters[name]) if layer.qk_norm else parameters[name]

    num_slots = layer.table.num_slots
    if isinstance(layer.search, HierarchicalKeys):
        groups = torch.arange(num_slots) // layer.search.group_size
        return queries @ keys("search.slot_keys").T + (queries @ keys("search.group_keys").T)[..., groups]
    core = parameters["search.core"]
    rank = core.shape[-1]
    halves = [half.unflatten(-1, (rank, -1)) for half in queries.chunk(2, dim=-1)]
    books = keys("search.half_keys").unflatten(-1, (rank, -1))
    first = torch.einsum("bhrd,hnrd->bhrn", halves[0], books[:, 0])
    second = torch.einsum("bhsd,hnsd->bhsn", halves[1], books[:, 1])
    return torch.einsum("bhri,hrs,bhsj->bhij", first, core, second).flatten(-2)[..., :num_slots]


@pytest.mark.parametrize("options", KINDS)
def test_a_layer_and_all_its_gradients_equal_the_formulas_in_float64(options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    x = torch.randn(11, 12, requires_grad=True)
    y, lookup = layer(x, return_lookup=True)
    parameters, x64 = {name: leaf(each) for name, each in dense_parameters(layer).items()}, leaf(x)
    queries = nn.functional.linear(x64, parameters["query.weight"], parameters["query.bias"]).unflatten(-1, (2, 16))
    if layer.qk_norm:
        parts = [rms_normalised(part) for part in queries.chunk(layer.ways, dim=-1)]
        queries = torch.cat(parts, dim=-1) / 16**0.5
    scores = double_scores(layer, queries, parameters).gather(-1, lookup.ids)
    torch.testing.assert_close(lookup.scores.double(), scores, rtol=1e-5, atol=1e-5)
    values = leaf(session_of(layer.table).values)
    bags = torch.einsum("bhk,bhkv->bv", torch.softmax(scores, dim=-1), values[lookup.ids])
    gate = nn.functional.linear(x64, parameters["gate.weight"], parameters["gate.bias"])
    expected = nn.functional.linear(bags * nn.functional.silu(gate), parameters["out.weight"], parameters["out.bias"])
    assert relative_error(y, expected, floor=0.1) < 5e-6
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction.double())
    assert relative_error(x.grad, x64.grad, floor=1.0) < 5e-6  # type: ignore[arg-type]
    for name, parameter in dense_parameters(layer).items():
        assert relative_error(parameter.grad, parameters[name].grad, floor=1.0) < 5e-6, name  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(num_slots=st.integers(1, 70), bags=st.integers(0, 4), data=st.data())
def test_hierarchical_keys_find_the_best_slots_of_the_best_groups(
    num_slots: int, bags: int, data: st.DataObject
) -> None:
    group_size = data.draw(st.integers(1, num_slots))
    groups = -(-num_slots // group_size)
    probes = data.draw(st.integers(1, groups))
    fewest = probes * group_size - (groups * group_size - num_slots)
    topk = data.draw(st.integers(1, max(1, fewest)))
    made: dict[str, Any] = {}
    keys = HierarchicalKeys(num_slots, 2, groups=groups, probes=probes, topk=topk, qk_norm=False, made=made)
    group_size = keys.group_size
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    with torch.no_grad():  # whole numbers: sums are exact and ties are everywhere
        for each in keys.parameters():
            each.copy_(torch.randint(-1, 2, each.shape, generator=generator))
    queries = torch.randint(-2, 3, (bags, 2, 2), generator=generator).float()
    scores, ids = keys(queries, topk)
    of_groups = queries @ keys.group_keys.T
    picked = of_groups.sort(dim=-1, descending=True, stable=True).indices[..., :probes]
    all_scores = queries @ keys.flat().T
    inside = (torch.arange(num_slots) // group_size == picked[..., None]).any(-2)
    best = all_scores.masked_fill(~inside, -torch.inf).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, best.values[..., :topk])
    assert torch.equal(ids, best.indices[..., :topk])
    assert torch.equal(keys.exact(queries, topk), all_scores.sort(dim=-1, descending=True, stable=True)[1][..., :topk])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), rank=st.integers(1, 3), bags=st.integers(0, 4), data=st.data())
def test_tucker_scores_with_all_half_keys_as_candidates_find_the_true_topk(
    size: int, rank: int, bags: int, data: st.DataObject
) -> None:
    num_slots = data.draw(st.integers((size - 1) ** 2 + 1, size**2))
    topk = data.draw(st.integers(1, num_slots))
    shape = (2, 2, size, 2 * rank)
    keys = TuckerKeys(num_slots, shape, rank=rank, probes=size, topk=topk, qk_norm=False, made={})
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    with torch.no_grad():
        for each in keys.parameters():
            each.copy_(torch.randint(-1, 2, each.shape, generator=generator))
    queries = torch.randint(-2, 3, (bags, 2, 4 * rank), generator=generator).float()
    scores, ids = keys(queries, topk)
    halves = queries.unflatten(-1, (2, rank, 2))
    first, second = torch.einsum("bhcrd,hcnrd->cbhrn", halves, keys.half_keys.unflatten(-1, (rank, 2)))
    every = torch.einsum("bhri,hrs,bhsj->bhij", first, keys.core, second).flatten(-2)[..., :num_slots]
    best = every.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, best.values[..., :topk])
    assert torch.equal(ids, best.indices[..., :topk])
    assert torch.equal(keys.exact(queries, topk), best.indices[..., :topk])


def test_a_core_of_rank_one_loses_nothing_of_positive_scores() -> None:
    torch.manual_seed(2)
    keys = TuckerKeys(40**2, (3, 2, 40, 8), rank=2, probes=9, topk=9, qk_norm=False, made={})
    keys.draw(1.0)
    with torch.no_grad():
        keys.core.copy_(torch.randn(3, 2, 1) * torch.randn(3, 1, 2))
    queries = torch.randn(50, 3, 16)
    assert torch.equal(keys(queries, 9)[1], keys.exact(queries, 9))
    assert keys.penalty() == 0.0


def test_recall_is_the_part_of_the_true_topk_that_was_found() -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    assert make_layer(ways=4).recall(x) == 1.0
    found = [make_layer(keys="hierarchical", groups=50, probes=probes).recall(x) for probes in (3, 10, 50)]
    assert found[0] < found[1] < found[2] == 1.0
    assert 0.3 < make_layer(score="tucker", probes=4).recall(x) < make_layer(score="tucker", probes=18).recall(x) == 1.0


def test_asking_for_recall_leaves_a_layer_in_training_as_it_was() -> None:
    layer = make_layer(keys="hierarchical", query_norm="batch", query_dropout=0.5)
    layer.gate.eval()
    before = copy.deepcopy(layer.query.state_dict())
    x = torch.randn(20, 12)
    assert layer.recall(x) == layer.recall(x)
    for name, part in layer.query.state_dict().items():
        assert torch.equal(part, before[name]), name
    assert layer.training
    assert layer.query.norm.training
    assert not layer.gate.training


@pytest.mark.parametrize("options", KINDS)
def test_a_token_finds_the_same_alone_and_in_any_batch(options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    assert layer.search is not None
    queries = torch.randn(37, 2, 16, generator=torch.Generator().manual_seed(1))
    whole = layer.search(queries, 9)
    for first, end in ((0, 1), (5, 14), (1, 37)):
        part = layer.search(queries[first:end], 9)
        assert all(torch.equal(one, of[first:end]) for one, of in zip(part, whole, strict=True))


@pytest.mark.parametrize("options", [*KINDS, {"score": "tucker", "topk": 2}])
@pytest.mark.parametrize("case", ["nan", "zeros", "keys"])
def test_whatever_numbers_lead_to_slots_that_are_there(options: dict[str, Any], case: str) -> None:
    layer = make_layer(num_slots=290, **options)
    topk = layer.topk
    assert layer.search is not None
    queries = torch.randn(6, 2, 16)
    if case == "nan":
        queries[0], queries[1, 0, 0], queries[2, :, -1] = torch.nan, torch.nan, torch.inf
    elif case == "zeros":
        queries[:] = 0.0
    else:
        with torch.no_grad():
            next(layer.search.parameters())[..., 1:, :] = torch.nan
    scores, ids = layer.search(queries, topk)
    assert ids.min() >= 0
    assert ids.max() < 290
    if case == "zeros":  # a token of padding
        assert torch.equal(scores, torch.zeros_like(scores))
        assert all(len(set(row)) == topk for row in ids.flatten(0, 1).tolist())


def test_the_penalty_of_a_core_is_that_of_its_lesser_singular_values() -> None:
    keys = TuckerKeys(16, (2, 2, 4, 8), rank=4, probes=None, topk=3, qk_norm=False, made={})
    with torch.no_grad():
        keys.core.copy_(torch.stack([torch.diag(torch.tensor(each)) for each in ([3.0, 1, 0.1, 0.5], [1.0, 2, 0, 0])]))
    penalty = keys.penalty(0.15)
    torch.testing.assert_close(penalty, torch.tensor((0.85**2 + 0.35**2 + 0.85**2) / 6))
    penalty.backward()
    assert keys.core.grad is not None
    assert keys.core.grad[0, 1, 1] > 0.0
    assert keys.core.grad[0, 0, 0] == 0.0


@pytest.mark.parametrize("options", KINDS)
def test_states_and_copies_have_the_keys(options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    other = make_layer(**options)
    other.reset_parameters()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(other(x), layer(x))
    twin = copy.deepcopy(layer)
    assert twin.search is not layer.search
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.keys, layer.keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keys": "hierarchical", "groups": 70},
            r"groups = 70 of .* empty: give 50 \(of 2\) or 100 \(of 1\)",
        ),
        ({"keys": "hierarchical", "groups": 0}, "groups must be at least 1, got 0"),
        ({"keys": "hierarchical", "groups": 10, "probes": 11}, "probes = 11, and there are 10 groups"),
        ({"keys": "hierarchical", "groups": 50, "probes": 1}, "topk = 4, .* no more than 2 slots: give more probes"),
        ({"keys": "hierarchical", "ways": 3}, "ways = 3 is not of keys=.*, which take groups, probes"),
        ({"keys": "hierarchical", "score": "tucker"}, 'score = "tucker" is of product keys'),
        ({"groups": 4}, 'groups = 4 is not of product keys with score="sum", which take ways'),
        ({"rank": 3}, "rank = 3 is not of product keys"),
        ({"score": "product"}, "score = 'product': must be \"sum\""),
        ({"score": "tucker", "ways": 3}, "ways = 3 is not of Tucker scores"),
        ({"score": "tucker", "key_dim": 6}, "key_dim must be a multiple of 4"),
        ({"score": "tucker", "probes": 1}, "probes = 1: pairs of 2 half-keys .* fewer than topk = 4"),
    ],
)
def test_keys_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        MemoryLayer(8, table=local_table(num_slots=100), topk=4, **options)
