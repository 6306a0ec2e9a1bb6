"""Gives memory back to the system after large messages: else what glibc has freed in its arenas stays the process's.

Where there is no ``malloc_trim`` (macOS, musl) nothing is done.
"""

import asyncio
import ctypes
import threading
from collections.abc import Callable

from mempool.server.admission import Admission

_LOOK_S = 1.0
_MIN_BYTES = 64 * 2**20
"""Trimming takes some milliseconds of one core, so it is for when so much has passed."""


class Trimming:
    """Looks at a server's traffic each second, and trims once it has paused after much. Runs on the IO loop.

    Args:
        admission: Tells what passed.
        trim: What is done, on a thread of its own.
    """

    def __init__(self, admission: Admission, *, trim: Callable[[], None] | None = None) -> None:
        self._admission = admission
        self._trim = trim or trim_heap
        self._trimmed_at = 0
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on."""
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        passed = self._admission.passed_bytes
        paused, self._seen = passed == self._seen, passed
        if paused and passed - self._trimmed_at >= _MIN_BYTES:
            self._trimmed_at = passed
            threading.Thread(target=self._trim, name="mempool-trim", daemon=True).start()
        self.start()


def trim_heap() -> None:
    """Give the free pages of all of glibc's arenas back to the system."""
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    malloc_trim(0)
