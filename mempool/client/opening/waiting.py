"""How a thread of the caller's waits for a coroutine of the client's, which runs on the process's IO loop."""

from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Run(Protocol):
    """Runs a coroutine on the event loop, from any other thread, and waits for it."""

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> T: ...


class Pending(Protocol[T_co]):
    """What was begun. For any thread."""

    def done(self) -> bool:
        """Whether ``result`` would not wait."""

    def result(self) -> T_co:
        """Waits for what it answers, and raises what it raises; as often as it is asked."""


class Begin(Protocol):
    """Runs a coroutine, which ends by itself, on the event loop; from any thread."""

    def __call__(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]: ...
