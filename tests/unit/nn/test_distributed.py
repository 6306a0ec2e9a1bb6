"""The layer under FSDP2, DDP and torch's checkpoint helpers: on one rank here, FSDP2 on two in processes."""

import copy
import multiprocessing
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mempool.errors import InvalidRequest
from mempool.nn import MemoryLayer, PoolOptimizer
from mempool.nn.keys.queries import NormedQuery
from mempool.optim import JointOptimizer

from .stand_in import local_table, session_of

pytestmark = pytest.mark.filterwarnings("ignore:.*process group of .* ranks:UserWarning")

_BOUND_S = 90.0


def make_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(12, 12), MemoryLayer(12, table=local_table(), heads=2, topk=3, key_dim=6), nn.Linear(12, 1)
    )


def batch(rank: int) -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(rank))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps(model: nn.Module, layer: MemoryLayer, *, rank: int = 0, count: int = 3) -> dict[str, Tensor]:
    """Trains model and memory, and answers all parameters and the values."""
    dense, memory = torch.optim.AdamW(model.parameters(), lr=0.01), PoolOptimizer(model)
    for _ in range(count):
        model(batch(rank)).square().sum().backward()
        assert layer.table.pending == 1
        dense.step()
        dense.zero_grad()
        memory.step()
    assert layer.table.counters.steps_committed == count
    parameters = {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}
    return {"table": session_of(layer.table).values.clone()} | parameters


def shard(model: nn.Sequential, world_size: int) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.usefixtures("one_rank")
def test_fsdp_trains_as_a_plain_model() -> None:
    plain, sharded = make_model(), make_model()
    expected = steps(plain, plain[1])  # type: ignore[arg-type]
    sharded[1](batch(0))  # a look-up before, as of a model that is tried first, pins no storage
    shard(sharded, 1)
    assert isinstance(sharded[1].half_keys, DTensor)  # type: ignore[union-attr]
    actual = steps(sharded, sharded[1])  # type: ignore[arg-type]
    for name, tensor in expected.items():
        if not name.endswith("values"):
            torch.testing.assert_close(actual[name], tensor, msg=name)


@pytest.mark.usefixtures("one_rank")
def test_freezing_and_zeroing_reach_through_fsdp() -> None:
    model = shard(make_model(), 1)
    layer = model[1]
    assert isinstance(layer, MemoryLayer)
    layer.requires_grad_(False)
    model(batch(0)).sum().backward()
    assert layer.table.pending == 0
    layer.requires_grad_(True)
    optimizer, dense = PoolOptimizer(model), torch.optim.AdamW(model.parameters())
    for _ in range(2):  # FSDP takes gradients from parameters: no one may take that for zeroing
        model(batch(0)).sum().backward()
    assert layer.table.pending == 2
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert layer.table.pending == 2
    model.zero_grad()
    assert layer.table.pending == 0
    model(batch(0)).sum().backward()
    assert layer.table.pending == 1
    dense.zero_grad()  # without a step
    assert layer.table.pending == 0
    model(batch(0)).sum().backward()
    dense.step()
    dense.zero_grad()
    assert layer.table.pending == 1, "an ordinary optimizer that stepped zeroes its own"
    optimizer.zero_grad()
    assert layer.table.pending == 0
    model.to("cpu")  # torch swaps the contents of sharded parameters
    model(batch(0)).sum().backward()
    model.zero_grad()
    assert layer.table.pending == 0


@pytest.mark.usefixtures("one_rank")
def test_zeroing_under_fsdp_accumulates_where_gradients_are_not_reduced_yet() -> None:
    model = shard(make_model(), 1)
    layer = model[1]
    assert isinstance(layer, MemoryLayer)
    PoolOptimizer(model)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    model(batch(0)).sum().backward()
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    model(batch(1)).sum().backward()
    assert layer.table.pending == 2
    model.zero_grad()
    assert layer.table.pending == 0


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_ddp_trains_as_a_plain_model(options: dict[str, bool]) -> None:
    plain, wrapped = make_model(), make_model()
    expected = steps(plain, plain[1])  # type: ignore[arg-type]
    actual = steps(DistributedDataParallel(wrapped, **options), wrapped[1])  # type: ignore[arg-type]
    for name, tensor in expected.items():
        if not name.endswith("values"):
            torch.testing.assert_close(actual[name if name == "table" else f"module.{name}"], tensor, msg=name)
    model = DistributedDataParallel(wrapped, **options)
    model(batch(0)).sum().backward()
    model.zero_grad()
    assert wrapped[1].table.pending == 0  # type: ignore[union-attr]


@pytest.mark.usefixtures("one_rank")
def test_both_are_clipped_together_where_one_is_sharded() -> None:
    plain, sharded = make_model(), shard(make_model(), 1)
    for model in (plain, sharded):
        dense = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = JointOptimizer(dense, PoolOptimizer(model), max_norm=0.5)
        for step in range(2):
            model(batch(step)).square().sum().backward()
            optimizer.step()
            assert optimizer.last_norm is not None
            assert optimizer.last_norm > 0.5
            optimizer.zero_grad()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(whole(sharded.state_dict()[name]), tensor, msg=name)
    tables = [session_of(model[1].table).values for model in (plain, sharded)]  # type: ignore[arg-type, union-attr]
    torch.testing.assert_close(*tables)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoint_helpers_carry_the_model_and_refuse_the_pools_optimizer(sharded: bool) -> None:
    saved, loaded = make_model(), make_model()
    if sharded:
        shard(saved, 1)
        shard(loaded, 1)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    state = get_model_state_dict(saved)
    assert "1.half_keys" in state
    assert "1.values" not in state
    set_model_state_dict(loaded, state)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(whole(tensor), whole(saved.state_dict()[name])), name
    dense = torch.optim.AdamW(loaded.parameters())
    loaded(batch(0)).sum().backward()
    dense.step()
    dense.zero_grad()
    loaded[1].table.discard()  # type: ignore[union-attr]
    set_optimizer_state_dict(loaded, dense, get_optimizer_state_dict(loaded, dense))
    memory = PoolOptimizer(loaded)
    with pytest.raises(InvalidRequest, match=r"save and load PoolOptimizer.state_dict\(\)"):
        get_optimizer_state_dict(loaded, memory)
    with pytest.raises(InvalidRequest, match=r"save and load PoolOptimizer.state_dict\(\)"):
        set_optimizer_state_dict(loaded, memory, memory.state_dict())


def _train_as(rank: int, folder: Path) -> dict[str, Tensor]:
    """One of two ranks, each in a process of its own."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=_BOUND_S),
    )
    model = shard(make_model(), 2)
    layer = model[1]
    assert isinstance(layer, MemoryLayer)
    result = steps(model, layer, rank=rank, count=2)
    model(batch(rank)).sum().backward()
    assert layer.table.pending == 1
    model.zero_grad()
    assert layer.table.pending == 0, "also on the rank that has no element of the sharded values"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return result


def _be_second(folder: Path, answers: "multiprocessing.Queue[dict[str, Any]]") -> None:
    torch.set_num_threads(1)
    answers.put({name: tensor.numpy() for name, tensor in _train_as(1, folder).items()})


def test_fsdp_on_two_ranks(tmp_path: Path) -> None:
    """Each rank has a table of its own here; the keys are one model's, trained on the mean of both gradients."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    second = context.Process(target=_be_second, args=(tmp_path, answers))
    second.start()
    try:
        mine = _train_as(0, tmp_path)
        theirs = answers.get(timeout=_BOUND_S)
        second.join(_BOUND_S)
        assert second.exitcode == 0
    finally:
        second.kill()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        same = bool((tensor.numpy() == theirs[name]).all())
        assert same == (name != "table"), name


def test_queries_of_experts_take_a_batch_norm_that_is_of_all_ranks() -> None:
    own = NormedQuery(4, heads=2, key_dim=3, norm="batch", bias=True, made={}).eval()
    of_all = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(own))
    assert type(of_all.norm) is nn.SyncBatchNorm
    x = torch.randn(2, 5, 4)
    assert torch.equal(of_all(x), own(x))
