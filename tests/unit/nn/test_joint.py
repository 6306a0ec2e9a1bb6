"""JointOptimizer is two optimizers in the shape of one: what it does is what both do, clipped and skipped together."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from mempool.errors import InvalidRequest, ShardUnavailable
from mempool.nn import MemoryLayer, PoolOptimizer
from mempool.optim import JointOptimizer

from .stand_in import local_table, session_of


class Loop:
    """A model with one layer, its two optimizers, and batches."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.table = local_table()
        layer = MemoryLayer(12, table=self.table, heads=2, topk=3, key_dim=6)
        self.model = nn.Sequential(nn.Linear(12, 12), layer, nn.Linear(12, 1))
        self.dense = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.memory = PoolOptimizer(self.model, lr=0.1)

    def joint(self, **options: Any) -> JointOptimizer:
        return JointOptimizer(self.dense, self.memory, **options)

    def loss(self, step: int) -> Tensor:
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
        return self.model(x).square().sum()  # type: ignore[no-any-return]

    def everything(self) -> dict[str, Tensor]:
        return {"values": session_of(self.table).values.clone(), **copy.deepcopy(self.model.state_dict())}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-7, msg=name)


def test_it_steps_both_under_one_scheduler() -> None:
    apart, together = Loop(), Loop()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (apart.dense, apart.memory)]
    joint = together.joint()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(joint, 0.5)
    for step in range(3):
        apart.loss(step).backward()
        apart.dense.step()
        apart.memory.step()
        apart.dense.zero_grad()
        together.loss(step).backward()
        joint.step()
        joint.zero_grad()
        for each in (*schedulers, scheduler):
            each.step()
    same(together.everything(), apart.everything())
    assert [group["lr"] for group in joint.param_groups] == [0.01 / 8, 0.1 / 8]


def test_it_clips_by_the_norm_of_both_together() -> None:
    """As torch clips a model whose values are a parameter of its own."""
    loop, local = Loop(), Loop()
    joint = loop.joint(max_norm=0.5)
    loop.loss(1).backward()
    local.loss(1).backward()
    values = nn.Parameter(session_of(local.table).values.clone())
    values.grad = session_of(local.table).gradient()
    norm = clip_grad_norm_([*local.model.parameters(), values], 0.5)
    assert norm > 0.5
    joint.step()
    local.dense.step()
    torch.optim.SGD([values], lr=0.1).step()
    assert joint.last_norm == pytest.approx(float(norm), rel=1e-6)
    torch.testing.assert_close(session_of(loop.table).values, values.detach())
    local.table.discard()
    for name, tensor in local.model.state_dict().items():
        torch.testing.assert_close(loop.model.state_dict()[name], tensor)
    loop.loss(2).backward()
    joint.max_norm = math.inf
    joint.step()
    assert joint.last_norm is not None


@pytest.mark.parametrize("where", ["dense", "table"])
def test_a_scaler_skips_both_where_either_has_an_inf(where: str) -> None:
    loop = Loop()
    joint, scaler, before = loop.joint(), torch.amp.GradScaler("cpu", init_scale=4.0), loop.everything()
    scaler.scale(loop.loss(1)).backward()
    if where == "dense":
        loop.model[0].weight.grad[0, 0] = math.inf  # type: ignore[index, union-attr]
    else:
        loop.table.gather(torch.tensor([[1]])).backward(torch.full((1, loop.table.value_dim), math.inf))
    scaler.step(joint)
    scaler.update()
    same(loop.everything(), before)
    assert loop.table.pending
    joint.zero_grad()
    assert not loop.table.pending
    scaler.scale(loop.loss(1)).backward()
    scaler.step(joint)
    other = Loop()
    other.loss(1).backward()
    other.joint().step()
    same(loop.everything(), other.everything())


def test_where_the_pool_does_not_answer_the_model_waits_for_it() -> None:
    loop, other = Loop(), Loop()
    joint, before = loop.joint(), loop.everything()
    loop.loss(1).backward()
    session_of(loop.table).fail_next_commit = ShardUnavailable("away")
    with pytest.raises(ShardUnavailable):
        joint.step()
    same(loop.everything(), before)
    joint.step()
    other.loss(1).backward()
    other.joint().step()
    same(loop.everything(), other.everything())


def test_clipping_refuses_what_is_not_finite_and_changes_nothing() -> None:
    loop = Loop()
    joint, before = loop.joint(max_norm=1.0), loop.everything()
    loop.loss(1).backward()
    loop.model[0].weight.grad[0, 0] = math.nan  # type: ignore[index, union-attr]
    with pytest.raises(InvalidRequest, match="inf or NaN"):
        joint.step()
    same(loop.everything(), before)


def test_its_state_goes_to_another() -> None:
    loop, other = Loop(), Loop()
    joint = loop.joint()
    loop.loss(1).backward()
    joint.step(lambda: 1.0)
    joint.param_groups[0]["lr"] = joint.param_groups[1]["lr"] = 0.25
    loaded = other.joint()
    loaded.load_state_dict(joint.state_dict())
    assert other.dense.param_groups[0]["lr"] == other.memory.param_groups[0]["lr"] == 0.25
    assert loaded.param_groups[0] is other.dense.param_groups[0]
    assert loaded.state is other.dense.state
    assert len(loaded.state) == len(joint.state) > 0
    loaded.dense.load_state_dict(Loop().dense.state_dict())  # as set_state_dict does
    assert loaded.param_groups[0] is other.dense.param_groups[0]
    assert not loaded.state
    with pytest.raises(InvalidRequest, match="no state of a JointOptimizer"):
        loaded.load_state_dict(loop.dense.state_dict())


def test_groups_go_to_the_optimizer_that_they_are_for() -> None:
    loop, table = Loop(), local_table(name="more")
    joint = loop.joint()
    joint.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    joint.add_param_group({"table": table})
    assert len(loop.dense.param_groups) == len(loop.memory.param_groups) == 2
    assert len(joint.param_groups) == 4
    with pytest.raises(InvalidRequest, match="belong to its dense and memory"):
        joint.param_groups = []


def test_what_makes_no_joint_optimizer_is_refused() -> None:
    loop = Loop()
    for dense, memory in ((loop.memory, loop.dense), (loop.dense, loop.dense), (loop.memory, loop.memory)):
        with pytest.raises(InvalidRequest, match="then the PoolOptimizer of its tables"):
            JointOptimizer(dense, memory)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="optimizer of torch's"):
        JointOptimizer(loop.model, loop.memory)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="above 0"):
        loop.joint(max_norm=0.0)
    with pytest.raises(InvalidRequest, match="clips by itself"):
        JointOptimizer(loop.dense, PoolOptimizer(loop.model, max_norm=1.0))
