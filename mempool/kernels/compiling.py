"""What happens where a kernel has no code for its arguments yet: it is compiled, or the call is refused.

Knows no compiler: whoever makes kernels gives it theirs.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_LOG = logging.getLogger("mempool")

# Compiling that takes longer says so.
_QUIET_S = 2.0

_refused: ContextVar[bool] = ContextVar("refused", default=False)
_said = threading.Event()


class NotCompiledError(Exception):
    """The kernel has no code for these arguments, neither in this process nor on disk."""


@contextmanager
def only_compiled() -> Iterator[None]:
    """Within it, this thread's calls run kernels that have code; others raise NotCompiledError."""
    token = _refused.set(True)
    try:
        yield
    finally:
        _refused.reset(token)


def watched(compile_kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The compiler of one kernel, which ``only_compiled`` holds off, and which says so once where it takes long."""

    @functools.wraps(compile_kernel)
    def compiled(*args: Any, **options: Any) -> Any:
        if _refused.get():
            raise NotCompiledError(name)
        saying = threading.Timer(_QUIET_S, _say, (name,))
        saying.daemon = True
        saying.start()
        try:
            return compile_kernel(*args, **options)
        finally:
            saying.cancel()

    return compiled


def _say(name: str) -> None:
    if not _said.is_set():
        _said.set()
        _LOG.warning(
            "compiling CPU kernels, now %s: a call waits for it. It is done once per machine; see NUMBA_CACHE_DIR for "
            "where they are kept",
            name.strip("_"),
        )
