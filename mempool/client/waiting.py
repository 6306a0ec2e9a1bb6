"""How a thread of the caller's waits for a coroutine of the client's, which runs on the process's IO loop."""

from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Run(Protocol):
    """Runs a coroutine on the event loop, from any other thread, and waits for it."""

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> T: ...
