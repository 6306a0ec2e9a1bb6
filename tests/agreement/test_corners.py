"""Autograd's corners: what a layer on a pool gives there equals the float64 reference, or a plain pass."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mempool.client import Pool, Table
from mempool.nn import MemoryLayer, PoolOptimizer
from mempool.optim import SGD

from .conftest import Pools
from .reference import Reference, all_rows, dense_parameters, leaf, relative_error

TOLERANCE = 5e-6
DIM = 14
Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Result:
    """What one step left behind: outputs, gradients by name (x too), and the change of the values."""

    y: Tensor
    grads: dict[str, Tensor]
    change: Tensor
    updates: int

    def assert_equals(self, other: "Result", *, times: float = 1.0) -> None:
        assert relative_error(self.y, other.y) < TOLERANCE
        assert self.grads.keys() == other.grads.keys()
        for name, grad in other.grads.items():
            assert relative_error(self.grads[name], times * grad) < TOLERANCE, name
        assert relative_error(self.change, times * other.change) < TOLERANCE


@pytest.fixture
def table(pools: Pools) -> Table:
    return make_table(pools)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(21, DIM, generator=torch.Generator().manual_seed(31))


def make_table(pools: Pools, pool: Pool | None = None) -> Table:
    return pools.table(
        shards=2, pool=pool, num_slots=15**2, value_dim=20, block_dim=8, page_slots=16, layout="grid",
        optimizer=SGD(lr=1.0), init_std=1.0,
    )  # fmt: skip


def make_layer(table: Table) -> MemoryLayer:
    torch.manual_seed(37)
    return MemoryLayer(DIM, table=table, heads=2, topk=5, key_dim=8)


def one_step(
    layer: MemoryLayer,
    x: Tensor,
    *,
    forward: Forward = lambda module, x: module(x),
    backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
) -> Result:
    """Forward, backward and step with fresh gradients; the values are put back afterwards."""
    table, before = layer.table, all_rows(layer.table)
    pushed = table.counters.updates_pushed
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(True)
    y = forward(layer, x)
    backward(y.float().square().sum())
    PoolOptimizer(layer).step()
    change = before - all_rows(table)
    table.write(torch.arange(table.num_slots), before)
    grads = {name: p.grad.clone() for name, p in [("x", x), *dense_parameters(layer).items()] if p.grad is not None}
    return Result(y.detach(), grads, change, table.counters.updates_pushed - pushed)


def test_the_plain_pass_itself_equals_the_reference(table: Table, x: Tensor) -> None:
    layer = make_layer(table)
    reference, x64 = Reference.of(layer, all_rows(table)), leaf(x)
    plain = one_step(layer, x)
    y = reference(x64)
    y.square().sum().backward()
    assert relative_error(plain.y, y) < TOLERANCE
    expected = {"x": x64, **reference.parameters}
    assert plain.grads.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(plain.grads[name], tensor.grad) < TOLERANCE, name
    assert relative_error(plain.change, reference.values.grad) < TOLERANCE


def test_eval_gives_the_same_and_asks_no_shard_to_remember(pools: Pools, x: Tensor) -> None:
    with pools.fresh(2) as pool:
        layer = make_layer(make_table(pools, pool))
        plain = one_step(layer, x)
        layer.eval()
        layer(x)  # shards forget what was released with the next request they get
        assert remembered(pool) == 0
        y = layer(x)
        assert remembered(pool) == 0
        layer.train()
        kept = layer(x)
        assert remembered(pool) > 0
        assert torch.equal(y, plain.y)
        assert torch.equal(kept, plain.y)
        del kept, y
        # As in torch, eval says nothing of gradients: a backward pass in it trains.
        one_step(layer.eval(), x).assert_equals(plain)


def test_no_grad_gives_the_same_and_leaves_nothing(pools: Pools, x: Tensor) -> None:
    with pools.fresh(2) as pool:
        layer = make_layer(make_table(pools, pool))
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                y = layer(x)
            assert not y.requires_grad
            assert remembered(pool) == 0
        assert layer.table.pending == 0
        assert torch.equal(y.clone(), one_step(layer, x).y)


def remembered(pool: Pool) -> int:
    return sum(shard.context_bytes for shard in pool.status().shards)


def test_a_frozen_table_gives_the_same_gradients_and_does_not_change(table: Table, x: Tensor) -> None:
    layer = make_layer(table)
    plain = one_step(layer, x)
    table.requires_grad_(False)
    frozen = one_step(layer, x)
    assert frozen.updates == 0
    assert not frozen.change.any()
    for name, grad in plain.grads.items():
        assert relative_error(frozen.grads[name], grad) < TOLERANCE, name


def test_frozen_queries_and_keys_leave_the_values_trained(table: Table, x: Tensor) -> None:
    layer = make_layer(table)
    plain = one_step(layer, x)
    layer.keys.requires_grad_(False)
    layer.query.requires_grad_(False)
    frozen = one_step(layer, x)
    assert relative_error(frozen.change, plain.change) < TOLERANCE
    assert set(plain.grads) - set(frozen.grads) == {"half_keys", "query.weight", "query.bias"}
    layer.requires_grad_(False)
    layer.values.requires_grad_()
    values_only = one_step(layer, x, forward=lambda module, x: module(x.detach()))
    assert values_only.grads == {}
    assert relative_error(values_only.change, plain.change) < TOLERANCE


def test_autocast_keeps_scores_softmax_and_sums_in_float32(table: Table, x: Tensor) -> None:
    layer = make_layer(table)
    reference, x64 = Reference.of(layer, all_rows(table)), leaf(x)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = module(x)
        return y

    result = one_step(layer, x, forward=forward)
    assert result.y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        queries = layer.scoring_queries(x)
        # The reference, from queries rounded by the bfloat16 projection on.
        reference.queries = lambda _: queries.double()  # type: ignore[method-assign]
        bags = reference.bags(x64)
        assert relative_error(layer._lookup(queries)[0], bags) < TOLERANCE
        projections = [(reference.linear(name, x64), getattr(layer, name)(x)) for name in ("gate",)]
    for expected, actual in projections:
        assert relative_error(actual, expected) < 1e-2
    assert all(grad.dtype == torch.float32 for grad in result.grads.values())
    reference(x64).square().sum().backward()
    assert relative_error(result.change, reference.values.grad) < 3e-2


def test_gradients_accumulate_over_backward_passes(table: Table, x: Tensor) -> None:
    layer = make_layer(table)
    whole = one_step(layer, x)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        parts = [module(part) for part in x.split(6)]
        for part in parts[:-1]:
            part.square().sum().backward()
        return parts[-1]

    parts = one_step(layer, x, forward=forward)
    assert parts.updates == 4
    for name, grad in whole.grads.items():
        assert relative_error(parts.grads[name], grad) < TOLERANCE, name
    assert relative_error(parts.change, whole.change) < TOLERANCE


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_one_update_and_the_same(table: Table, x: Tensor, use_reentrant: bool) -> None:
    layer = make_layer(table)
    plain = one_step(layer, x)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(module, x, use_reentrant=use_reentrant)
        return y

    checkpointed = one_step(layer, x, forward=forward)
    assert checkpointed.updates == 1
    checkpointed.assert_equals(plain)


def test_a_second_backward_is_a_second_update(table: Table, x: Tensor) -> None:
    layer = make_layer(table)
    plain = one_step(layer, x)

    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    repeated = one_step(layer, x, backward=twice)
    assert repeated.updates == 2
    repeated.assert_equals(plain, times=2.0)


# The compiler looks at .grad of all it meets and hides torch's warning of that, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_is_the_same(table: Table, x: Tensor, backend: str) -> None:
    layer = make_layer(table)
    plain = one_step(layer, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend)
    for _ in range(2):
        one_step(layer, x, forward=lambda _, x: compiled(x)).assert_equals(plain)
    assert torch.equal(compiled.eval()(x), plain.y)


def test_a_deep_copy_trains_the_same_table(table: Table, x: Tensor) -> None:
    layer = make_layer(table)
    plain = one_step(layer, x)
    twin = copy.deepcopy(layer)
    assert twin.table is table
    one_step(twin, x).assert_equals(plain)


@pytest.fixture
def one_process_group(tmp_path: object) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_ddp_wraps_a_layer(table: Table, x: Tensor) -> None:
    layer = make_layer(table)
    plain = one_step(layer, x)
    wrapped = DistributedDataParallel(layer)
    assert set(wrapped.state_dict()) == {f"module.{name}" for name in layer.state_dict()}
    assert [group["table"] for group in PoolOptimizer(wrapped).param_groups] == [table.name]
    one_step(layer, x, forward=lambda _, x: wrapped(x)).assert_equals(plain)
