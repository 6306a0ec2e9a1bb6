"""Gradients that have no derivative here: whoever takes one gets an error, by whatever way, and never zeros."""

from typing import Any

import torch
from torch import Tensor

_NO_SECOND_ORDER = (
    "a gather from a pool has first derivatives only: its values are not in this process, and the gradient of its"
    " gradient would miss them. Detach what the memory gives before a second derivative is taken through it"
)


def first_order_only(gradient: Tensor, *depends_on: Tensor) -> Tensor:
    """``gradient``, as a function of what it depends on that cannot be differentiated.

    torch's ``once_differentiable`` is not enough: its error hangs at no input, and a search for the gradient of one
    input (``torch.autograd.grad``, ``hessian``) passes it by and answers zeros.
    """
    if not torch.is_grad_enabled():
        return gradient
    answer: Tensor = _FirstOrderOnly.apply(gradient, *depends_on)  # type: ignore[no-untyped-call]
    return answer


class _FirstOrderOnly(torch.autograd.Function):
    """The graph leads through here to everything that the gradient depends on."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:  # noqa: ARG004  the graph needs them
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # noqa: ARG004
        raise RuntimeError(_NO_SECOND_ORDER)
