"""How modules that zero their gradients reach a table's: a parameter of the module that carries a mark.

A table's gradient is in the pool, so ``module.zero_grad()`` cannot find it. It finds the mark: a gradient of nearly
nothing on a parameter that stands for the values. Who discards what is held is the table's.
"""

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

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
    table: where the optimizer has stepped over it since the mark was set, nothing was zeroed. That shows in the
    parameter's version, but not where a fused kernel stepped: torch's optimizers say when they did.

    Args:
        parameter: A leaf, whose gradients ``mark_like`` makes.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter  # and no weak reference to it: torch swaps no tensor's contents that has one
        self._set = False
        self._parameter_version = self._grad_version = 0
        frozen = not parameter.requires_grad
        parameter.requires_grad_(True)  # torch asks for it; a frozen one may be thawed later
        self._hook = parameter.register_post_accumulate_grad_hook(_telling(self))  # type: ignore[no-untyped-call]
        hooks = parameter._post_accumulate_grad_hooks
        parameter._post_accumulate_grad_hooks = hooks  # to autograd too: after a swap only the object has them
        parameter.requires_grad_(not frozen)
        self._contents = parameter._cdata
        _STEPS.watch(self)

    def pushed(self) -> None:
        """An update goes out, and the mark will be set where the backward pass reaches the parameter, which may be
        after other updates: until then its absence means nothing."""
        self._set = False
        self._parameter_version = self._parameter._version

    @property
    def parameter(self) -> Tensor:
        return self._parameter

    def zeroed(self) -> bool:
        if not self._set or self._parameter._version != self._parameter_version:
            return False
        grad = self._parameter.grad
        if grad is None:
            return True
        if type(grad) is not Tensor:  # of a sharded one this process may have no element
            return False
        # Only a gradient that was written to is read: on a GPU that waits.
        written = grad._version != self._grad_version and grad.dtype != torch.float16
        return written and float(grad.detach().sum()) == 0.0

    def reset(self) -> None:
        self._set = False

    @property
    def lost(self) -> bool:
        """Whether ``torch.utils.swap_tensors`` has given the parameter other contents, which have no hooks."""
        return self._parameter._cdata != self._contents

    def end(self) -> None:
        """The parameter means nothing for the values any more."""
        self._hook.remove()
        self.reset()

    def accumulated(self, parameter: Tensor) -> None:
        """Autograd has reached the parameter."""
        self._set = parameter.grad is not None
        self._grad_version = 0 if parameter.grad is None else parameter.grad._version


class _Steps:
    """Tells marks when an optimizer of torch's has stepped over their parameter."""

    def __init__(self) -> None:
        self._marks: weakref.WeakSet[Mark] = weakref.WeakSet()
        self._hooked = False

    def watch(self, mark: Mark) -> None:
        self._marks.add(mark)
        if not self._hooked:
            self._hooked = True
            register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        marks = tuple(self._marks)
        if marks:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for mark in marks:
                if id(mark.parameter) in stepped:
                    mark.reset()


_STEPS = _Steps()


def _telling(mark: Mark) -> Callable[[Tensor], None]:
    """A hook that does not keep the mark, which keeps the parameter: torch's hooks are hidden from the collector."""
    weak = weakref.ref(mark)

    def accumulated(parameter: Tensor) -> None:
        found = weak()
        if found is not None:
            found.accumulated(parameter)

    return accumulated


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
