"""MultiModalMemory on pools: answers and every gradient of the float64 reference, of one table and of several."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mempool.nn import MultiModalMemory, PoolOptimizer, reading
from mempool.optim import SGD

from .conftest import Pools
from .multimodal import LocalMemory, own_parameters
from .reference import all_rows, leaf, relative_error

TOLERANCE = 5e-6
WIDTHS = {"image": 5, "sound": 7, "text": 6}
RESERVED = {"image": range(0, 36), "text": range(50, 71)}  # whole rows of 12 half-keys, and a stretch across rows
TABLE: dict[str, Any] = {"num_slots": 140, "value_dim": 8, "block_dim": 4, "page_slots": 16, "optimizer": SGD(lr=1.0)}


def make_memory(table: Any, **options: Any) -> MultiModalMemory:
    torch.manual_seed(3)
    of_memory = {"heads": 2, "topk": 5, "key_dim": 12, "out_dim": 9} | options
    memory = MultiModalMemory(WIDTHS, table=table, **of_memory)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if name.endswith("offsets"):
                parameter.normal_()
    return memory


def seen(name: str) -> set[int]:
    others = {slot for other, slots in RESERVED.items() if other != name for slot in slots}
    return set(range(TABLE["num_slots"])) - others


def assert_agrees(memory: MultiModalMemory, local: LocalMemory, ours: Tensor, theirs: Tensor, *inputs: Any) -> None:
    """Outputs, gradients of all parameters and inputs, and of the values by one SGD step of rate 1."""
    assert relative_error(ours, theirs) < TOLERANCE
    direction = torch.randn_like(ours)
    ours.backward(direction)
    theirs.backward(direction.double())
    for name, parameter in own_parameters(memory).items():
        expected = local.parameters[name].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert relative_error(parameter.grad, expected, floor=0.1) < TOLERANCE, name
    for one, other in inputs:
        assert relative_error(one.grad, other.grad) < TOLERANCE
    before = {name: all_rows(view.table).double() for name, view in memory.views.items()}
    PoolOptimizer(memory).step()
    for name, view in memory.views.items():
        expected = local.values[name].grad
        change = before[name] - all_rows(view.table).double()
        assert relative_error(change, torch.zeros_like(change) if expected is None else expected, floor=1e-3) < 2e-5


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(
    ("fuse", "options"),
    [
        ("sum", {"qk_norm": True}),
        ("concat", {"ways": 3, "gate": "none"}),
        ("gate", {"scores": "relu", "query_bias": False}),
    ],
)
def test_one_table_with_reserved_slots_and_offsets(pools: Pools, shards: int, fuse: str, options: Any) -> None:
    table = pools.table(shards=shards, **TABLE)
    memory = make_memory(table, reserved=RESERVED, fuse=fuse, **options)
    values = all_rows(table)
    local = LocalMemory(memory, dict.fromkeys(WIDTHS, values), {name: seen(name) for name in WIDTHS})
    inputs = {name: torch.randn(11, width, requires_grad=True) for name, width in WIDTHS.items()}
    inputs64 = {name: leaf(x) for name, x in inputs.items()}
    pairs = [(inputs[name], inputs64[name]) for name in WIDTHS]
    assert_agrees(memory, local, memory(inputs), local(inputs64), *pairs)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_modality_looks_into_anothers_slots(pools: Pools, shards: int) -> None:
    table = pools.table(shards=shards, **TABLE)
    memory = make_memory(table, reserved=RESERVED)
    local = LocalMemory(memory, dict.fromkeys(WIDTHS, all_rows(table)), {name: seen(name) for name in WIDTHS})
    x = torch.randn(13, WIDTHS["image"], requires_grad=True)
    x64 = leaf(x)
    y, found = memory.lookup(x, modality="image", from_="text", return_lookup=True)
    assert set(found.ids.flatten().tolist()) <= seen("text")
    assert relative_error(y, memory.lookup(x, modality="image")) > 0.1
    assert_agrees(memory, local, y, local.lookup(x64, "image", "text"), (x, x64))
    assert memory.views["image"].search.offsets.grad is None, "the offsets are those of whose slots are looked up"


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_table_for_each(pools: Pools, shards: int) -> None:
    sizes = {"image": 100, "sound": 140, "text": 81}
    tables = {name: pools.table(shards=shards, **TABLE | {"num_slots": size}) for name, size in sizes.items()}
    memory = make_memory(tables)
    assert memory.keys is None
    local = LocalMemory(memory, {name: all_rows(table) for name, table in tables.items()})
    inputs = {name: torch.randn(2, 4, width, requires_grad=True) for name, width in WIDTHS.items()}
    inputs64 = {name: leaf(x) for name, x in inputs.items()}
    flat = {name: x.flatten(0, 1) for name, x in inputs64.items()}
    ours = memory(inputs) + memory.lookup(inputs["text"], modality="text", from_="image")
    theirs = local(flat) + local.lookup(flat["text"], "text", "image")
    pairs = [(inputs[name], inputs64[name]) for name in WIDTHS]
    assert_agrees(memory, local, ours.flatten(0, 1), theirs, *pairs)


def test_slots_of_others_are_never_trained(pools: Pools) -> None:
    table = pools.table(shards=2, **TABLE)
    memory = make_memory(table, reserved=RESERVED, topk=40)
    before = all_rows(table)
    optimizer = PoolOptimizer(memory)
    for _ in range(3):
        memory.lookup(torch.randn(50, WIDTHS["sound"]), modality="sound").square().sum().backward()
        optimizer.step()
    changed = (all_rows(table) != before).any(1)
    trained = set(changed.nonzero().flatten().tolist())
    assert trained <= seen("sound")
    assert len(trained) > 60


def test_it_is_read_at_a_version(pools: Pools) -> None:
    table = pools.table(shards=2, **TABLE)
    memory = make_memory(table, reserved=RESERVED)
    inputs = {name: torch.randn(4, width) for name, width in WIDTHS.items()}
    with torch.no_grad(), table.at() as version:
        expected = memory(inputs)
        with torch.enable_grad():
            memory(inputs).sum().backward()
        PoolOptimizer(memory).step()
        assert not torch.equal(memory(inputs), expected)
        with reading(memory, version):
            assert torch.equal(memory(inputs), expected)


def test_frozen_views_train_nothing(pools: Pools) -> None:
    table = pools.table(shards=2, **TABLE)
    memory = make_memory(table, reserved=RESERVED)
    optimizer = PoolOptimizer(memory)
    assert len(optimizer.param_groups) == 1, "one table, one group"
    memory.views["image"].requires_grad_(False)
    inputs = {name: torch.randn(4, width) for name, width in WIDTHS.items()}
    memory.lookup(inputs["image"], modality="image").sum().backward()
    assert table.pending == 0
    assert memory.views["image"].search.offsets.grad is None
    assert memory.keys is not None
    assert memory.keys.half_keys.grad is not None, "shared by all, and not the view's"
    memory(inputs).sum().backward()
    assert table.pending == 2
    memory.zero_grad()
    assert table.pending == 0
