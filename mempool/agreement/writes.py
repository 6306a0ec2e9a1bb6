"""Writes of rows, and of the step count, that come late: a copy of one that is over undoes no newer one. Pure.

Both halves of the rule: ``Writer`` numbers a client's writes, ``SeenWrites`` is what a shard knows of them.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mempool.errors import InvalidRequest
from mempool.types import WriteId

MAX_OPEN = 1024
"""Writes of one client that are under way at a time: what a message may name, and no client of ours has more."""
MAX_WRITERS = 4096
"""Clients whose writes of a table a shard remembers: of others, copies that come late are taken as new."""
MAX_NUMBERS = 65_536
"""Open writes of all of them together; beyond, too, those are forgotten that have been silent longest."""


class Writer:
    """Numbers the writes of one client.

    Args:
        number: Its own, unique among all clients: random, 1 or more.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._newest = 0
        self._open: set[int] = set()

    @contextmanager
    def begin(self) -> Iterator["OpenWrite"]:
        """A write, until it is answered or given up: all its messages carry its number."""
        self._newest += 1
        write = OpenWrite(self, self._newest)
        self._open.add(write.number)
        try:
            yield write
        finally:
            self._open.discard(write.number)

    def id_of(self, write: "OpenWrite") -> WriteId:
        """What a message of this write, sent now, says."""
        before = tuple(sorted(number for number in self._open if number < write.number))
        return WriteId(writer=self._number, number=write.number, open=before)


@dataclass(frozen=True, slots=True)
class OpenWrite:
    """A write that is under way."""

    writer: Writer
    number: int

    @property
    def id(self) -> WriteId:
        """What a message of it, sent now, says."""
        return self.writer.id_of(self)


@dataclass(slots=True)
class _Seen:
    """Of one client: the newest of its writes, and those up to it that are not known to be over, with whether each was
    done here."""

    newest: int = 0
    open: dict[int, bool] = field(default_factory=dict)

    def is_over(self, number: int) -> bool:
        return number <= self.newest and number not in self.open

    def hear(self, write_id: WriteId) -> None:
        """Whatever is before this write, and not open any more, is over."""
        number, before = write_id.number, frozenset(write_id.open)
        kept = {other: done for other, done in self.open.items() if other >= number or other in before}
        new = {other: False for other in write_id.open if other > self.newest}
        self.open = kept | new
        self.open.setdefault(number, False)
        self.newest = max(self.newest, number)


class SeenWrites:
    """What a shard knows of the writes to one table, under its present view: requests of another one are refused
    before, so nothing of this goes along with pages."""

    def __init__(self) -> None:
        self._writers: OrderedDict[int, _Seen] = OrderedDict()
        self._num_numbers = 0

    def is_due(self, write_id: WriteId | None) -> bool:
        """Whether the write is still to be done; False: it was done here, and no newer one is known to have followed.

        None, of a client that does not number its writes: always.

        Raises:
            InvalidRequest: Its client has said that it is over: this copy is late.
        """
        seen = None if write_id is None else self._writers.get(write_id.writer)
        if write_id is None or seen is None:
            return True
        if seen.is_over(write_id.number):
            raise InvalidRequest(
                f"write {write_id.number} of writer {write_id.writer} is late: its client has said with write "
                f"{seen.newest} that it was answered, or given up, before that one was sent. The later one stands. "
                "Nothing was changed."
            )
        return not seen.open.get(write_id.number, False)

    def did(self, write_id: WriteId | None) -> None:
        """A write that was due is done; or one that is not over has come once more."""
        if write_id is None:
            return
        seen = self._writers.setdefault(write_id.writer, _Seen())
        self._writers.move_to_end(write_id.writer)
        before = len(seen.open)
        seen.hear(write_id)
        seen.open[write_id.number] = True
        self._num_numbers += len(seen.open) - before
        while len(self._writers) > MAX_WRITERS or (self._num_numbers > MAX_NUMBERS and len(self._writers) > 1):
            _, oldest = self._writers.popitem(last=False)
            self._num_numbers -= len(oldest.open)

    def clear(self) -> None:
        """The view is another one."""
        self._writers.clear()
        self._num_numbers = 0
