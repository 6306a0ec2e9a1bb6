"""Ctrl-C for tests: what was started in the background of a shell ignores it, and pytest with it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT is KeyboardInterrupt meanwhile, whatever the process was started with."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, kept)
