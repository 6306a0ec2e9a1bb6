"""MemoryLayer on a table that is a local tensor, against the float64 reference of the paper's formulas."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer
from mempool.nn.keys import finding
from mempool.nn.scoring import product_topk
from tests.agreement.reference import Reference, dense_parameters, leaf, relative_error

from .stand_in import local_table, session_of

TOLERANCE = 3e-6


def make_layer(*, dim: int = 12, n: int = 9, value_dim: int = 7, **options: object) -> MemoryLayer:
    torch.manual_seed(5)
    table = local_table(num_slots=n * n, value_dim=value_dim)
    options = {"heads": 2, "topk": 4, "key_dim": 6} | options
    return MemoryLayer(dim, table=table, **options)  # type: ignore[arg-type]


def assert_agrees(layer: MemoryLayer, x: Tensor) -> None:
    """Forward and every gradient of a random linear functional of y."""
    session = session_of(layer.table)
    reference, x64 = Reference.of(layer, session.values), leaf(x)
    x = x.detach().clone().requires_grad_(True)
    y, expected = layer(x), reference(x64)
    assert relative_error(y, expected, floor=0.1) < TOLERANCE
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction.double())
    assert relative_error(x.grad, x64.grad, floor=1.0) < TOLERANCE
    assert relative_error(session.gradient(), reference.values.grad, floor=1.0) < TOLERANCE
    for name, parameter in dense_parameters(layer).items():
        assert relative_error(parameter.grad, reference.parameters[name].grad, floor=1.0) < TOLERANCE, name


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 3),
    n=st.integers(2, 11),
    half_dim=st.integers(1, 6),
    dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    bags=st.integers(1, 5),
    gate=st.sampled_from(["silu", "none"]),
    norms=st.sampled_from([{}, {"qk_norm": True}, {"query_norm": True}]),
    data=st.data(),
)
def test_forward_and_gradients_equal_the_float64_reference(
    heads: int,
    n: int,
    half_dim: int,
    dim: int,
    value_dim: int,
    bags: int,
    gate: str,
    norms: dict[str, bool],
    data: st.DataObject,
) -> None:
    # With qk_norm and halves one wide, all normalised keys are +-1 and ties are everywhere.
    half_dim = half_dim + 1 if norms.get("qk_norm") else half_dim
    topk = data.draw(st.integers(1, n * n))
    layer = make_layer(
        dim=dim, n=n, value_dim=value_dim, heads=heads, topk=topk, key_dim=2 * half_dim, gate=gate, **norms
    )
    assert_agrees(layer, torch.randn(bags, dim))


def test_topk_of_more_than_a_codebook_takes_every_pair_it_needs() -> None:
    assert_agrees(make_layer(n=3, topk=9), torch.randn(4, 12))


@pytest.mark.parametrize("shape", [(12,), (0, 12), (3, 12), (2, 3, 12), (2, 0, 3, 12), (1, 1, 1, 12)])
def test_any_leading_shape_is_the_same_as_rows_one_by_one(shape: tuple[int, ...]) -> None:
    layer = make_layer()
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == x.shape
    rows = x.reshape(-1, 12)
    expected = torch.stack([layer(row) for row in rows]) if len(rows) else rows
    torch.testing.assert_close(y.reshape(-1, 12), expected)


def test_parts_are_named_and_shaped_as_documented() -> None:
    layer = make_layer(dim=12, n=9, value_dim=7, heads=2, key_dim=6)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "half_keys": (2, 2, 9, 3),
        "query.weight": (12, 12),
        "query.bias": (12,),
        "gate.weight": (7, 12),
        "gate.bias": (7,),
        "out.weight": (12, 7),
        "out.bias": (12,),
    }


def test_plain_layer_projects_only_where_the_value_has_another_width() -> None:
    assert set(make_layer(gate="none", dim=12, value_dim=7).state_dict()) == {
        "half_keys", "query.weight", "query.bias", "out.weight", "out.bias",
    }  # fmt: skip
    layer = make_layer(gate="none", dim=7, value_dim=7)
    assert set(layer.state_dict()) == {"half_keys", "query.weight", "query.bias"}
    x = torch.randn(3, 7)
    reference = Reference.of(layer, session_of(layer.table).values)
    assert relative_error(layer(x), reference.bags(x.double())) < TOLERANCE


def test_state_dict_moves_a_layer_to_another_process_of_the_same_table() -> None:
    first = make_layer()
    torch.manual_seed(99)
    second = MemoryLayer(12, table=first.table, heads=2, topk=4, key_dim=6)
    x = torch.randn(5, 12)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_scoring_queries_and_keys_are_what_is_scored() -> None:
    for norms in ({}, {"qk_norm": True}, {"query_norm": True}):
        layer = make_layer(**norms)
        x = torch.randn(5, 12)
        first, second = layer.scoring_queries(x).chunk(2, dim=-1)
        keys = layer.scoring_keys()
        scores = torch.einsum("bhd,hnd->bhn", first, keys[:, 0])[..., :, None]
        scores = scores + torch.einsum("bhd,hnd->bhn", second, keys[:, 1])[..., None, :]
        expected = Reference.of(layer, session_of(layer.table).values).all_scores(x.double())
        assert relative_error(scores.flatten(-2), expected) < TOLERANCE


def test_keys_start_with_the_variance_asked_for() -> None:
    layer = make_layer(n=64, key_dim=64)
    assert float(layer.keys.detach().std()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(make_layer(n=64, key_dim=64, key_init_std=0.5).keys.detach().std()) == pytest.approx(0.5, rel=0.02)
    before = layer.keys.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.keys)


def test_training_decides_whether_the_lookup_is_remembered() -> None:
    layer = make_layer()
    told = session_of(layer.table).remembered
    layer(torch.randn(1, 12))
    layer.eval()(torch.randn(1, 12))
    assert told == [True, False]


def test_scores_stay_float32_under_autocast() -> None:
    layer = make_layer()
    x = torch.randn(16, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queries = layer.query(x)
        y = layer(x)
    assert queries.dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    # From the same rounded queries on, the bags are those of float32 scores.
    reference = Reference.of(layer, session_of(layer.table).values)
    reference.linear = lambda *_: queries.double()  # type: ignore[method-assign]
    assert (
        relative_error(layer._lookup(queries.float().unflatten(-1, (2, 6)))[0], reference.bags(x.double())) < TOLERANCE
    )


def test_score_gradients_stay_float32_where_backward_runs_under_autocast() -> None:
    layer = make_layer()
    queries = torch.randn(16, 2, 6)
    gradients = []
    for enabled in (False, True):
        leaf_queries = queries.clone().requires_grad_(True)
        bags, _ = layer._lookup(leaf_queries)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(bags.sin().sum(), [leaf_queries, layer.keys]))
    for plain, under_autocast in zip(*gradients, strict=True):
        assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("gate", ["silu", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_answers_in_it(dtype: torch.dtype, gate: str) -> None:
    layer = make_layer(dim=12, value_dim=12, gate=gate).to(dtype)
    x = torch.randn(6, 12, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    reference = Reference.of(layer, session_of(layer.table).values)
    reference.linear = lambda name, x: getattr(layer, name)(x.to(dtype)).double()  # type: ignore[method-assign]
    assert relative_error(y, reference(x.double())) < (1e-2 if dtype == torch.bfloat16 else TOLERANCE)
    y.sum().backward()
    assert layer.keys.grad is not None
    assert layer.keys.grad.dtype == dtype


def test_deepcopy_shares_the_table_and_nothing_else() -> None:
    model = nn.Sequential(make_layer(), nn.ReLU(), make_layer())
    model[2].table = model[0].table
    twin = copy.deepcopy(model)
    assert twin[0].values is not model[0].values
    assert twin[0].table is model[0].table is twin[2].table
    x = torch.randn(4, 12)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[0].keys.mul_(-1.0)
    assert not torch.equal(twin(x), model(x))
    assert twin[0].keys.requires_grad


def test_pickling_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"'facts' is a connection to a pool.*state_dict\(\)"):
        pickle.dumps(make_layer())


def test_repr_says_what_the_layer_is() -> None:
    assert "dim=12, table='facts' (81 slots x 7), heads=2, topk=4, key_dim=6, qk_norm=True" in repr(
        make_layer(qk_norm=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 2.0}, "heads must be an integer, got 2.0"),
        ({"out_dim": 0}, "out_dim must be at least 1, got 0"),
        ({"key_dim": 5}, "key_dim must be even and at least 2 .two halves., got 5"),
        ({"topk": 82}, "topk must be from 1 to the table's 81 slots, got 82"),
        ({"topk": 0}, "got 0"),
        ({"gate": "relu"}, 'gate must be "silu", "none" or a module, got \'relu\''),
    ],
)
def test_senseless_sizes_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_layer(**options)  # type: ignore[arg-type]


def test_input_of_another_width_is_refused() -> None:
    layer = make_layer()
    for shape in ((3, 11), ()):
        with pytest.raises(InvalidRequest, match=r"takes \[..., 12\], got "):
            layer(torch.randn(shape))


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_order_of_sums_is_the_layers_choice(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def asking(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        asked.append(options["deterministic"])
        return product_topk(*args, **options)

    monkeypatch.setattr(finding, "product_topk", asking)
    make_layer(deterministic=deterministic)(torch.randn(3, 12))
    assert asked == [deterministic]


def test_a_second_derivative_is_an_error_and_never_zeros() -> None:
    layer = make_layer(gate="none")
    x = torch.randn(1, 12)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.functional.hessian(lambda x: layer(x).sum(), x)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.functional.hvp(lambda x: layer(x).sum(), x, torch.ones_like(x))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_trace_is_refused_in_words() -> None:
    with pytest.raises(InvalidRequest, match=r"cannot be exported: .*look up in between"):
        torch.jit.trace(make_layer().eval(), torch.randn(3, 12))  # type: ignore[no-untyped-call]


def test_a_layer_without_data_says_so() -> None:
    layer = make_layer(device="meta")
    for x in (torch.randn(3, 12), torch.randn(3, 12, device="meta")):
        with pytest.raises(InvalidRequest, match="table 'facts' or its input is on the meta device"):
            layer(x)
