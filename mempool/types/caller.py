"""Who asks, and until when the answer is of use: a call's context, from the door to the engine's queue.

The gRPC door, and whoever else lets calls in, sets it with ``calling``; the engine reads it when a job is queued, and a
client's transport when it sends. Nothing else needs it, so it is no argument of the protocols' methods.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: Of the connection, "ipv4:10.0.0.3:5123"; "" for this process itself.
        deadline_s: When nobody waits for the answer any more, on the process's monotonic clock; None: never.
        at_end: Told what to do when the caller has taken the answer, or is gone; until then the answer is in this
            process. None: answers are the caller's own as soon as they are made.
    """

    name: str = ""
    deadline_s: float | None = None
    at_end: Callable[[Callable[[], None]], None] | None = field(default=None, repr=False, compare=False)

    def remaining_s(self, clock: Callable[[], float] = time.monotonic) -> float | None:
        """Seconds until the deadline, 0 or less when it is over; None without one."""
        return None if self.deadline_s is None else self.deadline_s - clock()


_NOBODY = Caller()
_CALLER: ContextVar[Caller] = ContextVar("mempool_caller", default=_NOBODY)


def current_caller() -> Caller:
    """The caller of the call that is being served here."""
    return _CALLER.get()


class calling:  # used as the function it could be; every call passes it, and a generator takes longer
    """Everything in the ``with`` block is asked by ``caller``."""

    __slots__ = ("_caller", "_token")

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def __enter__(self) -> None:
        self._token = _CALLER.set(self._caller)

    def __exit__(self, *_: object) -> None:
        _CALLER.reset(self._token)
