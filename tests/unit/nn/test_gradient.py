"""TableGradient: a table's gradient as one number, prepared when somebody looks."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mempool.client import Table
from mempool.errors import InvalidRequest
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


def pushed() -> Table:
    table = local_table()
    table.gather(torch.tensor([[1, 1], [1, 5]])).sum().backward()
    return table


@pytest.mark.parametrize("foreach", [None, False, True])
def test_clipping_by_value_is_refused_and_changes_nothing(foreach: bool | None) -> None:
    gradient = TableGradient(pushed())
    with pytest.raises(InvalidRequest, match=r"'facts' cannot be clipped by value.*Clip it by norm"):
        torch.nn.utils.clip_grad_value_([gradient], 0.5, foreach=foreach)
    assert gradient.scale == 1.0


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("order", [1.0, 3.0, math.inf, "inf"])
def test_norms_of_other_orders_are_asked_of_the_pool(order: float, foreach: bool | None) -> None:
    gradient = TableGradient(pushed())
    dense = nn.Parameter(torch.ones(2))
    dense.grad = torch.ones(2)
    elements = session_of(gradient.table).gradient()
    twins = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros_like(elements))]
    twins[0].grad, twins[1].grad = torch.ones(2), elements.clone()
    for max_norm in (0.5, 0.125):  # the second of what is scaled already
        norm = torch.nn.utils.clip_grad_norm_([dense, gradient], max_norm, norm_type=order, foreach=foreach)
        expected = torch.nn.utils.clip_grad_norm_(twins, max_norm, norm_type=order, foreach=foreach)
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        torch.testing.assert_close(dense.grad, twins[0].grad)
        torch.testing.assert_close(elements * gradient.scale, twins[1].grad)
    assert gradient.grad is not None
    assert float(gradient.grad.norm()) == pytest.approx(float(twins[1].grad.norm()), rel=1e-5)
    assert [call for call in session_of(gradient.table).calls if call[0] != "prepare"] == []


def test_the_norm_of_a_gradient_of_before_is_refused() -> None:
    gradient = TableGradient(pushed())
    before = gradient.grad
    assert before is not None
    gradient.table.gather(torch.tensor([[1]])).sum().backward()
    with pytest.raises(InvalidRequest, match=r"an earlier gradient of table 'facts'.* read the parameter's grad again"):
        before.norm(1.0)
    assert float(gradient.grad.norm(1.0)) > 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("order", [0.0, -1.0, -math.inf])
def test_norms_of_orders_that_only_elements_tell_are_refused(order: float, foreach: bool | None) -> None:
    gradient = TableGradient(pushed())
    dense = nn.Parameter(torch.ones(2))
    dense.grad = torch.ones(2)
    with pytest.raises(InvalidRequest, match=r"norm of order .* of the gradient of table 'facts' is not known"):
        torch.nn.utils.clip_grad_norm_([dense, gradient], 0.5, norm_type=order, foreach=foreach)
    assert gradient.scale == 1.0


@pytest.mark.parametrize("foreach", [None, False, True])
def test_clipping_by_norm_is_torchs_by_every_way_it_has(foreach: bool | None) -> None:
    gradient = TableGradient(pushed())
    norm = torch.nn.utils.clip_grad_norm_([gradient], 0.5, foreach=foreach)
    assert float(norm) == pytest.approx(math.sqrt(7 * (9 + 1)))
    assert gradient.scale == pytest.approx(0.5 / (float(norm) + 1e-6))
    total = torch.nn.utils.get_total_norm([gradient.grad])
    assert float(total) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda grad: grad.add_(1.0),
        lambda grad: grad.clamp_(max=1.0),
        lambda grad: grad.sign_(),
        lambda grad: grad.fill_(1.0),
        lambda grad: grad.__iadd__(1.0),
        lambda grad: grad.__setitem__(0, 1.0),
        lambda grad: torch._foreach_add_([grad], 1.0),
    ],
)
def test_what_would_change_single_elements_is_refused(change: Callable[[torch.Tensor], object]) -> None:
    gradient = TableGradient(pushed())
    assert gradient.grad is not None
    with pytest.raises(InvalidRequest, match="may be scaled"):
        change(gradient.grad)
    assert gradient.scale == 1.0


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        (lambda grad: grad.mul_(0.5), 0.5),
        (lambda grad: grad.div_(4.0), 0.25),
        (lambda grad: grad.__imul__(0.5), 0.5),
        (lambda grad: torch._foreach_mul_([grad], 0.5), 0.5),
        (lambda grad: grad.copy_(grad * 2.0), 2.0),
    ],
)
def test_what_scales_it_scales(change: Callable[[torch.Tensor], object], scale: float) -> None:
    gradient = TableGradient(pushed())
    assert gradient.grad is not None
    change(gradient.grad)
    assert gradient.scale == scale


@pytest.mark.parametrize("zero", [lambda grad: grad.zero_(), lambda grad: torch._foreach_zero_([grad])])
def test_zeroing_it_discards(zero: Callable[[torch.Tensor], object]) -> None:
    table = pushed()
    gradient = TableGradient(table)
    assert gradient.grad is not None
    zero(gradient.grad)
    assert table.pending == 0
    assert gradient.grad is None


def test_a_gradient_cannot_be_set_where_there_is_none() -> None:
    gradient = TableGradient(local_table())
    with pytest.raises(InvalidRequest, match=r"cannot be set here.*PoolOptimizer.state_dict\(\)"):
        gradient.grad = torch.zeros(1)


def test_reading_it_otherwise_gives_plain_numbers() -> None:
    gradient = TableGradient(pushed())
    assert gradient.grad is not None
    doubled = gradient.grad * 2
    assert type(doubled) is torch.Tensor
    assert float(doubled) == 2 * float(gradient.grad)
    assert repr(gradient) == "TableGradient('facts')"
