"""PoolOptimizer on tables that are local tensors, beside torch.optim.SGD on the same values as parameters."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import mempool.optim
from mempool.client import Table
from mempool.errors import InvalidRequest, ShardUnavailable
from mempool.nn import MemoryLayer, PoolOptimizer, TableGradient

from .stand_in import POOL, local_table, session_of


def push(table: Table, ids: list[int], grads: Tensor) -> None:
    """One backward pass: row ids[i] gets the gradient grads[i]."""
    table.gather(torch.tensor(ids)[:, None]).backward(grads)


class Twin:
    """Two tables and the same values as parameters of torch's SGD; every gradient goes to both."""

    def __init__(self, *, max_norm: float | None = None, lr: float = 0.5) -> None:
        self.tables = [local_table(name="first", lr=lr), local_table(name="second", value_dim=3, lr=lr)]
        self.parameters = [nn.Parameter(session_of(table).values.clone()) for table in self.tables]
        self.ours = PoolOptimizer(self.tables, max_norm=max_norm)
        self.torchs = torch.optim.SGD(self.parameters, lr=lr)
        self.generator = torch.Generator().manual_seed(11)

    def backward(self, scale: float = 1.0) -> None:
        for table, parameter in zip(self.tables, self.parameters, strict=True):
            ids = torch.randint(table.num_slots, (5,), generator=self.generator).tolist()
            grads = scale * torch.randn(5, table.value_dim, generator=self.generator)
            push(table, ids, grads)
            parameter[ids].backward(grads)

    def assert_equal(self) -> None:
        for table, parameter in zip(self.tables, self.parameters, strict=True):
            torch.testing.assert_close(session_of(table).values, parameter.detach(), rtol=1e-6, atol=1e-6)


def calls(table: Table) -> list[str]:
    return [call[0] for call in session_of(table).calls]


def test_one_group_per_table_however_many_layers_share_it() -> None:
    shared, other = local_table(name="shared", lr=0.25), local_table(name="other", lr=0.125)
    model = nn.Sequential(
        MemoryLayer(12, table=shared, heads=1, topk=2, key_dim=4),
        nn.Linear(12, 12),
        nn.Sequential(MemoryLayer(12, table=shared, heads=2, topk=1, key_dim=4)),
        MemoryLayer(12, table=other, heads=1, topk=1, key_dim=4),
    )
    optimizer = mempool.optim.PoolOptimizer(model)
    assert [(group["table"], group["lr"]) for group in optimizer.param_groups] == [("shared", 0.25), ("other", 0.125)]
    assert [group["lr"] for group in PoolOptimizer(model, lr=3.0).param_groups] == [3.0, 3.0]
    optimizer = PoolOptimizer([{"table": shared, "lr": 7.0}, other], lr=2.0)
    assert [(group["table"], group["lr"]) for group in optimizer.param_groups] == [("shared", 7.0), ("other", 2.0)]
    assert [group["table"] for group in PoolOptimizer(shared).param_groups] == ["shared"]
    optimizer.param_groups[0]["lr"] = 0.5
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert session_of(shared).calls == [("commit", 0.5, 1.0)]
    assert session_of(other).calls == [("commit", 2.0, 1.0)]


def test_accumulates_applies_and_clears_as_torch() -> None:
    twin = Twin()
    for _ in range(3):
        twin.torchs.zero_grad()
        twin.backward()
        twin.backward()
        twin.ours.step()
        twin.torchs.step()
        twin.assert_equal()
    assert calls(twin.tables[0]) == ["commit"] * 3
    assert twin.ours.last_norm is None


def test_zero_grad_discards_what_is_held_and_sends_nothing_otherwise() -> None:
    twin = Twin()
    twin.ours.zero_grad()
    twin.ours.step()
    assert calls(twin.tables[0]) == []
    twin.backward()
    twin.ours.zero_grad()
    twin.ours.zero_grad()
    twin.ours.step()
    assert calls(twin.tables[0]) == ["discard"]
    assert all(table.pending == 0 for table in twin.tables)


@pytest.mark.parametrize(
    ("max_norm", "norm_type"), [(1.0, 2.0), (4.0, 2.0), (100.0, 2.0), (math.inf, 2.0), (1.0, math.inf), (4.0, 1.0)]
)
def test_clips_by_the_global_norm_as_torch(max_norm: float, norm_type: float) -> None:
    twin = Twin(max_norm=max_norm)
    twin.ours.norm_type = norm_type
    for _ in range(3):
        twin.backward()
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters, max_norm, norm_type)
        twin.ours.step()
        twin.torchs.step()
        twin.torchs.zero_grad()
        assert twin.ours.last_norm == pytest.approx(float(expected), rel=1e-6)
        twin.assert_equal()


def test_every_table_is_prepared_before_any_is_committed() -> None:
    twin = Twin(max_norm=1.0)
    log: list[tuple[Any, ...]] = []
    for table in twin.tables:
        session_of(table).calls = log
    twin.backward()
    twin.ours.step()
    assert [call[0] for call in log] == ["prepare", "prepare", "commit", "commit"]


def test_tables_of_a_pool_are_prepared_committed_and_dropped_together() -> None:
    twin = Twin(max_norm=1.0)
    POOL.calls.clear()
    twin.backward()
    twin.ours.step()
    assert list(POOL.calls) == [("prepare", 2), ("commit", 2)]
    POOL.calls.clear()
    twin.backward()
    twin.ours.zero_grad()
    twin.ours.zero_grad()
    assert list(POOL.calls) == [("discard", 2)]


def test_what_one_gradient_was_scaled_by_stays_where_another_one_is_prepared_again() -> None:
    twin = Twin()
    first, second = (group["params"][0] for group in twin.ours.param_groups)
    twin.backward()
    first.grad.mul_(0.5)
    second.table.gather(torch.tensor([[1]])).sum().backward()
    assert not second.prepared
    assert second.grad is not None
    assert first.scale == 0.5
    assert first.prepared


def test_torch_clips_tables_and_parameters_together() -> None:
    twin = Twin()
    dense = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    dense[0].grad, dense[1].grad = torch.full((4,), 2.0), torch.full((4,), 2.0)
    twin.backward()
    gradients = [parameter for group in twin.ours.param_groups for parameter in group["params"]]
    ours = torch.nn.utils.clip_grad_norm_([dense[0], *gradients], 0.5)
    expected = torch.nn.utils.clip_grad_norm_([dense[1], *twin.parameters], 0.5)
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(dense[0].grad, dense[1].grad)
    twin.ours.step()
    twin.torchs.step()
    twin.assert_equal()


def test_a_zero_gradient_is_applied_unscaled() -> None:
    table = local_table()
    before = session_of(table).values.clone()
    push(table, [1], torch.zeros(1, 7))
    optimizer = PoolOptimizer(table, max_norm=1.0)
    optimizer.step()
    assert optimizer.last_norm == 0.0
    assert session_of(table).calls == [("prepare", True), ("commit", 0.5, 1.0)]
    assert torch.equal(before, session_of(table).values)


def make_scaler(**options: Any) -> torch.amp.GradScaler:
    """A scaler that has scaled something, without which it refuses to step."""
    scaler = torch.amp.GradScaler("cpu", **options)
    scaler.scale(torch.zeros(()))
    return scaler


def unscale_and_clip(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 2.0)
    scaler.step(optimizer)


ScaledStep = Callable[[torch.amp.GradScaler, PoolOptimizer], object]


@pytest.mark.parametrize("max_norm", [None, 2.0])
@pytest.mark.parametrize(
    ("ours", "clipped"),
    [
        pytest.param(lambda scaler, optimizer: optimizer.step(grad_scaler=scaler), False, id="step(grad_scaler)"),
        pytest.param(lambda scaler, optimizer: scaler.step(optimizer), False, id="scaler.step"),
        pytest.param(unscale_and_clip, True, id="unscale_-and-clip"),
    ],
)
def test_a_run_with_a_grad_scaler_equals_torchs_with_overflows(
    ours: ScaledStep, clipped: bool, max_norm: float | None
) -> None:
    twin = Twin(max_norm=max_norm)
    scalers = [make_scaler(init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for overflow in (False, True, False, False, True, True, False):
        assert scalers[0].get_scale() == scalers[1].get_scale()
        twin.backward(scale=scalers[0].get_scale() * (math.inf if overflow else 1.0))
        scalers[1].unscale_(twin.torchs)
        if clipped or max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(twin.parameters, 2.0)
        else:
            norm = torch.nn.utils.clip_grad_norm_(twin.parameters, math.inf)
        ours(scalers[0], twin.ours)
        scalers[1].step(twin.torchs)
        if not overflow and not clipped:
            assert twin.ours.last_norm == pytest.approx(float(norm), rel=1e-5)
        for scaler in scalers:
            scaler.update()
        twin.torchs.zero_grad()
        twin.ours.zero_grad()
        twin.assert_equal()
    assert scalers[0].get_scale() == scalers[1].get_scale() != 1024.0


def test_a_skipped_step_is_discarded_at_once() -> None:
    twin = Twin()
    scaler = make_scaler()
    twin.backward(scale=math.nan)
    twin.ours.step(grad_scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert twin.ours.last_norm == math.inf
    assert [table.pending for table in twin.tables] == [0, 0]
    assert calls(twin.tables[1]) == ["prepare", "discard"]


def test_with_nothing_pending_a_scaled_step_asks_nobody() -> None:
    twin = Twin()
    twin.ours.step(grad_scaler=torch.amp.GradScaler("cpu"))
    assert calls(twin.tables[0]) == []
    twin.backward()
    twin.ours.step(grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert calls(twin.tables[0]) == ["commit"]


def test_an_inf_under_clipping_is_refused_and_nothing_applied() -> None:
    table = local_table()
    before = session_of(table).values.clone()
    push(table, [1, 2], torch.tensor([[math.inf] * 7, [1.0] * 7]))
    optimizer = PoolOptimizer(table, max_norm=1.0)
    with pytest.raises(InvalidRequest, match="gradient of 'facts' has an inf or NaN"):
        optimizer.step()
    assert torch.equal(before, session_of(table).values)
    optimizer.zero_grad()
    assert table.pending == 0


def test_an_inf_that_was_looked_at_is_refused_and_nothing_applied() -> None:
    """Its norm cannot tell whether the gradient was scaled: to apply it with inf / inf would make every row NaN."""
    finite, infinite = local_table(name="finite"), local_table(name="infinite")
    before = [session_of(table).values.clone() for table in (finite, infinite)]
    push(finite, [1], torch.ones(1, 7))
    push(infinite, [1, 2], torch.tensor([[math.inf] * 7, [1.0] * 7]))
    optimizer = PoolOptimizer([finite, infinite])
    assert float(optimizer.param_groups[1]["params"][0].grad) == math.inf
    with pytest.raises(InvalidRequest, match="has an inf or NaN"):
        optimizer.step()
    assert torch.equal(before[0], session_of(finite).values)
    assert torch.equal(before[1], session_of(infinite).values)


def test_more_updates_after_a_look_at_the_gradient_are_part_of_it() -> None:
    twin = Twin(max_norm=1.0)
    gradient = twin.ours.param_groups[0]["params"][0]
    assert gradient.grad is None
    for _ in range(2):
        twin.backward()
        expected = float(twin.parameters[0].grad.norm())  # type: ignore[union-attr]
        assert float(gradient.grad) == float(gradient.grad) == pytest.approx(expected, rel=1e-6)
    assert calls(twin.tables[0]) == ["prepare", "prepare"]
    torch.nn.utils.clip_grad_norm_(twin.parameters, 1.0)
    twin.ours.step()
    twin.torchs.step()
    twin.assert_equal()


def test_a_step_that_failed_half_way_is_continued_with_the_same_scale() -> None:
    twin = Twin(max_norm=1.0)
    session_of(twin.tables[1]).fail_next_commit = ShardUnavailable("shard 0 is away")
    twin.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters, 1.0)
    with pytest.raises(ShardUnavailable):
        twin.ours.step()
    assert [table.pending for table in twin.tables] == [0, 1]
    twin.ours.step()
    twin.torchs.step()
    twin.assert_equal()


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=6, cycle_momentum=False),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.StepLR(optimizer, step_size=1)],
            milestones=[2],
        ),
    ],
    ids=["LambdaLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR"],
)
def test_lr_schedulers_work_as_on_torchs_optimizers(make: Callable[[torch.optim.Optimizer], Any]) -> None:
    twin = Twin()
    schedulers = [make(twin.ours), make(twin.torchs)]
    for _ in range(5):
        twin.backward()
        twin.ours.step()
        twin.torchs.step()
        twin.torchs.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        assert twin.ours.param_groups[1]["lr"] == twin.torchs.param_groups[0]["lr"]
        twin.assert_equal()


def test_a_tensor_lr_is_taken_at_the_step() -> None:
    table = local_table()
    optimizer = PoolOptimizer(table)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    push(table, [0], torch.ones(1, 7))
    optimizer.step()
    assert session_of(table).calls == [("commit", 0.25, 1.0)]


def test_state_dict_carries_groups_by_the_tables_names() -> None:
    first, second = local_table(name="first"), local_table(name="second")
    optimizer = PoolOptimizer([first, second])
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda _: 0.5, lambda _: 0.25])
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert state["state"] == {}
    restored = PoolOptimizer([second, first])
    restored.load_state_dict(state)
    assert [(group["table"], group["lr"]) for group in restored.param_groups] == [("second", 0.125), ("first", 0.25)]
    assert [group["initial_lr"] for group in restored.param_groups] == [0.5, 0.5]
    assert all(isinstance(group["params"][0], TableGradient) for group in restored.param_groups)
    assert restored.param_groups[0]["params"][0].table is second
    assert scheduler.get_last_lr() == [0.25, 0.125]
    with pytest.raises(
        InvalidRequest, match=r"state is of tables \['first', 'second'\]; this optimizer has \['first'\]"
    ):
        PoolOptimizer(first).load_state_dict(state)


def test_state_dict_of_tables_of_one_name_in_two_pools_goes_by_their_order() -> None:
    def make() -> PoolOptimizer:
        return PoolOptimizer([local_table(name="facts"), local_table(name="other"), local_table(name="facts")])

    saved, loaded = make(), make()
    for lr, group in enumerate(saved.param_groups, start=1):
        group["lr"] = float(lr)
    loaded.load_state_dict(saved.state_dict())
    assert [group["lr"] for group in loaded.param_groups] == [1.0, 2.0, 3.0]


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    table = local_table()
    optimizer = PoolOptimizer(table)

    def closure() -> float:
        optimizer.zero_grad()
        loss = table.gather(torch.tensor([[3]])).sum()
        loss.backward()
        return float(loss.detach())

    before = session_of(table).values[3].clone()
    with torch.no_grad():
        assert optimizer.step(closure) == pytest.approx(float(before.sum()), rel=1e-6)
    torch.testing.assert_close(session_of(table).values[3], before - 0.5)
    with pytest.raises(InvalidRequest, match="closure or a grad_scaler"):
        optimizer.step(closure, grad_scaler=torch.amp.GradScaler("cpu"))


def test_a_frozen_table_is_not_stepped() -> None:
    table = local_table()
    layer = MemoryLayer(12, table=table.requires_grad_(False), heads=1, topk=2, key_dim=4)
    optimizer = PoolOptimizer(layer, max_norm=1.0)
    layer(torch.randn(3, 12)).sum().backward()
    assert layer.keys.grad is not None
    optimizer.step()
    assert session_of(table).calls == []


def test_groups_can_be_added_but_not_twice() -> None:
    first, second = local_table(name="first"), local_table(name="second")
    optimizer = PoolOptimizer(first)
    optimizer.add_param_group({"table": second, "lr": 0.125})
    assert optimizer.param_groups[1]["lr"] == 0.125
    with pytest.raises(InvalidRequest, match="'second' has a parameter group already"):
        optimizer.add_param_group({"table": second})
    with pytest.raises(InvalidRequest, match="'first' has a parameter group already"):
        PoolOptimizer([first, first])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: PoolOptimizer(nn.Linear(2, 2)), "found no MemoryLayer in model Linear"),
        (lambda _: PoolOptimizer([]), "was given no table"),
        (lambda _: PoolOptimizer(nn.Linear(2, 2).parameters()), 'a group of a PoolOptimizer is {"table": table'),
        (lambda table: PoolOptimizer(table, lr=-1.0), "lr = -1.0 of table 'facts' must be finite and at least 0"),
        (lambda table: PoolOptimizer(table, lr=math.nan), "lr = nan"),
        (lambda table: PoolOptimizer(table, max_norm=0.0), "max_norm = 0.0 must be above 0"),
        (lambda table: PoolOptimizer(table, max_norm=math.nan), "max_norm = nan"),
        (lambda table: PoolOptimizer(table, max_norm="1"), "max_norm = '1' must be above 0"),  # type: ignore[arg-type]
        (lambda table: setattr(PoolOptimizer(table), "max_norm", -1.0), "max_norm = -1.0"),
        (lambda table: PoolOptimizer(table, norm_type=0.0), "norm_type = 0.0 must be above 0"),
        (lambda table: PoolOptimizer(table, lr="0.1"), "lr = '0.1' of table 'facts'"),  # type: ignore[arg-type]
        (lambda _: PoolOptimizer(None), "was given None; give it a model"),  # type: ignore[arg-type]
        (lambda _: PoolOptimizer(["facts"]), "got one of type str"),  # type: ignore[list-item]
    ],
)
def test_senseless_arguments_are_refused(make: Callable[[Table], object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(local_table())


def test_copying_and_pickling_are_refused() -> None:
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="its tables are connections"):
            attempt(PoolOptimizer(local_table()))


def test_optim_offers_the_shards_optimizers_and_the_trainers() -> None:
    shards = {"SGD", "Adagrad", "Adam", "AdamW", "RowWiseAdagrad", "RowWiseAdam"}
    assert set(mempool.optim.__all__) == shards | {"JointOptimizer", "PoolOptimizer", "ValueLR"}
    assert mempool.optim.Adagrad(lr=0.1).spec().algorithm == "adagrad"
