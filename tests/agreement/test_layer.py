"""MemoryLayer on a pool: forward and every gradient equal the float64 reference of the paper's formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mempool.nn import MemoryLayer, PoolOptimizer
from mempool.optim import SGD

from .conftest import Pools
from .reference import Reference, all_rows, dense_parameters, leaf, relative_error

TOLERANCE = 5e-6


def assert_agrees(layer: MemoryLayer, x: Tensor) -> None:
    """Forward, the gradients of x and of all parameters, and the values after one SGD step of lr 1."""
    values = all_rows(layer.table)
    reference, x64 = Reference.of(layer, values), leaf(x)
    x = x.detach().clone().requires_grad_(True)
    y, expected = layer(x), reference(x64)
    assert relative_error(y, expected) < TOLERANCE
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction.double())
    assert relative_error(x.grad, x64.grad) < TOLERANCE
    for name, parameter in dense_parameters(layer).items():
        assert relative_error(parameter.grad, reference.parameters[name].grad) < TOLERANCE, name
    assert torch.equal(values, all_rows(layer.table)), "values changed before the step"
    PoolOptimizer(layer, lr=1.0).step()
    # Read back as a difference of float32 values: their rounding is part of the error.
    assert relative_error(values - all_rows(layer.table), reference.values.grad) < 4 * TOLERANCE


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one head": (
        {"num_slots": 9**2, "value_dim": 16, "block_dim": 16, "shards": 1},
        {"dim": 16, "heads": 1, "topk": 3, "key_dim": 8},
    ),
    "paper shape": (
        {"num_slots": 64**2, "value_dim": 64, "block_dim": 16, "shards": 4, "layout": "columns"},
        {"dim": 48, "heads": 4, "topk": 32, "key_dim": 32},
    ),
    "all slots": (
        {"num_slots": 5**2, "value_dim": 24, "block_dim": 8, "shards": 2},
        {"dim": 20, "heads": 2, "topk": 25, "key_dim": 6},
    ),
    "odd widths on a grid": (
        {"num_slots": 31**2, "value_dim": 37, "block_dim": 16, "page_slots": 64, "shards": 4, "layout": "grid"},
        {"dim": 29, "heads": 3, "topk": 7, "key_dim": 10},
    ),
    "rows, top-1, plain": (
        {"num_slots": 16**2, "value_dim": 12, "page_slots": 16, "shards": 4, "layout": "rows"},
        {"dim": 18, "heads": 5, "topk": 1, "key_dim": 4, "gate": "none"},
    ),
    "plain without projection": (
        {"num_slots": 12**2, "value_dim": 16, "shards": 2},
        {"dim": 16, "heads": 2, "topk": 6, "key_dim": 8, "gate": "none"},
    ),
    "qk-norm": (
        {"num_slots": 16**2, "value_dim": 32, "block_dim": 8, "shards": 2},
        {"dim": 24, "heads": 2, "topk": 8, "key_dim": 16, "qk_norm": True},
    ),
    "query norm": (
        {"num_slots": 16**2, "value_dim": 32, "block_dim": 8, "shards": 2},
        {"dim": 24, "heads": 2, "topk": 8, "key_dim": 16, "query_norm": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient_equal_the_float64_reference(pools: Pools, case: str) -> None:
    table_options, layer_options = CASES[case]
    torch.manual_seed(17)
    table = pools.table(optimizer=SGD(lr=0.1), **table_options)
    layer = MemoryLayer(table=table, **layer_options)
    assert_agrees(layer, torch.randn(33, layer.dim))


def test_layers_share_one_table_and_add_up_in_it(pools: Pools) -> None:
    torch.manual_seed(18)
    table = pools.table(num_slots=10**2, value_dim=16, block_dim=8, optimizer=SGD(lr=1.0))
    values = all_rows(table)
    layers = [
        MemoryLayer(12, table=table, heads=1, topk=4, key_dim=6),
        MemoryLayer(12, table=table, heads=3, topk=2, key_dim=4, gate="none"),
    ]
    references = [Reference.of(layer, values) for layer in layers]
    references[1].values = references[0].values
    x = torch.randn(9, 12)
    model = torch.nn.Sequential(*layers)
    y, expected = model(x), references[1](references[0](leaf(x)))
    assert relative_error(y, expected) < TOLERANCE
    y.square().sum().backward()
    expected.square().sum().backward()
    for layer, reference in zip(layers, references, strict=True):
        for name, parameter in dense_parameters(layer).items():
            assert relative_error(parameter.grad, reference.parameters[name].grad) < TOLERANCE, name
    optimizer = PoolOptimizer(model)
    assert len(optimizer.param_groups) == 1
    optimizer.step()
    assert relative_error(values - all_rows(table), references[0].values.grad) < 4 * TOLERANCE
    assert table.counters.updates_committed == 2
