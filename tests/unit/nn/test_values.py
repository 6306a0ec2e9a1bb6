"""A layer's ``values``: freezing and zeroing do to a table in the pool what they do to a parameter of torch's."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mempool.client import Table
from mempool.nn import MemoryLayer, PoolOptimizer
from mempool.nn.values import LayerLink

from .stand_in import local_table, session_of


def make_layer(table: Table | None = None) -> MemoryLayer:
    torch.manual_seed(5)
    return MemoryLayer(12, table=local_table() if table is None else table, heads=1, topk=3, key_dim=6)


def backward(module: nn.Module) -> None:
    module(torch.randn(4, 12, requires_grad=True)).square().sum().backward()


def freeze_parameters(layer: MemoryLayer) -> None:
    for parameter in layer.parameters():
        parameter.requires_grad = False


@pytest.mark.parametrize(
    "freeze",
    [
        lambda layer: layer.requires_grad_(False),
        lambda layer: nn.Sequential(nn.Linear(2, 2), layer).requires_grad_(False),
        freeze_parameters,
        lambda layer: layer.table.requires_grad_(False),
    ],
    ids=["layer", "model", "each parameter", "table"],
)
def test_a_frozen_layer_pushes_nothing_and_passes_gradients_on(freeze: Callable[[MemoryLayer], object]) -> None:
    layer = make_layer()
    freeze(layer)
    x = torch.randn(4, 12, requires_grad=True)
    layer(x).sum().backward()
    assert layer.table.pending == 0
    assert x.grad is not None
    assert x.grad.any()
    layer.requires_grad_(True)
    layer.table.requires_grad_(True)
    backward(layer)
    assert layer.table.pending == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("of_table", [False, True])
def test_what_was_frozen_after_the_forward_pass_gets_nothing_as_in_torch(compiled: bool, of_table: bool) -> None:
    layer = make_layer()
    table, ids = layer.table, torch.tensor([[1, 2]])
    call = (lambda: table.gather(ids)) if of_table else (lambda: layer(torch.randn(4, 12)))
    y = torch.compile(call, backend="eager")() if compiled else call()
    (table if of_table else layer).requires_grad_(False)
    y.sum().backward()
    assert table.pending == 0


def test_the_values_alone_can_be_trained() -> None:
    layer = make_layer()
    layer.requires_grad_(False)
    layer.values.requires_grad_()
    layer(torch.randn(4, 12)).sum().backward()
    assert layer.table.pending == 1
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is not None] == ["values"]


def test_a_frozen_copy_is_a_teacher_and_the_student_learns() -> None:
    student = make_layer()
    teacher = copy.deepcopy(student).requires_grad_(False)
    built = make_layer(student.table).requires_grad_(False)
    for frozen in (teacher, built):
        backward(frozen)
    assert student.table.pending == 0
    backward(student)
    assert student.table.pending == 1
    teacher.zero_grad()
    built.zero_grad()
    assert student.table.pending == 1


def test_a_copy_of_a_frozen_layer_is_frozen_and_can_be_thawed() -> None:
    clone = copy.deepcopy(make_layer().requires_grad_(False))
    assert not clone.values.requires_grad
    clone(torch.randn(4, 12))
    clone.requires_grad_(True)
    backward(clone)
    assert clone.table.pending == 1
    clone.zero_grad()
    assert clone.table.pending == 0


def test_freezing_the_optimizers_parameters_freezes_the_table() -> None:
    table = local_table()
    layer = make_layer(table)
    optimizer = PoolOptimizer(layer)
    parameters = optimizer.param_groups[0]["params"]
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:  # as Lightning's toggle_optimizer does
        parameter.requires_grad = False
    assert not table.requires_grad
    backward(layer)
    (table.gather(torch.tensor([[1]])).sum() + torch.zeros(1, requires_grad=True)).backward()
    assert table.pending == 0
    for parameter, requires_grad in zip(parameters, before, strict=True):
        parameter.requires_grad = requires_grad
    backward(layer)
    assert table.pending == 1
    for parameter in parameters:
        assert parameter.requires_grad_(False) is parameter
    assert not table.requires_grad


def test_toggling_a_dense_optimizer_off_leaves_the_memorys_on_as_lightning_does_it() -> None:
    layer = make_layer()
    dense, memory = torch.optim.AdamW(layer.parameters()), PoolOptimizer(layer)
    for group in dense.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad = False
    for parameter in memory.param_groups[0]["params"]:
        parameter.requires_grad = True
    backward(layer)
    assert layer.table.pending == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_a_module_around_it_drops_what_is_pending(set_to_none: bool) -> None:
    layer = make_layer()
    model = nn.Sequential(nn.Linear(12, 12), layer)
    backward(model)
    model[0].zero_grad(set_to_none)
    assert layer.table.pending == 1
    model.zero_grad(set_to_none)
    assert layer.table.pending == 0
    backward(model)
    assert layer.table.pending == 1
    PoolOptimizer(model).step()
    assert [call[0] for call in session_of(layer.table).calls] == ["discard", "commit"]


def test_a_batch_that_was_given_up_is_no_part_of_the_step_as_in_torch() -> None:
    """The loop of many trainers: an odd loss, ``model.zero_grad()``, the next batch."""
    layer = make_layer()
    optimizer = PoolOptimizer(layer)
    expected = session_of(layer.table).values.clone()
    (layer(torch.randn(4, 12)) * float("nan")).sum().backward()
    layer.zero_grad()
    x = torch.randn(4, 12)
    layer(x).sum().backward()
    expected -= 0.5 * session_of(layer.table).gradient()
    optimizer.step()
    assert torch.equal(session_of(layer.table).values, expected)


def test_gradients_accumulate_over_layers_calls_and_backward_passes() -> None:
    table = local_table()
    first, second = make_layer(table), make_layer(table)
    model = nn.Sequential(first, second, first)
    for count in (3, 6, 9):
        backward(model)
        assert table.pending == count
    model.zero_grad()
    assert table.pending == 0
    backward(model)
    assert table.pending == 3


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.SGD,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        partial(torch.optim.AdamW, fused=True),
        partial(torch.optim.SGD, fused=True),
    ],
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizer_of_all_parameters_neither_steps_nor_drops_the_values(
    make: Callable[..., torch.optim.Optimizer], set_to_none: bool
) -> None:
    layer = make_layer()
    dense, memory = make(layer.parameters(), lr=0.1), PoolOptimizer(layer)
    for _ in range(3):
        for _ in range(2):
            backward(layer)
        dense.step()
        dense.zero_grad(set_to_none)
        assert layer.table.pending == 2
        backward(layer)
        memory.step()
        dense.zero_grad(set_to_none)
    assert layer.table.counters.steps_committed == 3
    assert [call[0] for call in session_of(layer.table).calls] == ["commit"] * 3
    # It drops them where it did not step over them: the gradient of a batch that is given up.
    backward(layer)
    dense.zero_grad(set_to_none)
    assert layer.table.pending == 0


def test_values_count_for_nothing_in_a_norm_and_keep_the_fast_paths() -> None:
    layer = make_layer()
    backward(layer)
    dense = [parameter for name, parameter in layer.named_parameters() if name != "values"]
    with_values = torch.nn.utils.get_total_norm([parameter.grad for parameter in layer.parameters()])
    assert torch.equal(with_values, torch.nn.utils.get_total_norm([parameter.grad for parameter in dense]))
    assert all(type(parameter) is nn.Parameter for parameter in layer.parameters())  # as torch's foreach asks


def test_a_backward_pass_that_ends_early_is_not_taken_for_a_zeroed_one() -> None:
    """The mark comes after the push: two uses of a layer push twice before it."""
    layer = make_layer()
    model = nn.Sequential(layer, layer)
    backward(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for parameter in model.parameters():
        parameter.grad = None
    backward(model)
    assert layer.table.pending == 4


def test_gradients_of_all_parameters_are_handed_out_and_push_nothing() -> None:
    layer = make_layer()
    grads = torch.autograd.grad(layer(torch.randn(4, 12)).sum(), list(layer.parameters()))
    assert all(grad.shape == parameter.shape for grad, parameter in zip(grads, layer.parameters(), strict=True))
    assert layer.table.pending == 0


def with_another_parameter(layer: MemoryLayer) -> MemoryLayer:
    layer.values = nn.Parameter(torch.zeros(1))
    return layer


def swapped(layer: MemoryLayer) -> MemoryLayer:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "move",
    [
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.to_empty(device="cpu"),
        copy.deepcopy,
        with_another_parameter,
        swapped,
    ],
)
def test_zeroing_works_wherever_the_layer_went(move: Callable[[MemoryLayer], MemoryLayer]) -> None:
    layer = move(make_layer())
    layer.reset_parameters()
    layer(torch.randn(4, 12, dtype=layer.half_keys.dtype)).sum().backward()
    assert layer.table.pending == 1
    layer.to(layer.half_keys.dtype)
    layer.zero_grad()
    assert layer.table.pending == 0


def test_a_parameter_that_something_else_manages_has_no_mark() -> None:
    class Managed(nn.Parameter):
        pass

    table = local_table()
    link = LayerLink(table, Managed(torch.zeros(1)))
    assert link._mark is None


def test_a_loop_that_zeroes_before_it_steps_is_told_once() -> None:
    layer = make_layer()
    optimizer = PoolOptimizer(layer)
    backward(layer)
    layer.zero_grad()
    with pytest.warns(UserWarning, match="nothing to apply to table 'facts': 1 updates of it were dropped"):
        optimizer.step()
    for _ in range(2):
        backward(layer)
        layer.zero_grad()
        optimizer.step()


def test_the_mark_survives_scales_and_clips() -> None:
    layer = make_layer()
    backward(layer)
    for parameter in layer.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(1.0 / 65536.0).mul_(1e-6)
    assert layer.table.pending == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_of_the_layers_dtype(dtype: torch.dtype) -> None:
    layer = make_layer().to(dtype)
    y: Tensor = layer(torch.randn(2, 12, dtype=dtype))
    y.sum().backward()
    assert layer.values.dtype == dtype
    assert layer.values.grad is not None
    assert 0.0 < float(layer.values.grad) < 1e-18
