"""PEERLayer against its formula with local tensors: answers, every gradient, and training on shards that move."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mempool
from mempool.errors import InvalidRequest
from mempool.nn import PEERLayer, PoolOptimizer, reading
from mempool.optim import Adagrad

from .conftest import Pools
from .experts import LocalExperts
from .reference import all_rows, leaf, relative_error
from .test_training import OPTIMIZERS

# torch.optim.Adagrad makes sparse tensors in a way that torch itself warns of, once.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

TABLE: dict[str, Any] = {"num_slots": 144, "value_dim": 22, "block_dim": 8, "page_slots": 16, "layout": "rows"}
DIM = 9


def make_layer(table: mempool.Table, **options: Any) -> PEERLayer:
    torch.manual_seed(3)
    table_options = {"heads": 2, "topk": 4, "key_dim": 6} | options
    return PEERLayer(DIM, table=table, **table_options)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(
    ("act", "scores", "query_norm"),
    [("gelu", "softmax", "batch"), ("relu", "relu", "layer"), ("silu", "softmax", "none")],
)
def test_answers_and_every_gradient_equal_the_formula(
    pools: Pools, shards: int, act: str, scores: str, query_norm: str
) -> None:
    table = pools.table(shards=shards, optimizer=mempool.optim.SGD(lr=1.0), **TABLE)
    layer = make_layer(table, act=act, scores=scores, query_norm=query_norm)
    local = LocalExperts(layer, torch.float64)
    x = torch.randn(7, DIM, requires_grad=True)
    x64 = leaf(x)
    y, expected = layer(x), local(x64)
    assert y.shape == (7, 13)
    assert relative_error(y, expected) < 3e-6
    direction = torch.randn(7, 13)
    before = all_rows(table).double()
    y.backward(direction)
    expected.backward(direction.double())
    assert relative_error(x.grad, x64.grad) < 3e-6
    assert relative_error(layer.half_keys.grad, local.half_keys.grad) < 3e-6
    for ours, theirs in zip(layer.query.parameters(), local.query.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad, floor=0.1) < 3e-6  # 0 of a bias before its mean is taken off
    assert PoolOptimizer(layer).step() is None
    assert relative_error(before - all_rows(table).double(), local.rows.grad) < 3e-6  # SGD of rate 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_many_steps_equal_torchs_while_the_pool_goes_from_one_to_three_to_two_shards(
    pools: Pools, optimizer: str
) -> None:
    ours, torchs = OPTIMIZERS[optimizer]
    count = 200 if (pools.kind, optimizer) == ("local", "Adam") else 50
    grow_at, shrink_at = count // 3, 2 * count // 3
    with pools.fresh(1) as pool:
        table = pools.table(pool=pool, optimizer=ours, **TABLE)
        layer = make_layer(table)
        local = LocalExperts(layer, torch.float32)
        dense = [each for each in layer.parameters() if each is not layer.values]
        local_dense = [each for each in local.parameters() if each is not local.rows]
        steps: list[Any] = [
            PoolOptimizer(layer), torch.optim.SGD(dense, lr=0.05),
            torchs([local.rows]), torch.optim.SGD(local_dense, lr=0.05),
        ]  # fmt: skip
        for number in range(count):
            x = torch.randn(8, DIM)
            target = torch.tanh(x.roll(1, dims=1)).repeat(1, 2)[:, :13]
            for each in (layer, local):
                (each(x) - target).square().mean().backward()
            if number in (grow_at, shrink_at):
                # Between backward and step: what is held does not move, the client sends it again.
                pool.rescale(shards=3 if number == grow_at else 2)
            for step in steps:
                step.step()
                step.zero_grad()
        assert relative_error(all_rows(table), local.rows) < 1e-5
        assert relative_error(layer.half_keys, local.half_keys) < 1e-5
        status = pool.status()
        assert {shard.tables[0].updates_applied for shard in status.shards} == {count}


def test_several_lookups_of_a_step_frozen_rows_and_no_grad(pools: Pools) -> None:
    table = pools.table(shards=2, optimizer=Adagrad(lr=0.1), **TABLE)
    layer = make_layer(table, query_norm="none")
    local, x = LocalExperts(layer, torch.float64), torch.randn(5, DIM)
    optimizer, before = PoolOptimizer(layer), all_rows(table)
    with torch.no_grad():
        assert relative_error(layer(x), local(x.double())) < 3e-6
    for part in x.split(2):  # micro-batches
        layer(part).sum().backward()
    local(x.double()).sum().backward()
    optimizer.step()
    grad = local.rows.grad
    expected = before.double() - 0.1 * grad / (grad.abs() + 1e-10)
    touched = grad.abs() > 1e-6  # Adagrad's first step is the sign of what is left of 0
    assert relative_error(all_rows(table)[touched], expected[touched]) < 1e-5
    table.requires_grad_(False)
    frozen, own = all_rows(table), x.clone().requires_grad_()
    layer(own).sum().backward()
    assert table.pending == 0
    assert own.grad.abs().sum() > 0
    assert torch.equal(all_rows(table), frozen)
    empty = layer(torch.zeros(0, DIM, requires_grad=True))
    assert empty.shape == (0, 13)
    empty.sum().backward()


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float8_e4m3fn"])
def test_fewer_bytes_on_the_wire_cost_some_precision(pools: Pools, wire_dtype: Any) -> None:
    table = pools.table(shards=2, optimizer=mempool.optim.SGD(lr=1.0), **TABLE)
    table.wire_dtype = wire_dtype
    layer = make_layer(table)
    local = LocalExperts(layer, torch.float64)
    x = torch.randn(7, DIM, requires_grad=True)
    x64, before = leaf(x), all_rows(table).double()
    y, expected = layer(x), local(x64)
    assert relative_error(y, expected) < 0.02
    y.sum().backward()
    expected.sum().backward()
    assert relative_error(x.grad, x64.grad) < 0.08
    PoolOptimizer(layer).step()
    assert relative_error(before - all_rows(table).double(), local.rows.grad) < 0.08


def test_small_gradients_survive_packed_rows_beside_large_inputs(pools: Pools) -> None:
    """u ends within a block (9 columns, blocks of 8), whose scale would be that of the inputs."""
    table = pools.table(shards=2, optimizer=mempool.optim.SGD(lr=1e8), **TABLE)
    table.wire_dtype = "float8_e4m3fn"
    layer = make_layer(table, query_norm="none")
    local = LocalExperts(layer, torch.float64)
    x = 10 * torch.randn(7, DIM)
    (1e-8 * layer(x)).sum().backward()
    (1e-8 * local(x.double())).sum().backward()
    before = all_rows(table).double()
    PoolOptimizer(layer).step()
    of_v = (before - all_rows(table).double())[:, DIM:]
    assert relative_error(of_v, 1e8 * local.rows.grad[:, DIM:]) < 0.02


def test_what_is_wrong_is_said_and_changes_nothing(pools: Pools) -> None:
    columns = pools.table(shards=2, **TABLE | {"layout": "columns"})
    with pytest.raises(InvalidRequest, match="which may cut an expert in two: make it with layout="):
        make_layer(columns)
    table = pools.table(shards=2, **TABLE)
    for options, message in (
        ({"act": "tanh"}, "act must be one of gelu, relu, silu, got 'tanh'"),
        ({"query_norm": "rms"}, 'query_norm must be "batch", "layer" or "none"'),
        ({"topk": 145}, "topk must be from 1 to the table's 144 slots"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            make_layer(table, **options)
    with pytest.raises(InvalidRequest, match="experts of 22 inputs need dim \\+ out_dim"):
        PEERLayer(22, table=table)
    layer = make_layer(table)
    with pytest.raises(InvalidRequest, match=r"this layer takes \[..., 9\], got \[2, 8\]"):
        layer(torch.zeros(2, 8))
    with pytest.raises(InvalidRequest, match="asked and awaited in one call"):
        layer.start(torch.zeros(2, DIM))
    with (
        table.at() as version,
        torch.no_grad(),
        reading(layer, version),
        pytest.raises(InvalidRequest, match="asked as experts, which answer at the newest version"),
    ):
        layer(torch.zeros(2, DIM))
    assert table.pending == 0


def test_what_was_trained_outlives_the_process(tmp_path: Path) -> None:
    """Rows of a pool that was closed and opened again are those of one that was not."""
    rows = []
    for ends in (False, True):
        folder = tmp_path / str(ends)
        pool = mempool.local(folder, shards=2)
        table = pool.create_table(mempool.TableConfig(name="experts", **TABLE))
        layer = make_layer(table)
        optimizer = PoolOptimizer(layer)
        torch.manual_seed(11)
        for _ in range(3):
            layer(torch.randn(6, DIM)).square().sum().backward()
            optimizer.step()
        if ends:
            pool.close()
            pool = mempool.local(folder)
            table = pool.table("experts")
        rows.append(all_rows(table))
        pool.close()
    assert torch.equal(*rows)
