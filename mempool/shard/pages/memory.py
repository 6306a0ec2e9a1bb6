"""The memory behind an arena's arrays: rows that become more and fewer, the first of them staying where they are.

On the CPU a range of addresses for the most rows there can be is reserved once, and memory is behind the rows in use:
growing copies nothing, and no second copy is ever alive; a fork of them shares it, until either is written to
(``sharing``). Elsewhere rows are allocated anew and copied.
"""

import ctypes
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.shard.forks.sharing import PAGE_BYTES, Borrowed, SharedFile, SystemPages, libc, map_at, pages_of

_NO_ACCESS = 0  # PROT_NONE
_HUGE_PAGE_BYTES = 2 * 2**20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14
_COLLAPSE = 25  # MADV_COLLAPSE, of Linux 6.1
_POPULATED_BYTES = 32 * 2**20
"""At once, by each of so many threads at most:"""
_POPULATING = 8
_MOVED_BYTES = 4 * 2**20
"""So much is there twice while memory moves to where it can be shared."""
_SHARES = hasattr(os, "memfd_create")
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

    # Forks

    def share(self, num_bytes: int) -> int:
        """Get ready to be forked: move so much memory to where forks can share it, what it holds stays. Answers how
        many bytes were; 0: nothing is left to be.

        Raises:
            InvalidRequest: The system refuses it.
        """

    def fork(self) -> "Rows":
        """Rows that hold what these do, and change no more with them. Once all is shared.

        Raises:
            InvalidRequest: There is not so much memory.
        """

    @property
    def shares(self) -> bool:
        """Whether it shares memory with a fork, or as one: ``before_write`` is to be called."""

    def before_write(self, rows: SystemPages) -> None:
        """These rows [U], which may repeat, are about to be written to."""

    @property
    def shared_bytes(self) -> int:
        """Of a fork, bytes that are another's memory still; any thread may ask."""

    @property
    def orphan_bytes(self) -> int:
        """Of a fork, bytes that are there for it and others, and are counted for nobody; any thread may ask."""

    def close(self) -> None:
        """Nobody reads or writes it any more; forks go on. Repeatable."""


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
    In a forked process the rows are the child's own copy, as all its memory is, but for those that tables share.
    """

    grows_in_place = True

    def __init__(self, *, max_rows: int, width: int, dtype: torch.dtype) -> None:
        self._max_rows, self._width, self._dtype = max_rows, width, dtype
        self._row_bytes = width * dtype.itemsize
        self._num_rows = 0
        self._num_bytes = 0  # that are readable, a multiple of the page size
        self._lent: SharedFile | None = None  # what its forks share
        self._borrowed: Borrowed | None = None  # what it shares as a fork
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
            part = min(self._num_rows, -(-wanted // self._row_bytes))
            if self.shares:
                self.before_write(np.arange(num_rows, part))
            self._empty(wanted)
            self._rows[num_rows:part] = 0
        self._num_rows = num_rows

    def _empty(self, first: int) -> None:
        if self._lent is None and self._borrowed is None:
            self._range.empty(first, self._num_bytes)
            return
        end = self._range.readable(self._num_bytes)
        if self._borrowed is not None:
            self._borrowed.leave(np.arange(first // PAGE_BYTES, end // PAGE_BYTES))
        if self._lent is not None:
            self._lent.empty(first)
        self._range.clear(first, end)

    def first(self, num_rows: int) -> Tensor:
        return self._rows[:num_rows]

    def populate(self) -> None:
        if self._borrowed is None:
            self._range.populate(self._num_bytes)

    def share(self, num_bytes: int) -> int:
        if not _SHARES or self._borrows_most:
            return 0
        end = self._range.readable(self._num_bytes)
        try:
            file = self._lent = self._lent or SharedFile()
            first = file.num_bytes
            end = min(end, first + -(-num_bytes // PAGE_BYTES) * PAGE_BYTES)
            self._range.move(file, first, end)
        except OSError as error:
            raise _no_memory(end - first, f"the system has none that can be shared ({error})") from None
        if self._borrowed is not None:
            self._borrowed.leave(np.arange(first // PAGE_BYTES, end // PAGE_BYTES))
            if end == self._range.readable(self._num_bytes):
                self._borrowed.end()
                self._borrowed = None
        return end - first

    def fork(self) -> "ReservedRows":
        rows = ReservedRows(max_rows=self._max_rows, width=self._width, dtype=self._dtype)
        rows.resize(self._num_rows)
        end = self._range.readable(self._num_bytes)
        try:
            if self._borrowed is not None and self._lent is None:
                end = rows._range.readable(rows._num_bytes)  # what rows have left is behind that
                rows._borrowed = rows._range.borrow(self._borrowed.file, min(end, self._borrowed.num_bytes))
                own = np.setdiff1d(np.arange(end // PAGE_BYTES), np.flatnonzero(~self._borrowed.own))
                rows._borrowed.leave(own)
                self._range.copy(own, rows._range)
            elif self._lent is not None:
                assert end == self._lent.num_bytes, "all of it is to be shared first"
                rows._borrowed = rows._range.borrow(self._lent, end)
            else:
                rows.first(self._num_rows).copy_(self.first(self._num_rows))
        except OSError as error:
            raise _no_memory(end, f"the system does not let it be shared ({error})") from None
        return rows

    @property
    def _borrows_most(self) -> bool:
        """Whether more of it is another's than its own: a fork of it shares that, and copies what it has of its own."""
        borrowed = self._borrowed
        return self._lent is None and borrowed is not None and 2 * borrowed.shared_bytes > self._num_bytes

    @property
    def shares(self) -> bool:
        return self._borrowed is not None or (self._lent is not None and bool(self._lent.borrowed))

    def before_write(self, rows: SystemPages) -> None:
        pages = pages_of(rows, self._row_bytes)
        if self._lent is not None:
            self._lent.keep(pages)
        if self._borrowed is not None:
            self._borrowed.keep(pages)

    @property
    def shared_bytes(self) -> int:
        borrowed = self._borrowed
        return 0 if borrowed is None else borrowed.shared_bytes

    @property
    def orphan_bytes(self) -> int:
        borrowed = self._borrowed
        return 0 if borrowed is None else borrowed.file.orphan_bytes(borrowed)

    def close(self) -> None:
        if self._lent is not None:
            self._lent.let_go()
        if self._borrowed is not None:
            self._borrowed.end()


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

    def share(self, num_bytes: int) -> int:  # noqa: ARG002
        """Nothing: a fork is a copy."""
        return 0

    def fork(self) -> "AllocatedRows":
        held = self._rows
        rows = AllocatedRows(width=held.shape[1], dtype=held.dtype, device=held.device)
        rows.resize(held.shape[0])
        rows.first(held.shape[0]).copy_(held)
        return rows

    shares = False
    shared_bytes = orphan_bytes = 0

    def before_write(self, rows: SystemPages) -> None:
        """Nothing is shared."""

    def close(self) -> None:
        """Its memory goes with the last tensor that views it."""


class _Range:
    """A range of addresses, aligned for huge pages, given back with the last array that views it."""

    def __init__(self, num_bytes: int) -> None:
        length = max(1, num_bytes) + _HUGE_PAGE_BYTES
        # Without access nothing is counted against the system's memory, whatever its rule for overcommitment.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapped = libc().mmap(None, length, _NO_ACCESS, flags, -1, 0)
        if mapped is None or mapped == ctypes.c_void_p(-1).value:
            raise _no_memory(length, f"no such range of addresses is free ({_reason()}); is there a limit (ulimit -v)?")
        self._address = -(-mapped // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        self._end = mapped + length
        weakref.finalize(self, libc().munmap, mapped, length).atexit = False
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
        if libc().mprotect(self._address + first, end - first, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
            raise _no_memory(end - first, f"the system refuses it ({_reason()})")

    def populate(self, num_bytes: int) -> None:
        """Have memory behind the first bytes. Where the system cannot, they get it when they are written to."""

        def some(first: int) -> None:
            length = min(num_bytes, first + _POPULATED_BYTES) - first
            libc().madvise(self._address + first, length, _POPULATE_WRITE)

        # Zeroing is as slow on one core as a fast disk reads, and slower where a host has to give the memory first.
        with ThreadPoolExecutor(min(_POPULATING, os.cpu_count() or 1), "mempool-memory") as threads:
            list(threads.map(some, range(0, num_bytes, _POPULATED_BYTES)))

    def readable(self, num_bytes: int) -> int:
        """So many of these bytes are, a multiple of the system's page size."""
        most: int = (self._end - self._address) // PAGE_BYTES * PAGE_BYTES
        return min(num_bytes, most)

    def move(self, file: SharedFile, first: int, end: int) -> None:
        """Have these bytes, which follow those that it has, in that file. Raises OSError: they are where they were."""
        while first < end:
            some = min(end, first + _MOVED_BYTES)
            file.take(self._bytes(first, some))
            file.map(self._address + first, first, some, private=False)
            self._have_huge_pages(first, some)
            file.num_bytes = first = some

    def _have_huge_pages(self, first: int, end: int) -> None:
        """Where the system gives them to files without a name, which it does not by itself."""
        first, end = (at // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES for at in (first, end))  # what is before is there
        if first < end:
            libc().madvise(self._address + first, end - first, _COLLAPSE)

    def borrow(self, file: SharedFile, num_bytes: int) -> Borrowed:
        """Have the first bytes of that file, and memory of its own where they are written to. Raises OSError."""
        file.map(self._address, 0, num_bytes, private=True)
        return Borrowed(file, self._bytes(0, num_bytes))

    def copy(self, pages: SystemPages, into: "_Range") -> None:
        """Have the same there in these of the system's pages."""
        end = (int(pages.max(initial=-1)) + 1) * PAGE_BYTES
        read, write = (each._bytes(0, end).reshape(-1, PAGE_BYTES) for each in (self, into))
        at_once = _MOVED_BYTES // PAGE_BYTES
        for first in range(0, len(pages), at_once):
            some = pages[first : first + at_once]
            write[some] = read[some]

    def clear(self, first: int, end: int) -> None:
        """As ``empty``, where a file is behind these bytes."""
        if end > first:
            map_at(self._address + first, end - first, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _bytes(self, first: int, end: int) -> npt.NDArray[np.uint8]:
        return np.asarray(_View(self, self._address + first, end - first))

    def empty(self, first: int, end: int) -> None:
        """Give the memory of these bytes back; they hold zeros."""
        if end > first:
            _advise(self._address + first, min(end, self._end - self._address) - first, "MADV_DONTNEED")


class _View:
    """Bytes of a range, which stays as long as they are viewed."""

    def __init__(self, of: _Range, address: int, num_bytes: int) -> None:
        self._of = of
        self.__array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _rounded(num_bytes: int) -> int:
    step = _HUGE_PAGE_BYTES if num_bytes >= _LARGE else mmap.PAGESIZE
    return -(-num_bytes // step) * step


def _advise(address: int, num_bytes: int, name: str) -> None:
    advice = getattr(mmap, name, None)
    if advice is not None:
        libc().madvise(address, num_bytes, advice)


def _no_memory(num_bytes: int, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{num_bytes / 2**20:,.1f} MiB for pages cannot be had: {why}. Use more shards (mempool scale), make the table "
        "smaller (num_slots, value_dim, dtype, an optimizer with less state), or drop a table. Nothing was changed."
    )


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
