"""PoolOptimizer in loops that others wrote: scalers, schedulers, checkpoints, wrong groups."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from mempool.client import Table
from mempool.errors import InvalidRequest, ShardUnavailable
from mempool.nn import MemoryLayer, PoolOptimizer

from .stand_in import local_table, session_of


def push(table: Table, ids: list[int], grads: Tensor) -> None:
    """One backward pass: row ids[i] gets the gradient grads[i]."""
    table.gather(torch.tensor(ids)[:, None]).backward(grads)


def calls(table: Table) -> list[str]:
    return [call[0] for call in session_of(table).calls]


def make_scaler() -> torch.amp.GradScaler:
    """A scaler that has scaled something, without which it refuses to step."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    return scaler


def test_a_step_that_a_scaler_skipped_is_gone_whoever_zeroes_what() -> None:
    """Many loops zero the model's gradients alone. An inf that stayed would skip every later step."""
    table, head = local_table(value_dim=4), nn.Linear(4, 1)
    dense, memory = torch.optim.SGD(head.parameters(), lr=0.1), PoolOptimizer(table)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(5):
        loss = head(table.gather(torch.tensor([[1]]))).sum() * (math.inf if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(dense)
        scaler.step(memory)
        scaler.update()
        head.zero_grad()
    assert scaler.get_scale() == 2.0
    assert table.pending == 0
    assert calls(table).count("commit") == 4


def test_a_scaler_may_step_where_no_lookup_was() -> None:
    optimizer = PoolOptimizer(local_table())
    scaler = make_scaler()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)


def test_unscaling_twice_is_torchs_error() -> None:
    table = local_table()
    optimizer, scaler = PoolOptimizer(table), make_scaler()
    push(table, [1], torch.ones(1, 7))
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -1.0, [0.1, 0.2], None, "0.1", torch.tensor([0.1, 0.2]), True])
def test_every_group_is_checked_before_any_is_committed(lr: object) -> None:
    tables = [local_table(name="first"), local_table(name="second")]
    optimizer = PoolOptimizer(tables)
    for table in tables:
        push(table, [1], torch.ones(1, 7))
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(InvalidRequest, match="of table 'second' must be finite and at least 0; nothing was applied"):
        optimizer.step()
    assert [table.pending for table in tables] == [1, 1]
    assert calls(tables[0]) == []


def test_a_state_of_another_version_is_told_of() -> None:
    table = local_table()
    optimizer = PoolOptimizer(table)
    push(table, [1], torch.ones(1, 7))
    optimizer.step()
    state = optimizer.state_dict()
    assert state["param_groups"][0]["table_version"] == 1
    optimizer.load_state_dict(state)
    assert "table_version" not in optimizer.param_groups[0]
    push(table, [1], torch.ones(1, 7))
    optimizer.step()
    optimizer.load_state_dict(state)  # of which nothing is said yet: the table may be restored after it
    with pytest.warns(UserWarning, match="'facts' is at version 2, and the state of a PoolOptimizer .* version 1: "):
        table.gather(torch.tensor([[1]]))
    table.gather(torch.tensor([[1]]))  # it is said once
    del state["param_groups"][0]["table_version"]  # as older states have none
    optimizer.load_state_dict(state)


def test_a_state_is_had_while_the_pool_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise ShardUnavailable("shard 0 is away")

    table = local_table()
    optimizer = PoolOptimizer(table)
    monkeypatch.setattr(table.link, "send_gather", away)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["table_version"] is None
    optimizer.load_state_dict(state)


def test_a_state_loads_whatever_layers_hold_the_table() -> None:
    table = local_table()
    layers = [MemoryLayer(12, table=table, heads=1, topk=1, key_dim=2) for _ in range(2)]
    state = PoolOptimizer(nn.Sequential(*layers), lr=0.25).state_dict()
    for other in (PoolOptimizer(table), PoolOptimizer(layers[0])):
        other.load_state_dict(state)
        assert other.param_groups[0]["lr"] == 0.25
    state = PoolOptimizer(table, lr=0.125).state_dict()
    optimizer = PoolOptimizer(nn.Sequential(*layers))
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_options_of_other_optimizers_and_cycled_momentum_are_refused_in_words() -> None:
    table = local_table()
    with pytest.raises(TypeError, match="unexpected keyword argument 'fused'"):
        PoolOptimizer(table, fused=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="optimizer must support momentum or beta1"):
        lr_scheduler.OneCycleLR(PoolOptimizer(table), max_lr=1.0, total_steps=3)


def test_a_plateau_scheduler_lowers_the_lr() -> None:
    optimizer = PoolOptimizer(local_table(), lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 2.0, 3.0):
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
