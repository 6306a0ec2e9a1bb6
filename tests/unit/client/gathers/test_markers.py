"""Marks: when a parameter's lost gradient means that somebody zeroed it, and when it does not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mempool.client.gathers.markers import Mark, Markers, mark_like


def make() -> tuple[Tensor, Mark]:
    parameter = torch.zeros(1, requires_grad=True)
    return parameter, Mark(parameter)


def backward(parameter: Tensor, mark: Mark) -> None:
    """An update goes out, and then autograd reaches the parameter."""
    mark.pushed()
    parameter.backward(mark_like(parameter))


def test_a_mark_that_was_never_set_was_not_zeroed() -> None:
    parameter, mark = make()
    assert not mark.zeroed()
    mark.pushed()
    assert parameter.grad is None
    assert not mark.zeroed()


def test_a_gradient_taken_away_or_filled_with_zeros_was_zeroed() -> None:
    for zero in (lambda p: setattr(p, "grad", None), lambda p: p.grad.zero_()):
        parameter, mark = make()
        backward(parameter, mark)
        assert not mark.zeroed()
        zero(parameter)
        assert mark.zeroed()
        mark.reset()
        assert not mark.zeroed()


def test_a_gradient_that_was_scaled_or_added_to_was_not() -> None:
    parameter, mark = make()
    backward(parameter, mark)
    backward(parameter, mark)
    assert parameter.grad is not None
    parameter.grad.mul_(1e-9)
    assert not mark.zeroed()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_stepped_over_it_zeroes_its_own(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    parameter, mark = make()
    optimizer = kind([parameter], lr=0.1, **options)  # type: ignore[call-arg]
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
    backward(parameter, mark)
    optimizer.step()
    optimizer.zero_grad()
    assert not mark.zeroed()
    backward(parameter, mark)
    optimizer.zero_grad()
    assert mark.zeroed()


def test_between_a_push_and_its_mark_nothing_is_known() -> None:
    parameter, mark = make()
    backward(parameter, mark)
    parameter.grad = None
    mark.pushed()
    assert not mark.zeroed()


def test_in_float16_only_a_gradient_taken_away_is_seen() -> None:
    parameter = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    mark = Mark(parameter)
    backward(parameter, mark)
    assert parameter.grad is not None
    parameter.grad.mul_(1.0)
    assert not mark.zeroed()
    parameter.grad = None
    assert mark.zeroed()


def test_marks_end_with_their_parameters() -> None:
    markers = Markers()
    parameter, mark = make()
    markers.add(mark)
    backward(parameter, mark)
    parameter.grad = None
    assert markers.zeroed()
    markers.reset()
    assert not markers.zeroed()
    del parameter, mark
    assert not markers._marks


def test_a_mark_knows_when_its_parameter_got_another_tensors_contents() -> None:
    parameter, mark = make()
    assert not mark.lost
    parameter.data = torch.ones(1)
    assert not mark.lost
    torch.utils.swap_tensors(parameter, torch.zeros(1, dtype=torch.float64, requires_grad=True))
    assert mark.lost
    mark.end()
    again = Mark(parameter)
    backward(parameter, again)
    parameter.grad = None
    assert again.zeroed()
    assert not mark.zeroed()
