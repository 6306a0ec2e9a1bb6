"""Processes that need no time to load what a pool needs: forks of one that has run every kernel they use.

Threads do not live on in a fork, so what knows of them is told that there are none yet. Kernels run on one thread here,
on Numba's layer that can be forked.
"""

import os
import sys
import traceback
from collections.abc import Callable

import torch

from mempool.kernels.cpu import runtime
from mempool.wire.channels import loop


def prepare() -> None:
    """Before the first kernel of this process, which is to be forked."""
    torch.set_num_threads(1)
    runtime.numba.config.NUMBA_NUM_THREADS = 1
    runtime._SAFE_LAYERS = {"workqueue": "numba.np.ufunc.workqueue"}


def forked(work: Callable[[], None]) -> int:
    """The pid of a process that does this and ends; with 1 where it raises, which is printed."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        loop._current = None
        runtime._launch_threads.cache_clear()
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
