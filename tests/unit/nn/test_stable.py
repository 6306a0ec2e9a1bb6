"""What keeps a memory in use: choices in training, the sink, the balance loss, learning rates and starts of values."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mempool
from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer, MemoryLookup, init_values
from mempool.nn.keys.dots import product_scores
from mempool.nn.scoring import product_topk
from mempool.nn.stable.balance import balance_loss
from mempool.nn.stable.exploring import kept_keys, other_slots, sampled, with_dropped_keys
from mempool.optim import PoolOptimizer, ValueLR
from tests.agreement.reference import leaf, relative_error

from .stand_in import local_table, session_of

KEYS: list[dict[str, Any]] = [
    {},
    {"ways": 3, "key_dim": 18},
    {"keys": "hierarchical", "groups": 20, "probes": 4},
    {"score": "tucker", "probes": 8},
]
CHOICES: list[dict[str, Any]] = [
    {"sample_from": 14},
    {"random_slots": 5},
    {"sample_from": 14, "random_slots": 3, "sink": True},
]


def make_layer(**options: Any) -> MemoryLayer:
    torch.manual_seed(5)
    options = {"heads": 2, "topk": 9, "key_dim": 16, "gate": "none", "out": "none", "out_dim": 7} | options
    layer = MemoryLayer(12, table=local_table(num_slots=300, value_dim=7), **options)
    if layer.sink is not None:
        nn.init.normal_(layer.sink)
    return layer


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_weights_are_of_the_true_scores_and_gradients_reach_all_that_was_chosen(
    keys: dict[str, Any], choice: dict[str, Any]
) -> None:
    layer = make_layer(**keys, **choice)
    twin = copy.deepcopy(layer).double()
    x = torch.randn(11, 12, requires_grad=True)
    y, lookup = layer(x, return_lookup=True)
    extra = choice.get("random_slots", 0)
    assert lookup.ids.shape == lookup.scores.shape == lookup.weights.shape == (11, 2, 9 + extra)
    assert all(len(set(row.tolist())) == 9 + extra for row in lookup.ids.flatten(0, 1))
    assert (lookup.scores[..., :9].diff(dim=-1) <= 0).all()
    y.square().sum().backward()

    x64 = leaf(x)
    queries = twin.query(x64).unflatten(-1, (2, -1))
    scores = _double_scores(twin, queries, lookup.ids)
    weights = scores.exp()
    sink = 0.0 if twin.sink is None else twin.sink.exp()[:, None]
    weights = weights / (weights.sum(-1, keepdim=True) + sink)
    torch.testing.assert_close(lookup.weights.double(), weights, rtol=1e-5, atol=1e-6)
    values = leaf(session_of(layer.table).values)
    expected = torch.einsum("bhk,bhkv->bv", weights, values[lookup.ids])
    expected.square().sum().backward()
    assert relative_error(y, expected, floor=0.1) < 1e-5
    assert relative_error(x.grad, x64.grad, floor=1.0) < 1e-5
    assert relative_error(session_of(layer.table).gradient(), values.grad, floor=1.0) < 1e-5
    for name, parameter in layer.named_parameters():
        if name != "values":
            assert relative_error(parameter.grad, twin.get_parameter(name).grad, floor=1.0) < 1e-5, name


def _double_scores(layer: MemoryLayer, queries: Tensor, ids: Tensor) -> Tensor:
    """In the words of the formulas, of keys that are float64."""
    parameters = dict(layer.named_parameters())
    if layer.half_keys is not None:
        size, scores, left = layer.codebook_size, 0.0, ids
        for way in reversed(range(layer.ways)):
            part = queries.chunk(layer.ways, dim=-1)[way]
            keys = layer.half_keys[torch.arange(2)[:, None], way, left % size]
            scores, left = scores + (part[:, :, None] * keys).sum(-1), left // size
        return scores
    if layer.codebook_size == 0:
        groups = parameters["search.group_keys"][ids // layer.search.group_size]
        return (queries[:, :, None] * (groups + parameters["search.slot_keys"][ids])).sum(-1)
    halves = [half.unflatten(-1, (2, -1)) for half in queries.chunk(2, dim=-1)]
    books = parameters["search.half_keys"].unflatten(-1, (2, -1))
    size, heads = books.shape[2], torch.arange(2)[:, None]
    first = (halves[0][:, :, None] * books[heads, 0, ids // size]).sum(-1)
    second = (halves[1][:, :, None] * books[heads, 1, ids % size]).sum(-1)
    return torch.einsum("bhkr,hrs,bhks->bhk", first, parameters["search.core"], second)


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_in_eval_mode_the_best_slots_are_taken(keys: dict[str, Any]) -> None:
    dropout = {} if "score" in keys or "keys" in keys else {"key_dropout": 0.5}
    plain, layer = make_layer(**keys), make_layer(**keys, sample_from=14, random_slots=3, **dropout)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(8, 12)
    for one, other in zip(plain.eval()(x, return_lookup=True)[1], layer.eval()(x, return_lookup=True)[1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(layer.train()(x, return_lookup=True)[1].ids[..., :9], one)


def test_samples_are_drawn_without_replacement_by_their_scores() -> None:
    torch.manual_seed(1)
    scores, draws = torch.tensor([1.0, 0.5, 0.0, -1.0]), 40_000
    _, ids = sampled(scores.expand(draws, 1, 4), torch.arange(4).expand(draws, 1, 4), 2)
    p = scores.softmax(0)
    for first in range(4):
        for second in range(first + 1, 4):
            expected = p[first] * p[second] * (1 / (1 - p[first]) + 1 / (1 - p[second]))
            share = ((ids[:, 0] == torch.tensor([first, second])).all(-1)).double().mean()
            assert abs(share - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_slots=st.integers(1, 40), rows=st.integers(1, 4))
def test_other_slots_are_others(data: st.DataObject, num_slots: int, rows: int) -> None:
    topk = data.draw(st.integers(1, num_slots))
    count = data.draw(st.integers(0, num_slots - topk))
    ids = torch.stack([torch.randperm(num_slots)[:topk] for _ in range(2 * rows)]).view(rows, 2, topk)
    found = torch.cat([ids, other_slots(ids, count, num_slots)], dim=-1)
    assert found.shape[-1] == topk + count
    for row in found.flatten(0, 1).tolist():
        assert len(set(row)) == len(row)
        assert set(row) <= set(range(num_slots))


def test_each_other_slot_is_as_likely_as_any() -> None:
    torch.manual_seed(1)
    ids = torch.tensor([7, 0, 3]).expand(20_000, 1, 3)
    counts = torch.bincount(other_slots(ids, 2, 9).flatten(), minlength=9)
    assert counts[[0, 3, 7]].sum() == 0
    expected = 40_000 / 6
    assert (counts[[1, 2, 4, 5, 6, 8]] - expected).abs().max() < 5 * (expected * (1 - 2 / 6)) ** 0.5


def test_dropped_keys_are_picked_by_nobody_and_others_have_their_scores() -> None:
    torch.manual_seed(1)
    queries, keys = torch.randn(20, 3, 8), torch.randn(3, 2, 100, 4)
    some_queries, some_keys = with_dropped_keys(queries, keys, 0.3)
    dropped = some_keys[..., -1] < 0
    assert abs(dropped.float().mean() - 0.3) < 0.1
    scores, ids = product_topk(some_queries, some_keys, topk=10, stride=100)
    heads = torch.arange(3)[:, None]
    assert not (dropped[heads, 0, ids // 100] | dropped[heads, 1, ids % 100]).any()
    everywhere = torch.einsum("bhd,hnd->bhn", queries[..., :4], keys[:, 0])[..., :, None]
    everywhere = everywhere + torch.einsum("bhd,hnd->bhn", queries[..., 4:], keys[:, 1])[..., None, :]
    there = everywhere.masked_fill(dropped[:, 0, :, None] | dropped[:, 1, None, :], -torch.inf).flatten(-2)
    torch.testing.assert_close(scores, there.topk(10, dim=-1).values)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(2, 6), ways=st.integers(2, 3))
def test_enough_half_keys_stay_whichever_they_are(data: st.DataObject, size: int, ways: int) -> None:
    num_slots = data.draw(st.integers((size - 1) ** ways + 1, size**ways))
    count = data.draw(st.integers(1, num_slots))
    kept = kept_keys(count, num_slots, size, ways)
    _, keys = with_dropped_keys(torch.randn(1, 1, ways), torch.randn(1, ways, size, 1), 0.999, kept=kept)
    there = keys[0, :, :, -1] == 0
    slots = there[0]
    for other in there[1:]:
        slots = (slots[:, None] & other).flatten()
    assert int(slots[:num_slots].sum()) >= count


def test_scores_are_true_where_few_keys_are_left() -> None:
    layer = make_layer(topk=100, key_dropout=0.95, scores=lambda scores: scores)
    queries = layer.scoring_queries(x := torch.randn(5, 12))
    lookup = layer(x, return_lookup=True)[1]
    torch.testing.assert_close(lookup.scores, product_scores(queries, layer.scoring_keys(), lookup.ids))


def test_the_balance_loss_is_1_of_equal_use_and_its_gradient_is_that_of_the_weights() -> None:
    ids = torch.arange(12).view(3, 2, 2)
    equal = MemoryLookup(ids, torch.zeros(3, 2, 2), torch.full((3, 2, 2), 0.5))
    keys = torch.tensor([[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[4, 5], [4, 5]]])
    assert float(balance_loss(equal, [keys], 6)) == pytest.approx(1.0)
    assert float(balance_loss(equal, [torch.zeros_like(keys)], 6)) == pytest.approx(6.0)
    assert float(balance_loss(equal, [keys, torch.zeros_like(keys)], 6)) == pytest.approx(3.5)
    layer = make_layer()
    lookup = layer(torch.randn(50, 12), return_lookup=True)[1]
    weights = leaf(lookup.weights)
    layer.balance_loss(lookup._replace(weights=weights)).backward()
    again, expected = leaf(lookup.weights), 0.0
    for keys in (lookup.ids // 18, lookup.ids % 18):
        for head in range(2):
            share = torch.bincount(keys[:, head].flatten(), minlength=18) / (50 * 9)
            weight = torch.stack([again[:, head][keys[:, head] == key].sum() for key in range(18)])
            expected = expected + 18 * (share * weight / again[:, head].sum()).sum() / 4
    expected.backward()
    torch.testing.assert_close(weights.grad, again.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_training_by_the_balance_loss_makes_use_more_equal(keys: dict[str, Any]) -> None:
    layer = make_layer(**keys)
    x = torch.randn(200, 12) + 2.0
    optimizer = torch.optim.Adam([each for name, each in layer.named_parameters() if name != "values"], lr=0.01)
    losses = []
    for _ in range(30):
        loss = layer.balance_loss(layer(x, return_lookup=True)[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_value_lr_goes_in_a_line_beside_other_schedulers() -> None:
    layer = make_layer()
    optimizer = PoolOptimizer(layer, lr=0.5)
    schedulers = [ValueLR(optimizer, steps=4), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]
    seen = [optimizer.param_groups[0]["lr"]]
    for step in range(6):
        optimizer.step()
        for scheduler in schedulers if step % 2 else reversed(schedulers):
            scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    factors = (10.0, 7.75, 5.5, 3.25, 1.0, 1.0, 1.0)
    assert seen == pytest.approx([0.5 * factor * 0.5**step for step, factor in enumerate(factors)])


def test_value_lr_goes_on_from_its_state() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = ValueLR(optimizer, steps=10, start=4.0, end=2.0)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    other = torch.optim.SGD([parameter], lr=1.0)
    resumed = ValueLR(other, steps=1)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    other.step()
    resumed.step()
    assert other.param_groups[0]["lr"] == pytest.approx(4.0 - 2.0 * 6 / 10)


@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_values_start_as_rows_of_a_layer_on_any_shards(layout: str) -> None:
    linear = nn.Linear(10, 8)
    found = []
    for shards in (1, 2):
        with mempool.local(shards=shards) as pool:
            table = pool.create_table(mempool.TableConfig(name="facts", num_slots=25, value_dim=8, layout=layout))
            init_values(table, linear)
            assert torch.equal(table.rows(range(25)), linear.weight.t().repeat(3, 1)[:25])
            init_values(table, linear, noise_std=0.1, seed=3)
            found.append(table.rows(range(25)))
            with pytest.raises(InvalidRequest, match="inf or NaN"):
                init_values(table, torch.full((2, 8), torch.nan))
            with pytest.raises(InvalidRequest, match=r"rows \[8, 10\].*must be \[R, 8\]"):
                init_values(table, linear.weight)
            with pytest.raises(InvalidRequest, match="seed = 'a' must be a whole number"):
                init_values(table, linear, seed="a")  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="table = 'facts' is no table"):
                init_values("facts", linear)  # type: ignore[arg-type]
            assert torch.equal(table.rows(range(25)), found[-1])
    assert torch.equal(*found)
    noise = found[0] - linear.weight.t().repeat(3, 1)[:25]
    assert 0.07 < (noise.std() / linear.weight.std()).item() < 0.13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_dropout": 1.0}, "key_dropout = 1.0 must be a probability"),
        ({"key_dropout": 0.1, "score": "tucker"}, "of product keys.*these are tucker keys"),
        ({"key_dropout": 0.1, "keys": "hierarchical"}, "these are hierarchical keys"),
        ({"sample_from": 8}, "sample_from = 8 must be from topk = 9 to the table's 300"),
        ({"sample_from": 301}, "sample_from = 301 must be"),
        ({"sample_from": 9.5}, "sample_from must be an integer"),
        ({"random_slots": -1}, "random_slots must be at least 0"),
        ({"random_slots": 292}, "give at most 291"),
        ({"sink": True, "scores": "relu"}, 'sink is of scores="softmax"'),
        ({"query_norm": "none"}, 'query_norm must be "rms"'),
        ({"query_norm": "batch", "query": nn.Linear(12, 32)}, "query is a Linear: put the norm into that"),
        ({"keys": "hierarchical", "groups": 20, "probes": 1, "sample_from": 16}, "give more probes, fewer groups"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_layer(**options)


def test_a_batch_without_queries_trains_with_dropped_keys_too() -> None:
    layer = make_layer(key_dropout=0.3)
    out = layer(torch.zeros(0, 12))
    out.sum().backward()
    assert out.shape == (0, 7)
