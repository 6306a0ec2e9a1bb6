"""What may stand in the place of a layer's parts, and its options: each against the formula in plain operations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer, MemoryLookup

from .stand_in import local_table, session_of


def make_layer(*, dim: int = 12, value_dim: int = 7, **options: Any) -> MemoryLayer:
    torch.manual_seed(5)
    table = local_table(num_slots=81, value_dim=value_dim)
    return MemoryLayer(dim, table=table, **({"heads": 2, "topk": 4, "key_dim": 6} | options))


def bags_of(layer: MemoryLayer, lookup: MemoryLookup) -> Tensor:
    """[..., V] of what was looked up."""
    values = session_of(layer.table).values
    return (values[lookup.ids] * lookup.weights[..., None]).sum((-3, -2))


class LoRA(nn.Module):
    """A linear layer with a low-rank part beside it, as adapters put it; has no ``weight``."""

    def __init__(self, base: nn.Module, dim: int, out_dim: int) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(dim, 2, bias=False), nn.Linear(2, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


class Int8Linear(nn.Module):
    """Integer weights, floating input and output, as 8-bit layers are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", (linear.weight.detach() * 100).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_floating_point()
        return F.linear(x, self.weight.to(x.dtype) / 100, self.bias)


def test_any_module_may_stand_for_query_gate_and_out() -> None:
    query = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 12))
    gate, out = LoRA(nn.Linear(12, 7), 12, 7), nn.Sequential(nn.Linear(7, 9), nn.GELU())
    layer = make_layer(query=query, gate=gate, out=out, out_dim=9)
    x = torch.randn(2, 3, 12)
    y, lookup = layer(x, return_lookup=True)
    expected_queries = query(x).view(2, 3, 2, 6)
    torch.testing.assert_close(layer.scoring_queries(x), expected_queries)
    torch.testing.assert_close(y, out(F.silu(gate(x)) * bags_of(layer, lookup)))
    assert y.shape == (2, 3, 9)
    y.sum().backward()
    for module in (query, gate, out):
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_part_that_was_replaced_is_only_called() -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 12)
    plain = layer(x)
    assert isinstance(layer.out, nn.Linear)
    linear = layer.out
    layer.out = Int8Linear(linear)
    assert not torch.allclose(layer(x), linear.bias.expand(3, -1))
    torch.testing.assert_close(layer(x), plain, atol=0.1, rtol=0.1)
    layer.out = nn.Sequential(linear, nn.Dropout(0.1)).eval()
    assert torch.equal(layer(x), plain)
    layer.out, layer.gate = LoRA(linear, 7, 12), LoRA(layer.gate, 12, 7)  # type: ignore[arg-type]
    layer(x).sum().backward()
    assert layer.gate.up.weight.grad is not None


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_quantized_linears_work_in_place() -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 12)
    plain = layer(x)
    torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, inplace=True)
    assert not isinstance(layer.out, nn.Linear)
    torch.testing.assert_close(layer(x), plain, atol=0.3, rtol=0.3)


@pytest.mark.parametrize(
    ("options", "has_out"),
    [
        ({"gate": "none", "value_dim": 12}, False),
        ({"gate": "none", "value_dim": 12, "out": "linear"}, True),
        ({"gate": "none", "value_dim": 12, "out_dim": 5}, True),
        ({"gate": "silu", "value_dim": 12}, True),
        ({"gate": "silu", "value_dim": 12, "out": "none"}, False),
        ({"gate": "none", "value_dim": 7, "out": "none", "out_dim": 7}, False),
    ],
)
def test_out_is_there_where_it_is_asked_for_or_needed(options: dict[str, Any], has_out: bool) -> None:
    layer = make_layer(**options)
    assert (layer.out is not None) == has_out
    x = torch.randn(3, 12)
    y, lookup = layer(x, return_lookup=True)
    expected = bags_of(layer, lookup)
    if layer.gate is not None:
        expected = F.silu(layer.gate(x)) * expected
    if layer.out is not None:
        expected = layer.out(expected)
    torch.testing.assert_close(y, expected)
    assert y.shape == (3, options.get("out_dim", 12))


@pytest.mark.parametrize("scores", ["softmax", "relu", torch.sigmoid])
def test_scores_become_weights_as_asked(scores: Any) -> None:
    layer = make_layer(scores=scores)
    x = torch.randn(3, 12, requires_grad=True)
    y, lookup = layer(x, return_lookup=True)
    makes = {"softmax": lambda s: s.softmax(-1), "relu": torch.relu}.get(scores, scores)
    assert torch.equal(lookup.weights, makes(lookup.scores))
    assert layer.gate is not None
    assert layer.out is not None
    torch.testing.assert_close(y, layer.out(F.silu(layer.gate(x)) * bags_of(layer, lookup)))
    (lookup.weights.sum() + y.sum()).backward()
    assert layer.half_keys.grad is not None
    assert layer.half_keys.grad.any()


def test_the_gate_on_the_output_is_a_learned_number_per_token() -> None:
    layer = make_layer(mem_gated=True)
    x = torch.randn(3, 12)
    gating, layer.gating = layer.gating, None
    assert gating is not None
    plain = layer(x)
    layer.gating = gating
    torch.testing.assert_close(layer(x), torch.sigmoid(gating(x)) * plain)
    assert layer.state_dict()["gating.weight"].shape == (1, 12)


def test_query_bias_can_be_left_out() -> None:
    assert "query.bias" not in make_layer(query_bias=False).state_dict()


@pytest.mark.parametrize("dropout", ["input_dropout", "query_dropout", "value_dropout"])
def test_dropouts_act_in_training_only(dropout: str) -> None:
    plain, layer = make_layer(), make_layer(**{dropout: 0.5})
    x = torch.randn(5, 12)
    assert torch.equal(layer.eval()(x), plain(x))
    y = layer.train()(x)
    assert not torch.equal(y, plain(x))
    if dropout == "value_dropout":
        torch.testing.assert_close(y[y != 0.0], 2.0 * plain(x)[y != 0.0])
        assert (y == 0.0).any()
    elif dropout == "query_dropout":
        queries = layer.scoring_queries(x)
        torch.testing.assert_close(queries[queries != 0.0], 2.0 * plain.scoring_queries(x)[queries != 0.0])


def test_a_lookup_is_handed_out_and_kept_on_request() -> None:
    layer = make_layer()
    x = torch.randn(2, 3, 12)
    layer(x)
    assert layer.last_lookup is None
    layer.keep_lookup = True
    _, lookup = layer(x, return_lookup=True)
    kept = layer.last_lookup
    assert kept is not None
    assert [tuple(part.shape) for part in kept] == [(2, 3, 2, 4)] * 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, lookup, strict=True))
    assert not any(part.requires_grad for part in kept)
    assert lookup.scores.requires_grad
    all_scores = torch.einsum("bshd,hnd->bshn", layer.scoring_queries(x)[..., :3], layer.keys[:, 0])[..., None]
    all_scores = (
        all_scores + torch.einsum("bshd,hnd->bshn", layer.scoring_queries(x)[..., 3:], layer.keys[:, 1])[..., None, :]
    )
    torch.testing.assert_close(lookup.scores, all_scores.flatten(-2).topk(4).values)


def test_parametrizations_of_the_keys_work() -> None:
    class Unit(nn.Module):
        def forward(self, keys: Tensor) -> Tensor:
            return F.normalize(keys, dim=-1)

    layer = make_layer()
    nn.utils.parametrize.register_parametrization(layer, "half_keys", Unit())
    torch.testing.assert_close(layer.keys.norm(dim=-1), torch.ones(2, 2, 9))
    layer(torch.randn(3, 12)).sum().backward()
    assert layer.parametrizations.half_keys.original.grad is not None  # type: ignore[union-attr]


def test_states_of_before_the_keys_were_renamed_load() -> None:
    layer, other = make_layer(), make_layer()
    old = {name.replace("half_keys", "keys"): torch.randn_like(part) for name, part in layer.state_dict().items()}
    nn.Sequential(layer).load_state_dict({f"0.{name}": part for name, part in old.items()})
    assert torch.equal(layer.keys, old["keys"])
    other.keys = layer.keys  # tied, under the old name
    assert other.half_keys is layer.half_keys
    with pytest.raises(RuntimeError, match=r"Missing key.*half_keys"):
        layer.load_state_dict({name: part for name, part in old.items() if name != "keys"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "none"}, 'out="none" needs value_dim = out_dim, got 7 and 12'),
        ({"out": "yes"}, 'out must be "auto", "linear", "none" or a module'),
        ({"scores": "tanh"}, 'scores must be "softmax", "relu" or a function'),
        ({"input_dropout": 1.0}, "input_dropout = 1.0 must be a probability"),
        ({"query_dropout": -0.1}, "query_dropout = -0.1"),
        ({"value_dropout": float("nan")}, "value_dropout = nan"),
        ({"value_dropout": None}, "value_dropout = None must be a probability"),
        ({"key_init_std": -1.0}, "key_init_std = -1.0 must be a finite number of at least 0"),
        ({"key_init_std": float("inf")}, "key_init_std = inf"),
        ({"key_init_std": "1"}, "key_init_std = '1'"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_layer(**options)


def test_parts_that_answer_another_width_are_refused() -> None:
    x = torch.randn(3, 12)
    with pytest.raises(InvalidRequest, match=r"query answered \[3, 5\].*heads \* key_dim = 12"):
        make_layer(query=nn.Linear(12, 5))(x)
    with pytest.raises(InvalidRequest, match=r"scores= must make weights \[3, 2, 4\]"):
        make_layer(scores=lambda scores: scores.sum(-1))(x)
    with pytest.raises(InvalidRequest, match=r"scores= must make a tensor of weights \[3, 2, 4\], got NoneType"):
        make_layer(scores=lambda _: None)(x)
    for width in (1, 5):
        with pytest.raises(InvalidRequest, match=rf"gate answered \[3, {width}\].* value_dim = 7"):
            make_layer(gate=nn.Linear(12, width))(x)


def test_what_is_no_table_is_refused_with_what_is() -> None:
    with pytest.raises(InvalidRequest, match=r"table = 'facts' is no table of a pool: give pool.table\('facts'\)"):
        MemoryLayer(12, table="facts")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"table = None .* pool.create_table"):
        MemoryLayer(12, table=None)  # type: ignore[arg-type]
