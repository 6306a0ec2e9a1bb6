"""Bodies of a line whose ends are on one host: in memory that both have, until who reads them needs them no more."""

from collections.abc import Sequence

from mempool.wire.lines.memory import ReceivedMemory, SentMemory

SHARED_FROM_BYTES = 16 * 2**10
"""Smaller bodies come with their message: the system copies them while it would be told where they lie."""
_HEAD_BYTES = 4096
"""Room before the memory that is given for the end of a body."""

Parts = Sequence[bytes | memoryview]


class Shared:
    """The memory of one end.

    Args:
        sent, received: Of both ways.
    """

    def __init__(self, sent: SentMemory, received: ReceivedMemory) -> None:
        self._sent = sent
        self._received = received
        self._extents: dict[int, tuple[int, int]] = {}  # by call, of what this side sends
        self._space: tuple[int, int] | None = None
        sent.close()  # the other side has it, and what is mapped stays

    @property
    def num_extents(self) -> int:
        """Bodies of this side's that the other one may still read."""
        return len(self._extents)

    def put(self, call: int, parts: Parts, num_bytes: int) -> int | None:
        """Write the body of a call: where it lies; None: it is small, or there is no room now."""
        extent = self._sent.put(parts, num_bytes) if num_bytes >= SHARED_FROM_BYTES else None
        if extent is None:
            return None
        self._extents[call] = extent
        return extent[0]

    def give_back(self, call: int) -> bool:
        """The other side needs this side's body of that call no more. Returns whether it had one."""
        extent = self._extents.pop(call, None)
        if extent is not None:
            self._sent.give_back(extent)
        return extent is not None

    def view(self, place: int, num_bytes: int) -> memoryview:
        """A body of the other side. Raises InvalidRequest where it does not lie within its memory."""
        return self._received.view(place, num_bytes)

    def space(self, num_bytes: int) -> memoryview | None:
        """Memory that a body of this side's may end with, until it is dropped, or sent; None: there is none now."""
        if self._space is not None:
            self.drop_space()
        if num_bytes < SHARED_FROM_BYTES:
            return None
        self._space = self._sent.take(_HEAD_BYTES + num_bytes)
        if self._space is None:
            return None
        begin = self._space[0] + _HEAD_BYTES
        return self._sent.view(begin, begin + num_bytes)

    def put_before_space(self, call: int, head: Parts, num_bytes: int) -> int | None:
        """Write the begin of a body, of so many bytes, whose end is in the memory that was taken: where the whole lies;
        None: there is no room before that."""
        assert self._space is not None, "it was taken"
        if num_bytes > _HEAD_BYTES:
            return None
        extent, self._space = self._space, None
        place = extent[0] + _HEAD_BYTES - num_bytes
        self._sent.write(place, head)
        self._extents[call] = extent
        return place

    def drop_space(self) -> None:
        """It is not needed."""
        if self._space is not None:
            self._sent.give_back(self._space)
            self._space = None
