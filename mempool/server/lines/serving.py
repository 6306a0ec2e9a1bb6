"""One client's line at the server: the call that it is at, and what is to be told of it. Of the lines' thread alone."""

import ctypes
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mempool.wire.lines.framing import FAILURE, REPLY, Message
from mempool.wire.lines.line import Parts
from mempool.wire.lines.served import ServedLine

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor


class Serving:
    """A line brings one request at a time, so that what it may have this process hold is bounded.

    Args:
        peer: What its client is called: "unix:PID:NUMBER", "ipv4:HOST:CLIENT/NUMBER".
        line: Its end here.
        process: The same of the process that it is a line of.

    Attributes:
        host: That process's host, as far as clients share what there is by hosts.
        body_bytes: What is taken of the room for requests.
        asked: The request that it is at; None: it is at none.
        take_back: Lets go of what answers that; None: nothing does, or it cannot be stopped.
        is_quiet: The answer comes in a turn that the lines' thread takes.
        is_paused: Nothing is read from it now.
        closed: It has ended.
        since_s: When it began to wait for the rest of a message, or for its client to take one; None: it does not.
    """

    __slots__ = (
        "_answered_in", "asked", "body_bytes", "closed", "host", "is_paused", "is_quiet", "line", "peer", "process",
        "since_s", "take_back",
    )  # fmt: skip

    def __init__(self, peer: str, line: ServedLine, *, process: str) -> None:
        self.peer = peer
        self.line = line
        self.process = process
        self.host = peer.rpartition(":")[0]
        self.body_bytes = 0
        self.asked: Message | None = None
        self.take_back: Callable[[], object] | None = None
        self.is_quiet = self.is_paused = self.closed = False
        self.since_s: float | None = None
        self._answered_in: int | None = None

    def reply(self, parts: Parts) -> bool:
        """Send the answer; whether all of it is gone. Raises as ``ServedLine.send``."""
        message = Message(REPLY, self._over())
        answered, self._answered_in = self._answered_in, None
        if answered is not None and _address(parts[-1]) == answered:
            return self.line.send_space(message, parts)
        self.line.drop_space()
        return self.line.send(message, parts)

    def fail(self, detail: bytes) -> bool:
        """Send an ErrorDetail likewise."""
        self._answered_in = None
        self.line.drop_space()
        return self.line.send(Message(FAILURE, self._over()), [detail])

    def look(self) -> None:
        """Note since when it is within a message."""
        if not self.line.is_within or self.line.wanted_bytes:
            self.since_s = None
        elif self.since_s is None:
            self.since_s = time.monotonic()

    def space(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor | None":
        """Memory that the answer may be written to, on whatever thread makes it: the line waits for it meanwhile."""
        import torch

        memory = self.line.space(math.prod(shape) * dtype.itemsize)
        if memory is None:
            return None
        space = torch.frombuffer(memory, dtype=dtype).view(shape)
        self._answered_in = space.data_ptr()
        return space

    def values(self, num_bags: int, width: int) -> "npt.NDArray[np.float32]":
        """The same for an answer that is an array; of its own where there is none now."""
        memory = self.line.space(4 * num_bags * width)
        if memory is None:
            return np.empty((num_bags, width), np.float32)
        self._answered_in = _address(memory)
        return np.frombuffer(memory, np.float32).reshape(num_bags, width)

    def _over(self) -> int:
        """The call is answered. Returns its number."""
        assert self.asked is not None, "it is answered once"
        call, self.asked, self.take_back = self.asked.call, None, None
        return call


def _address(memory: bytes | memoryview) -> int:
    """Of a tensor's bytes; 0 of others, which lie in no memory that was given."""
    if isinstance(memory, bytes) or memory.readonly:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
