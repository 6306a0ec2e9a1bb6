"""A compiled layer is one graph, with the answers, gradients and memory of the plain one."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer, PoolOptimizer

from .stand_in import local_table, session_of

# The compiler's own, of many kinds.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_layer(**options: Any) -> MemoryLayer:
    torch.manual_seed(5)
    return MemoryLayer(12, table=local_table(), **({"heads": 2, "topk": 3, "key_dim": 6} | options))


def result_of(layer: MemoryLayer, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The answer and all gradients of one step, values' included; nothing stays."""
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer.zero_grad()
    torch.manual_seed(2)  # where slots are drawn
    y = forward(x)
    y.sin().sum().backward()
    assert layer.table.pending == 1
    grads = [parameter.grad for parameter in layer.parameters()]
    result = [y, x.grad, session_of(layer.table).gradient(), *grads]
    layer.table.discard()
    return [part.clone() for part in result if part is not None]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "scores": "relu", "mem_gated": True, "gate": "none"},
        {"ways": 3},
        {"keys": "hierarchical", "groups": 9, "probes": 3},
        {"score": "tucker", "key_dim": 8},
        {"sample_from": 6, "random_slots": 2, "sink": True},
    ],
)
def test_whole_graphs_equal_plain_ones(backend: str, options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    plain = result_of(layer, layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for _ in range(2):
        for ours, expected in zip(result_of(layer, compiled), plain, strict=True):
            assert torch.equal(ours, expected)
    layer.eval()
    assert torch.equal(compiled(torch.ones(2, 12)), layer(torch.ones(2, 12)))
    assert session_of(layer.table).remembered[-2:] == [False, False]


def test_a_model_of_two_layers_is_one_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(make_layer(), nn.GELU(), make_layer())
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        compiled(torch.randn(3, 12)).sum().backward()
    assert len(graphs) == 1
    optimizer = PoolOptimizer(model)
    optimizer.step()
    assert [layer.table.counters.steps_committed for layer in (model[0], model[2])] == [1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_freezing_and_zeroing_reach_compiled_layers(backend: str) -> None:
    layer = make_layer()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(3, 12, requires_grad=True)
    compiled(x).sum().backward()
    assert layer.table.pending == 1
    layer.zero_grad()
    assert layer.table.pending == 0
    layer.requires_grad_(False)
    compiled(x).sum().backward()
    assert layer.table.pending == 0
    layer.values.requires_grad_()
    compiled(torch.randn(3, 12)).sum().backward()
    assert layer.table.pending == 1
    layer.table.requires_grad_(False)
    layer.table.discard()
    compiled(x).sum().backward()
    assert layer.table.pending == 0
    layer.table.requires_grad_(True)
    layer.requires_grad_(True)
    torch.autograd.grad(compiled(x).sum(), x)
    assert layer.table.pending == 0


def test_autocast_and_lookups_go_through() -> None:
    layer = make_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, lookup = compiled(x, return_lookup=True)
        expected, expected_lookup = layer(x, return_lookup=True)
    assert torch.equal(lookup.ids, expected_lookup.ids)
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)


def test_ids_are_checked_when_the_operator_runs() -> None:
    table = local_table()
    compiled = torch.compile(lambda ids: table.gather(ids), backend="eager", fullgraph=True)
    assert compiled(torch.tensor([[1, 2]])).shape == (1, 7)
    with pytest.raises(InvalidRequest, match="outside table 'facts'"):
        compiled(torch.tensor([[1, 81]]))
    assert torch.equal(compiled(torch.zeros(3, 0, dtype=torch.int64)), torch.zeros(3, 7))


def test_a_graph_whose_table_is_gone_says_so() -> None:
    table = local_table()
    number, anchor = table.link.number, torch.zeros(1)
    del table
    gc.collect()
    with pytest.raises(InvalidRequest, match="not open in this process"):
        torch.ops.mempool.gather(anchor, None, torch.tensor([[1]]), None, number, 7, True, False)


def test_export_says_what_to_do() -> None:
    with pytest.raises(Exception, match=r"table 'facts' cannot be exported.*look up in between"):
        torch.export.export(make_layer(), (torch.randn(3, 12),))
