"""Memory of an array that tables share: one has it in a file without a name, and writes there; its forks map it too.

A fork reads those bytes until either side writes to them: before that it gets a copy of its own of the system's page
(4 KiB) where they lie. So a fork takes what it has of its own, and the other one the file, which was its memory before.
Which rows are written to says the arena, through its one door. Linux alone; on the engine's thread, but for what is
said to be for any.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import numpy as np
import numpy.typing as npt

PAGE_BYTES = mmap.PAGESIZE
_SHIFT = PAGE_BYTES.bit_length() - 1
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_MAP_FIXED = 16
_TRIMMED_PART = 8
"""A file that forks alone have is looked at again when another eighth of it is needed by one less."""

SystemPages = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


def pages_of(rows: SystemPages, row_bytes: int) -> SystemPages:
    """The system's pages that rows lie in: [U] row numbers to page numbers, which may repeat."""
    first: SystemPages = (rows * row_bytes) >> _SHIFT
    last = (rows * row_bytes + row_bytes - 1) >> _SHIFT
    if row_bytes <= PAGE_BYTES and not PAGE_BYTES % row_bytes:
        return first
    most = (row_bytes - 2) // PAGE_BYTES + 2
    pages: SystemPages = np.minimum(first[:, None] + np.arange(most), last[:, None]).reshape(-1)
    return pages


class SharedFile:
    """The memory of one array, in a file, and the forks that map it.

    Attributes:
        num_bytes: Of it that are mapped by who has it, from the beginning.
        borrowed: By its forks.
        kept: Whether who has it is there still: else what it takes is nobody's but the forks'.

    Raises:
        OSError: There is no such file to be had.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("mempool-table", os.MFD_CLOEXEC)
        self._pid = os.getpid()
        self.num_bytes = 0
        self.borrowed: list[Borrowed] = []
        self.kept = True
        self._needed_bytes: int | None = None
        self._new_own = 0

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self._fd)

    def take(self, data: Bytes) -> None:
        """Have these bytes behind those that there are. Raises OSError where there is no memory for them."""
        end = self.num_bytes + len(data)
        os.ftruncate(self._fd, max(end, os.fstat(self._fd).st_size))
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:].data, self.num_bytes + done)

    def map(self, address: int, first: int, end: int, *, private: bool) -> None:
        """Have bytes ``first`` to ``end`` of it at that address, in place of what is there. Raises OSError."""
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        if first < end:
            map_at(address, end - first, flags=flags, file=self._fd, offset=first)

    def keep(self, pages: SystemPages) -> None:
        """These pages are about to be written to by who has the file: forks get copies of their own first."""
        for borrowed in self.borrowed:
            borrowed.keep(pages)

    def empty(self, first: int) -> None:
        """The bytes from ``first`` on are needed no more by who has it, and are given back."""
        if first < self.num_bytes:
            self.keep(np.arange(first >> _SHIFT, self.num_bytes >> _SHIFT, dtype=np.int64))
            self._punch(first, self.num_bytes)
            self.num_bytes = first

    def let_go(self) -> None:
        """Who had it is gone: it stays for its forks."""
        self.kept = False
        self.trim()

    def trim(self) -> None:
        """Give back what no fork needs of a file that nobody else has."""
        if self.kept:
            return
        self._new_own = 0
        needed = np.zeros(max((len(each.own) for each in self.borrowed), default=0), dtype=np.bool_)
        for each in self.borrowed:
            needed[: len(each.own)] |= ~each.own
        for first, end in _runs(~needed):
            self._punch(first * PAGE_BYTES, end * PAGE_BYTES)
        self._punch(len(needed) * PAGE_BYTES, self.num_bytes)  # what was added since it was forked
        self._needed_bytes = int(needed.sum()) * PAGE_BYTES

    def became_own(self, count: int) -> None:
        """So many pages more are a fork's own: where nobody else has the file, what is not needed goes now and then."""
        self._new_own += count
        needed = self._needed_bytes
        if needed is not None and self._new_own * PAGE_BYTES * _TRIMMED_PART > needed:
            self.trim()

    def orphan_bytes(self, borrowed: "Borrowed") -> int:
        """Bytes that it takes beside those that its forks are counted for, where nobody else has it: of the first."""
        if self._needed_bytes is None or borrowed not in self.borrowed[:1]:
            return 0
        return max(0, self._needed_bytes - borrowed.shared_bytes)

    def _punch(self, first: int, end: int) -> None:
        """Zeros from now on for who has it, without memory; copies of their own stay the forks'. Nothing in a process
        that this one has forked: it is the same file, and all of it is needed here."""
        if os.getpid() != self._pid:
            return
        if first < end and libc().fallocate(self._fd, _KEEP_SIZE | _PUNCH_HOLE, first, end - first) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Borrowed:
    """A fork's part in a file: which of the system's pages it has of its own.

    Args:
        file: It is among its forks from now on.
        view: The bytes as they are mapped, as many as the file has.

    Attributes:
        own: [system pages] bool.
    """

    def __init__(self, file: SharedFile, view: Bytes) -> None:
        self.file = file
        self.own = np.zeros(len(view) >> _SHIFT, dtype=np.bool_)
        self._view = view
        self._num_own = 0
        file.borrowed.append(self)

    @property
    def num_bytes(self) -> int:
        """So many of the file's were mapped."""
        return len(self.own) * PAGE_BYTES

    @property
    def shared_bytes(self) -> int:
        """Bytes that are the file's still; any thread may ask."""
        return (len(self.own) - self._num_own) * PAGE_BYTES

    def keep(self, pages: SystemPages) -> None:
        """Have copies of these pages, as the file has them: either side is about to write to them."""
        new = self._missing(pages)
        at = new * PAGE_BYTES
        self._view[at] = self._view[at]  # a write, of what is there: the system copies the page
        self._become_own(new)

    def leave(self, pages: SystemPages) -> None:
        """The file is not behind these pages any more."""
        self._become_own(self._missing(pages))

    def end(self) -> None:
        """It is no fork of it any more. Repeatable."""
        if self in self.file.borrowed:
            self.file.borrowed.remove(self)
            self.file.trim()

    def _missing(self, pages: SystemPages) -> SystemPages:
        """Those that are the file's, each once."""
        pages = pages[pages < len(self.own)]
        return np.unique(pages[~self.own[pages]])

    def _become_own(self, pages: SystemPages) -> None:
        self.own[pages] = True
        self._num_own += len(pages)
        self.file.became_own(len(pages))


def map_at(address: int, num_bytes: int, *, flags: int, file: int = -1, offset: int = 0) -> None:
    """Have memory at that address, in place of what is there, readable and writable. Raises OSError."""
    access = mmap.PROT_READ | mmap.PROT_WRITE
    mapped = libc().mmap(address, num_bytes, access, flags | _MAP_FIXED, file, offset)
    if mapped != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@cache
def libc() -> ctypes.CDLL:
    """Calls of the system that Python has not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t, ctypes.c_ssize_t]
    return libc


def _runs(mask: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where True stands: first and end of each run."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
