"""How CPU kernels are compiled and started: a threading layer that bears several Python threads, the disk cache,
as many threads as torch uses, tensors as numpy views. Kernels themselves live beside it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba as typed_numba
import numpy as np
import torch
from numba.core import caching as typed_caching
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

Array = NDArray[Any]
# Numba's type stubs leave out most of what is used here.
numba: Any = typed_numba
caching: Any = typed_caching

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


def source_stamp(folder: Path) -> str:
    """Changes with the text of any source file of the folder: kernels are compiled with functions of other files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _own_stamp() -> str:
    return source_stamp(Path(__file__).parent)


class KernelCacheFile(caching.IndexDataCacheFile):  # type: ignore[misc]
    """Numba's disk cache of one kernel, with a file of compiled code for each signature that no other signature uses.

    Numba numbers these files by an index that it reads, changes and writes without a lock. Of several processes that
    compile different signatures at once, one then finds another's code under its own signature, for ever. A lost entry
    of the index only means to compile again.
    """

    def save(self, key: Any, data: Any) -> None:
        """Keep the compiled code ``data`` of the signature (and target) ``key``."""
        digest = hashlib.sha256(f"{self._source_stamp} {key!r}".encode()).hexdigest()[:20]
        name = self._data_name_pattern.replace("{number:d}", digest)
        try:
            self._save_data(name, data)
            self._save_index(self._load_index() | {key: name})
        except OSError as error:
            logger.warning("kernels will be compiled again in the next process: cannot write %s: %s", name, error)


def _compile(function: _F, **options: Any) -> _F:
    # Division by zero gives inf or NaN, as in torch; Python's exception would also keep loops from being vectorised.
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        kernel = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no directory for the disk cache is writable: compile in memory, once a process
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
    cache: Any = getattr(kernel, "_cache", None)
    if hasattr(cache, "_cache_file"):  # not where NUMBA_DISABLE_JIT leaves the Python function
        cache._cache_file = KernelCacheFile(cache._cache_path, cache._impl.filename_base, _own_stamp())
    return kernel  # type: ignore[no-any-return]


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
