"""Layers that are started early: under checkpointing, autocast and the compiler, and what is refused."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mempool
from mempool.client import Pool, Table
from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer, PendingMemory, PoolOptimizer
from mempool.optim import SGD


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with mempool.local(device="cpu") as pool:
        yield pool


@pytest.fixture
def table(pool: Pool) -> Iterator[Table]:
    config = mempool.TableConfig(name="facts", num_slots=9**2, value_dim=12, optimizer=SGD(lr=0.5))
    yield pool.create_table(config)
    pool.drop_table("facts")


def make_layer(table: Table, **options: Any) -> MemoryLayer:
    torch.manual_seed(5)
    return MemoryLayer(12, table=table, heads=2, topk=3, key_dim=6, **options)


def result_of(layer: MemoryLayer, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The answer and all gradients of one step, the norm of the values' included; nothing stays."""
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer.zero_grad()
    torch.manual_seed(2)  # of dropout
    y = forward(x)
    y.sin().sum().backward()
    prepared = layer.table.prepare()
    assert prepared is not None
    assert prepared.updates == 1
    norm = torch.tensor(prepared.squared_norm)
    layer.table.discard()
    return [y.detach(), norm, x.grad, *(parameter.grad for parameter in layer.parameters())]  # type: ignore[list-item]


def assert_alike(ours: list[Tensor], expected: list[Tensor]) -> None:
    """Bitwise; but what several branches add to the gradient of x is added in another order."""
    for number, (mine, other) in enumerate(zip(ours, expected, strict=True)):
        if number == 2:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(mine, other)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"gate": "none"},
    {"mem_gated": True, "qk_norm": True, "scores": "relu"},
    {"input_dropout": 0.2, "query_dropout": 0.2, "value_dropout": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_started_and_finished_it_is_a_call(table: Table, options: dict[str, Any]) -> None:
    layer = make_layer(table, **options)
    plain = result_of(layer, layer)
    assert_alike(result_of(layer, lambda x: layer.finish(layer.start(x))), plain)
    early = make_layer(table, overlap=True, **options)
    assert_alike(result_of(early, lambda x: early(x).result()), plain)
    pending, lookup = early(torch.ones(2, 3, 12), return_lookup=True)
    assert pending.lookup is lookup
    assert lookup.ids.shape == (2, 3, 2, 3)
    early.keep_lookup = True
    assert pending.result().shape == (2, 3, 12)
    assert torch.equal(early.last_lookup.ids, lookup.ids)  # type: ignore[union-attr]
    assert repr(pending) == "PendingMemory('facts', tokens=[2, 3], done)"


def inside(layer: MemoryLayer, x: Tensor, reentrant: bool) -> Tensor:
    def block(x: Tensor) -> Tensor:
        return layer.start(x).result()

    return checkpoint(block, x, use_reentrant=reentrant)  # type: ignore[no-any-return]


def two_blocks(layer: MemoryLayer, x: Tensor) -> Tensor:
    """Started in one block, and finished in the next, each computed again."""

    def first(x: Tensor) -> tuple[PendingMemory, Tensor]:
        return layer.start(x), x * 1.0

    pending, y = checkpoint(first, x, use_reentrant=False)
    answer: Tensor = checkpoint(lambda y: y * 0.0 + pending.result(), y, use_reentrant=False)
    return answer


@pytest.mark.parametrize(
    "forward",
    [
        lambda layer, x: inside(layer, x, True),
        lambda layer, x: inside(layer, x, False),
        two_blocks,
    ],
    ids=["reentrant", "not reentrant", "over two blocks"],
)
def test_activation_checkpointing_changes_nothing(table: Table, forward: Callable[..., Tensor]) -> None:
    layer = make_layer(table)
    assert_alike(result_of(layer, lambda x: forward(layer, x)), result_of(layer, layer))


def test_a_start_without_gradients_is_not_finished_with_them(table: Table) -> None:
    """They would not reach queries and keys, and nobody would be told."""
    layer, kept = make_layer(table), []

    def block(x: Tensor) -> Tensor:
        kept.append(layer.start(x))
        return x.sin()

    y = checkpoint(block, torch.ones(2, 12, requires_grad=True), use_reentrant=True)
    with pytest.raises(InvalidRequest, match="was started without gradients"):
        y + kept[0].result()
    with torch.no_grad():
        assert kept[0].result().shape == (2, 12)
    layer.eval()
    assert kept[0].result().shape == (2, 12)


def test_autocast_is_that_of_the_block(table: Table) -> None:
    layer = make_layer(table)

    def call(x: Tensor, *, early: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = layer.start(x).result() if early else layer(x)
        assert y.dtype == torch.bfloat16
        return y.float()

    plain = result_of(layer, lambda x: call(x, early=False))
    for number, (ours, expected) in enumerate(zip(result_of(layer, lambda x: call(x, early=True)), plain, strict=True)):
        if number == 2:
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_it_breaks_the_graph_and_is_right(table: Table) -> None:
    torch.compiler.reset()
    layer = make_layer(table)
    ffn = nn.Linear(12, 12)

    def model(x: Tensor) -> Tensor:
        pending = layer.start(x)
        y: Tensor = ffn(x).sin()
        return y + layer.finish(pending)

    assert_alike(result_of(layer, torch.compile(model, backend="eager")), result_of(layer, model))
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"disable|Unsupported"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 12))
    torch.compiler.reset()


def test_frozen_values_and_zeroed_ones(table: Table) -> None:
    layer = make_layer(table)
    layer.values.requires_grad_(False)
    layer.start(torch.ones(2, 12)).result().sum().backward()
    assert table.pending == 0
    assert layer.half_keys.grad is not None
    layer.values.requires_grad_(True)
    layer.start(torch.ones(2, 12)).result().sum().backward()
    assert table.pending == 1
    layer.zero_grad()
    assert table.pending == 0
    layer.start(torch.ones(2, 12)).result().sum().backward()
    assert table.pending == 1
    table.discard()


def test_mistakes_are_told_at_the_start(table: Table) -> None:
    layer, other = make_layer(table), make_layer(table)
    with pytest.raises(InvalidRequest, match=r"takes \[..., 12\]"):
        layer.start(torch.ones(2, 5))
    pending = layer.start(torch.ones(2, 12))
    with pytest.raises(InvalidRequest, match="started by another layer"):
        other.finish(pending)
    with pytest.raises(InvalidRequest, match="cannot be pickled"):
        pickle.dumps(pending)
    assert copy.deepcopy(layer).start(torch.ones(2, 12)).result().shape == (2, 12)


class Block(nn.Module):
    def __init__(self, table: Table, *, early: bool = True) -> None:
        super().__init__()
        self.memory = make_layer(table)
        self.ffn = nn.Linear(12, 12)
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        if not self.early:
            return self.ffn(x) + self.memory(x)  # type: ignore[no-any-return]
        pending = self.memory.start(x)
        return self.ffn(x) + pending.result()  # type: ignore[no-any-return]


def sharded(block: Block) -> nn.Module:
    fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    return block


@pytest.mark.filterwarnings("ignore")  # FSDP's own
@pytest.mark.parametrize("wrap", [sharded, DistributedDataParallel], ids=["FSDP", "DDP"])
def test_a_block_that_calls_both_may_be_sharded_and_replicated(
    pool: Pool, table: Table, tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    other = pool.create_table(mempool.TableConfig(name="words", num_slots=9**2, value_dim=12, optimizer=SGD(lr=0.5)))
    other.write(range(81), table.rows(range(81)))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = []
        for block, wrapping in ((Block(table), wrap), (Block(other, early=False), lambda block: block)):
            model = wrapping(block)
            dense, memory = torch.optim.SGD(model.parameters(), lr=0.1), PoolOptimizer(model)
            for step in range(2):
                x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step))
                model(x).sin().sum().backward()
                assert block.memory.table.pending == 1
                dense.step()
                memory.step()
                dense.zero_grad()
                memory.zero_grad()
            whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in model.parameters()]
            found.append([block.memory.table.rows(range(81)), *whole])
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
        pool.drop_table("words")
