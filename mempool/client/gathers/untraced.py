"""Keeps torch.compile out of calls that wait for other threads, without loading the compiler where nobody uses it."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """A graph break: compiled code runs ``function`` as it is.

    ``torch.compiler.disable`` as a plain decorator would load the compiler, and Triton with it, into every trainer.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            plain: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return plain(*args, **kwargs)
        return function(*args, **kwargs)

    return call
