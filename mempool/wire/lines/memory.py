"""Memory that one process writes and another reads: sealed, without a name, gone with the last of the two.

Each side of a line has one to send from. A body lies in it until the other side has said that it needs it no more.
"""

import fcntl
import mmap
import os
from bisect import bisect_left
from collections.abc import Sequence

from mempool.errors import InvalidRequest

MEMORY_BYTES = 8 * 2**20
"""Of each way. Pages that no body has lain in take no memory."""
_GRAIN_BYTES = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SHRINK") else 0


class Extents:
    """Which parts of a range are free: the first that is large enough is taken, so that the same memory is used again.

    Args:
        num_bytes: Of the range.
    """

    def __init__(self, num_bytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, num_bytes)]

    def take(self, num_bytes: int) -> tuple[int, int] | None:
        """[begin, end) of a part that has so many bytes at least; None: there is none."""
        num_bytes = max(1, -(-num_bytes // _GRAIN_BYTES)) * _GRAIN_BYTES
        for number, (begin, end) in enumerate(self._free):
            if end - begin >= num_bytes:
                if end - begin == num_bytes:
                    del self._free[number]
                else:
                    self._free[number] = begin + num_bytes, end
                return begin, begin + num_bytes
        return None

    def give_back(self, extent: tuple[int, int]) -> None:
        """It is free again."""
        number = bisect_left(self._free, extent)
        begin, end = extent
        if number < len(self._free) and self._free[number][0] == end:
            end = self._free.pop(number)[1]
        if number and self._free[number - 1][1] == begin:
            number -= 1
            begin = self._free.pop(number)[0]
        self._free.insert(number, (begin, end))


class SentMemory:
    """What this process sends from.

    Attributes:
        descriptor: To be handed to the other side; closed by ``close``.
    """

    def __init__(self, num_bytes: int = MEMORY_BYTES) -> None:
        self.descriptor = os.memfd_create("mempool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, num_bytes)
            # Who reads it must not find it shorter than it was.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = memoryview(mmap.mmap(self.descriptor, num_bytes))
        except BaseException:
            os.close(self.descriptor)
            raise
        self._extents = Extents(num_bytes)

    def put(self, parts: Sequence[bytes | memoryview], num_bytes: int) -> tuple[int, int] | None:
        """Write a body of so many bytes: where it lies, until that is given back; None: there is no room now."""
        extent = self._extents.take(num_bytes)
        if extent is not None:
            self.write(extent[0], parts)
        return extent

    def take(self, num_bytes: int) -> tuple[int, int] | None:
        """A part that has so many bytes at least, until it is given back; None: there is no room now."""
        return self._extents.take(num_bytes)

    def view(self, begin: int, end: int) -> memoryview:
        """Memory that was taken, to be written to."""
        return self._memory[begin:end]

    def write(self, at: int, parts: Sequence[bytes | memoryview]) -> None:
        """Write parts one behind the other, into what was taken."""
        for part in parts:
            end = at + len(part)
            self._memory[at:end] = part
            at = end

    def give_back(self, extent: tuple[int, int]) -> None:
        """The other side needs it no more."""
        self._extents.give_back(extent)

    def close(self) -> None:
        """Repeatable. The memory goes with the last view of it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class ReceivedMemory:
    """What the other process sends from, as this one reads it.

    Args:
        descriptor: As it was handed over. It stays its giver's.

    Raises:
        InvalidRequest: It may shrink, or is larger than any.
    """

    def __init__(self, descriptor: int) -> None:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        num_bytes = os.fstat(descriptor).st_size
        if seals & _SEALS != _SEALS or not 0 < num_bytes <= MEMORY_BYTES:
            raise InvalidRequest(f"memory of {num_bytes:,} bytes with seals {seals:#x} cannot be shared")
        self._memory = memoryview(mmap.mmap(descriptor, num_bytes))  # a caller may write to the tensors that he gets

    def view(self, begin: int, num_bytes: int) -> memoryview:
        """A body where it lies. Who sent it may write to it. Raises InvalidRequest where it does not lie within."""
        if begin + num_bytes > len(self._memory):
            raise InvalidRequest(
                f"a body of {num_bytes:,} bytes at {begin:,} does not lie in the memory that is shared"
            )
        return self._memory[begin : begin + num_bytes]
