"""The memory behind an arena's arrays: rows that become more and fewer, the first of them staying where they are.

On the CPU a range of addresses for the most rows there can be is reserved once, and memory is behind the rows in use:
growing copies nothing, and no second copy is ever alive. Elsewhere rows are allocated anew and copied.
"""

import ctypes
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mempool.errors import InvalidRequest

_NO_ACCESS = 0  # PROT_NONE
_HUGE_PAGE_BYTES = 2 * 2**20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14
_POPULATED_BYTES = 32 * 2**20
"""At once, by each of so many threads at most:"""
_POPULATING = 8
_LARGE = 16 * _HUGE_PAGE_BYTES
"""From here on an array grows by whole huge pages: less than a sixteenth of it can be memory that holds no row yet."""


class Rows(Protocol):
    """Rows of one array."""

    grows_in_place: bool

    def resize(self, num_rows: int) -> None:
        """Have so many rows: the first keep what they hold, those that are new hold zeros.

        Raises:
            InvalidRequest: There is not so much memory. The rows are as they were.
        """

    def first(self, num_rows: int) -> Tensor:
        """[num_rows, width]: the first rows, as many as there are at most; a contiguous view."""

    def populate(self) -> None:
        """Have memory behind all of them, which they get else when they are first written to."""


def rows_on(device: torch.device, *, max_rows: int, width: int, dtype: torch.dtype) -> Rows:
    """No rows yet, and at most ``max_rows``.

    Raises:
        InvalidRequest: There are not so many addresses.
    """
    if device.type == "cpu":
        return ReservedRows(max_rows=max_rows, width=width, dtype=dtype)
    return AllocatedRows(width=width, dtype=dtype, device=device)


class ReservedRows:
    """Rows in a range of addresses that is reserved for all of them: ``data_ptr`` never changes.

    What lies beyond the rows in use costs no memory and may not be read. Given back with the last tensor that views it.
    In a forked process the rows are the child's own copy, as all its memory is.
    """

    grows_in_place = True

    def __init__(self, *, max_rows: int, width: int, dtype: torch.dtype) -> None:
        self._row_bytes = width * dtype.itemsize
        self._num_rows = 0
        self._num_bytes = 0  # that are readable, a multiple of the page size
        self._range = _Range(max_rows * self._row_bytes)
        whole = torch.from_numpy(np.asarray(self._range))
        self._rows = whole.view(dtype).view(max_rows, width)

    def resize(self, num_rows: int) -> None:
        wanted = _rounded(num_rows * self._row_bytes)
        if wanted > self._num_bytes:
            self._range.open(self._num_bytes, wanted)
            self._num_bytes = wanted
        elif num_rows < self._num_rows:
            # The range stays readable: these addresses hold zeros from now on, and memory again when written to.
            self._range.empty(wanted, self._num_bytes)
            self._rows[num_rows : min(self._num_rows, -(-wanted // self._row_bytes))] = 0
        self._num_rows = num_rows

    def first(self, num_rows: int) -> Tensor:
        return self._rows[:num_rows]

    def populate(self) -> None:
        self._range.populate(self._num_bytes)


class AllocatedRows:
    """Rows on a GPU, allocated anew and copied where they grow or shrink, one array at a time.

    CUDA can reserve addresses as well (cuMemAddressReserve, cuMemMap), which torch does not hand out; until that is
    done, who grows them does it by a good part at once, so that copies stay linear in the rows.
    """

    grows_in_place = False

    def __init__(self, *, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty((0, width), dtype=dtype, device=device)

    def resize(self, num_rows: int) -> None:
        old = self._rows
        kept = min(num_rows, old.shape[0])
        try:
            rows = torch.empty((num_rows, old.shape[1]), dtype=old.dtype, device=old.device)
        except torch.OutOfMemoryError as error:
            num_bytes = num_rows * old.shape[1] * old.dtype.itemsize
            raise _no_memory(num_bytes, f"{old.device} has not so much ({error})") from None
        rows[:kept] = old[:kept]
        rows[kept:] = 0
        self._rows = rows

    def first(self, num_rows: int) -> Tensor:
        return self._rows[:num_rows]

    def populate(self) -> None:
        """They have it."""


class _Range:
    """A range of addresses, aligned for huge pages, given back with the last array that views it."""

    def __init__(self, num_bytes: int) -> None:
        length = max(1, num_bytes) + _HUGE_PAGE_BYTES
        # Without access nothing is counted against the system's memory, whatever its rule for overcommitment.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapped = _libc().mmap(None, length, _NO_ACCESS, flags, -1, 0)
        if mapped is None or mapped == ctypes.c_void_p(-1).value:
            raise _no_memory(length, f"no such range of addresses is free ({_reason()}); is there a limit (ulimit -v)?")
        self._address = -(-mapped // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        self._end = mapped + length
        weakref.finalize(self, _libc().munmap, mapped, length).atexit = False
        if num_bytes >= 2 * _HUGE_PAGE_BYTES:
            # Look-ups read rows at random: each would wait for its page's address too.
            _advise(self._address, num_bytes, "MADV_HUGEPAGE")
        self.__array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "version": 3,
        }

    def open(self, first: int, end: int) -> None:
        """Make bytes ``first`` to ``end`` readable and writable: zeros, without memory until they are written to."""
        end = min(end, self._end - self._address)
        if _libc().mprotect(self._address + first, end - first, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
            raise _no_memory(end - first, f"the system refuses it ({_reason()})")

    def populate(self, num_bytes: int) -> None:
        """Have memory behind the first bytes. Where the system cannot, they get it when they are written to."""

        def some(first: int) -> None:
            length = min(num_bytes, first + _POPULATED_BYTES) - first
            _libc().madvise(self._address + first, length, _POPULATE_WRITE)

        # Zeroing is as slow on one core as a fast disk reads, and slower where a host has to give the memory first.
        with ThreadPoolExecutor(min(_POPULATING, os.cpu_count() or 1), "mempool-memory") as threads:
            list(threads.map(some, range(0, num_bytes, _POPULATED_BYTES)))

    def empty(self, first: int, end: int) -> None:
        """Give the memory of these bytes back; they hold zeros."""
        if end > first:
            _advise(self._address + first, min(end, self._end - self._address) - first, "MADV_DONTNEED")


def _rounded(num_bytes: int) -> int:
    step = _HUGE_PAGE_BYTES if num_bytes >= _LARGE else mmap.PAGESIZE
    return -(-num_bytes // step) * step


def _advise(address: int, num_bytes: int, name: str) -> None:
    advice = getattr(mmap, name, None)
    if advice is not None:
        _libc().madvise(address, num_bytes, advice)


def _no_memory(num_bytes: int, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{num_bytes / 2**20:,.1f} MiB for pages cannot be had: {why}. Use more shards (mempool scale), make the table "
        "smaller (num_slots, value_dim, dtype, an optimizer with less state), or drop a table. Nothing was changed."
    )


def _reason() -> str:
    return os.strerror(ctypes.get_errno())


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
