"""How CPU kernels are compiled and started: a threading layer that bears several Python threads, the disk cache,
as many threads as torch uses, tensors as numpy views. Kernels themselves live beside it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import numba as typed_numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
# Numba's type stubs leave out most of what is used here.
numba: Any = typed_numba

_F = TypeVar("_F", bound=Callable[..., Any])

# Numba's own "workqueue" layer aborts the process when two Python threads run kernels at once, so it is never taken.
_SAFE_LAYERS = {"omp": "numba.np.ufunc.omppool", "tbb": "numba.np.ufunc.tbbpool"}


_ELEMENTS_PER_THREAD = 1 << 17


class NoSafeThreadingLayerError(ImportError):
    """Numba has no threading layer that may be used from several Python threads."""


def choose_threading_layer() -> str:
    """Select a threading layer which several Python threads may use at once, before the first kernel runs.

    Returns:
        "omp" or "tbb".

    Raises:
        NoSafeThreadingLayerError: Neither is installed, or another part of the process already started an unsafe one.
    """
    try:
        running = numba.threading_layer()
    except ValueError:  # Numba's way to say that none has been started yet
        running = None
    if running is not None:
        if running not in _SAFE_LAYERS:
            raise NoSafeThreadingLayerError(
                f"Numba already runs its {running!r} threading layer, which aborts when several threads use it; "
                "set NUMBA_THREADING_LAYER=omp before the process starts"
            )
        return str(running)
    for name, module in _SAFE_LAYERS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        numba.config.THREADING_LAYER = name
        return name
    raise NoSafeThreadingLayerError(
        "Numba finds neither OpenMP (libgomp.so.1) nor TBB; install one: `apt install libgomp1` or `pip install tbb`"
    )


def _compile(function: _F, **options: Any) -> _F:
    # Division by zero gives inf or NaN, as in torch; Python's exception would also keep loops from being vectorised.
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no directory for the disk cache is writable: compile in memory, once a process
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def parallel(function: _F) -> _F:
    """Compile a kernel that splits its prange loops over threads; strict IEEE arithmetic, nothing reassociated."""
    return _compile(function, parallel=True)


def serial(function: _F) -> _F:
    """Compile a function that runs on the calling thread, without the interpreter lock: a kernel, or a part of one."""
    return _compile(function)


def reassociating(function: _F) -> _F:
    """Compile a parallel kernel whose sums over columns may be reordered into vector lanes (still NaN and inf safe)."""
    return _compile(function, parallel=True, fastmath={"reassoc", "contract", "nsz"})


def use_threads(num_elements: int) -> None:
    """Set how many threads the calling thread's next kernels run on: as many as torch uses, fewer for little work.

    Waking a thread costs more than reading some 100,000 elements, and on a busy machine far more. No kernel's result
    depends on the number of threads.
    """
    enough = 1 + num_elements // _ELEMENTS_PER_THREAD
    numba.set_num_threads(min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS), enough))


def storage(tensor: Tensor) -> Array:
    """View a contiguous float32 tensor as float32, a bfloat16 tensor as its bits in uint16. Shares memory."""
    detached = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return detached.view(torch.int16).numpy().view(np.uint16)
    return detached.numpy()


def view(tensor: Tensor) -> Array:
    """View a tensor as a C-ordered array; copies only where it is not contiguous."""
    return detached_contiguous(tensor).numpy()


def detached_contiguous(tensor: Tensor) -> Tensor:
    """The tensor without autograd, contiguous."""
    return tensor.detach().contiguous()


EMPTY_WEIGHTS: Array = np.empty(0, dtype=np.float32)


def optional_weights(weights: Tensor | None) -> Array:
    """Weights as an array; none given is told to kernels by an empty array, which reads as all ones."""
    return EMPTY_WEIGHTS if weights is None else view(weights)
