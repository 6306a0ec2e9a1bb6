"""Threads of kernels keep off the processor of the thread that has called them.

Whoever wakes a sleeping thread may have it put on his own processor, though another one is idle: Linux does, in virtual
machines, where the other has rested for a fraction of a millisecond, as its host then has taken it back. Both then take
turns for several milliseconds, and a kernel on two threads takes as long as on one. So each thread of a team is told on
which processor it is not to run. What the system otherwise does with threads it does.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numba as typed_numba

numba: Any = typed_numba

_ROLL_CALL_S = 1.0
_BOUND_BY_USER = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_WORK = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)
_RUN = ctypes.CFUNCTYPE(
    None,
    _WORK,
    ctypes.c_void_p,
    *[ctypes.POINTER(ctypes.c_size_t)] * 2,
    ctypes.c_void_p,
    *[ctypes.c_size_t] * 2,
    ctypes.c_int,
)


class _Team(threading.local):
    """The threads that work for this one, as OpenMP keeps them for each thread that runs kernels."""

    def __init__(self) -> None:
        self.others: tuple[int, ...] = ()  # by the system's numbers
        self.cpu = -1  # which they keep off
        # The main thread may be interrupted anywhere, a roll call too.
        self.is_moved = threading.current_thread() is not threading.main_thread()

    def move(self, num_threads: int) -> None:
        """Raises OSError where they cannot be moved, or one of them has ended."""
        processor = _processor()
        if len(self.others) < num_threads - 1:
            self.others = _called_up(num_threads)
        self.cpu = processor()
        allowed = os.sched_getaffinity(0)
        elsewhere = allowed - {self.cpu}
        for thread in self.others:
            os.sched_setaffinity(thread, elsewhere if len(elsewhere) >= len(self.others) else allowed)


_TEAM = _Team()


def keep_apart(num_threads: int) -> None:
    """The calling thread is about to run a kernel on so many threads, itself one of them."""
    team = _TEAM
    if not team.is_moved or (len(team.others) >= num_threads - 1 and _processor()() == team.cpu):
        return
    try:
        team.move(num_threads)
    except ProcessLookupError:  # the team has new threads, as it was smaller in between
        team.others = ()
    except OSError:
        team.is_moved = False


@cache
def _processor() -> Callable[[], int]:
    """Tells on which one the calling thread is.

    Raises:
        OSError: Threads cannot be kept off one here, or the user has said where they are to run.
    """
    bound = [name for name in _BOUND_BY_USER if name in os.environ]
    if bound or not sys.platform.startswith("linux") or numba.threading_layer() != "omp":
        raise OSError(f"threads are not moved: {bound or sys.platform}")
    try:
        found: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
    except AttributeError as error:
        raise OSError("the system's library does not tell processors") from error
    return found


def _called_up(num_threads: int) -> tuple[int, ...]:
    """The other threads of the calling one's team, each of which answers once.

    Raises:
        OSError: One does not come.
    """
    parallel_for: int = importlib.import_module("numba.np.ufunc.omppool").parallel_for
    found: list[int] = []
    all_here = threading.Barrier(num_threads)

    def answer(*_: object) -> None:
        found.append(threading.get_native_id())
        with suppress(threading.BrokenBarrierError):
            all_here.wait(_ROLL_CALL_S)

    counts = (ctypes.c_size_t * 1)(num_threads)
    _RUN(parallel_for)(_WORK(answer), None, counts, counts, None, 0, 0, num_threads)
    others = set(found) - {threading.get_native_id()}
    if len(others) != num_threads - 1:
        raise OSError(f"of {num_threads} threads {len(others) + 1} came")
    return tuple(sorted(others))
