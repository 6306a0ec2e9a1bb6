"""Processes of a benchmark that stand still while another is measured: they take no core, and poll for nothing.

Only on Linux, which continues a process whose parent is gone, see ``go_on_alone``: elsewhere nothing is stopped, as
what is stopped and then left alone would stay for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1


def hold(pids: Sequence[int]) -> None:
    """Stop processes where they are. Repeatable; one that has ended is passed over."""
    if _LINUX:
        _signal(pids, signal.SIGSTOP)


def go_on(pids: Sequence[int]) -> None:
    """Continue processes. Repeatable, also for those that were not stopped."""
    if _LINUX:
        _signal(pids, signal.SIGCONT)


def go_on_alone() -> None:
    """[CHILD] be continued when the process that started this one ends, however it does: then there is input to end."""
    if _LINUX:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
