"""How modules that zero their gradients reach a table's: a parameter of the module that carries a mark.

A table's gradient is in the pool, so ``module.zero_grad()`` cannot find it. It finds the mark: a gradient of nearly
nothing on a parameter that stands for the values. Who discards what is held is the table's.
"""

import weakref
from typing import Protocol

import torch
from torch import Tensor

# Nothing beside any gradient or norm, and still no zero after a loss scale was divided out and a norm was clipped.
_MARK = 1e-20


def mark_like(parameter: Tensor) -> Tensor:
    """The gradient that says that the values have one. Zeros in float16, which has no number small enough."""
    return torch.full_like(parameter, 0.0 if parameter.dtype == torch.float16 else _MARK)


class Zeroable(Protocol):
    """One who may have zeroed a table's gradient."""

    def zeroed(self) -> bool: ...

    def reset(self) -> None: ...


class Mark:
    """The mark on one parameter: set by a backward pass, gone when somebody zeroes the parameter's gradient.

    A parameter in an ordinary optimizer loses its mark by that optimizer's ``zero_grad``, which does not speak for the
    table: where the optimizer has stepped over it since the mark was set, nothing was zeroed.

    Args:
        parameter: A leaf, whose gradients ``mark_like`` makes.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = weakref.ref(parameter)
        self._set = False
        self._parameter_version = self._grad_version = 0
        frozen = not parameter.requires_grad
        parameter.requires_grad_(True)  # torch asks for it; a frozen one may be thawed later
        parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
        parameter.requires_grad_(not frozen)

    def pushed(self) -> None:
        """An update goes out, and the mark will be set where the backward pass reaches the parameter, which may be
        after other updates: until then its absence means nothing."""
        parameter = self._parameter()
        self._set = False
        self._parameter_version = 0 if parameter is None else parameter._version

    def zeroed(self) -> bool:
        parameter = self._parameter()
        if parameter is None or not self._set or parameter._version != self._parameter_version:
            return False
        grad = parameter.grad
        if grad is None:
            return True
        if type(grad) is not Tensor:  # of a sharded one this process may have no element
            return False
        # Only a gradient that was written to is read: on a GPU that waits.
        written = grad._version != self._grad_version and grad.dtype != torch.float16
        return written and float(grad.detach().sum()) == 0.0

    def reset(self) -> None:
        self._set = False

    def _accumulated(self, parameter: Tensor) -> None:
        self._set = parameter.grad is not None
        self._grad_version = 0 if parameter.grad is None else parameter.grad._version


class Markers:
    """The marks of all modules that hold a table."""

    def __init__(self) -> None:
        self._marks: weakref.WeakSet[Zeroable] = weakref.WeakSet()

    def add(self, mark: Zeroable) -> None:
        self._marks.add(mark)

    def zeroed(self) -> bool:
        """Whether one of them was zeroed since it was set."""
        return any(mark.zeroed() for mark in tuple(self._marks))

    def reset(self) -> None:
        for mark in tuple(self._marks):
            mark.reset()
