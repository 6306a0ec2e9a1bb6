"""TableGradient: a table's gradient as one number, prepared when somebody looks."""

import math

import pytest
import torch

from mempool.nn import TableGradient

from .stand_in import local_table, session_of


def test_is_a_leaf_parameter_without_a_gradient_while_nothing_is_pending() -> None:
    gradient = TableGradient(local_table())
    assert isinstance(gradient, torch.nn.Parameter)
    assert gradient.is_leaf
    assert gradient.grad is None
    assert not gradient.prepared
    assert gradient.scale == 1.0
    assert session_of(gradient.table).calls == []


def test_its_gradient_is_the_norm_of_what_is_pending() -> None:
    table = local_table()
    gradient = TableGradient(table)
    table.gather(torch.tensor([[1, 1], [1, 5]])).sum().backward()
    # Slot 1 three times, slot 5 once, seven columns of ones.
    expected = math.sqrt(7 * (9 + 1))
    assert gradient.grad is not None
    assert gradient.grad.item() == pytest.approx(expected)
    assert gradient.prepared
    table.gather(torch.tensor([[5]])).sum().backward()
    assert not gradient.prepared
    assert gradient.scale == 1.0
    assert gradient.grad.item() == pytest.approx(math.sqrt(7 * (9 + 4)))


def test_whatever_scales_the_number_scales_the_gradient() -> None:
    table = local_table()
    gradient = TableGradient(table)
    table.gather(torch.tensor([[1]])).sum().backward()
    assert gradient.grad is not None
    gradient.grad.mul_(0.25)
    assert gradient.scale == 0.25
    gradient.grad = gradient.grad * 2
    assert gradient.scale == 0.5
    assert session_of(table).calls == [("prepare", True)]


def test_none_discards() -> None:
    table = local_table()
    gradient = TableGradient(table)
    table.gather(torch.tensor([[1]])).sum().backward()
    gradient.grad = None
    assert table.pending == 0
    assert gradient.grad is None
    assert session_of(table).calls == [("discard",)]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_inf_or_nan_anywhere_is_an_infinite_norm(bad: float) -> None:
    table = local_table()
    gradient = TableGradient(table)
    grads = torch.zeros(2, 7)
    grads[1, 3] = bad
    table.gather(torch.tensor([[1], [2]])).backward(grads)
    assert gradient.grad is not None
    assert gradient.grad.item() == math.inf
