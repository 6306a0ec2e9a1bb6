"""Lives of a journal on a disk of the tests: what was appended, what was acknowledged, and what must be read again."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

from byhand import ByHand
from fakefiles import FakeFiles, PowerCut

from mempool.errors import MempoolError
from mempool.journal import Journal, Owner

FOLDER = "disk/journal"
OWNER = Owner("pool-1", 3)


class Lives:
    """One journal over its lives. Each record's payload is an id of its own, and some bytes.

    Attributes:
        acknowledged: Ids of which somebody was told that they are durable, or that a life has begun with.
        removed_to, snapshot: The first id that is still needed, and the number before it.
        failed: Ids of which somebody was told that they are not.
    """

    def __init__(self, seed: int, *, capacity_bytes: int = 2**40, segment_bytes: int = 700) -> None:
        self.files = FakeFiles(seed, capacity_bytes=capacity_bytes)
        self.files.make_folder(FOLDER)
        self.segment_bytes = segment_bytes
        self.appended: list[int] = []
        self.acknowledged: set[int] = set()
        self.failed: set[int] = set()
        self.removed_to = 0
        self.snapshot = 0
        self._numbers: dict[int, int] = {}
        self._waiting: list[tuple[int, Future[None]]] = []

    def begin(self) -> list[int]:
        """A life begins: what the journal has is what it must have. Its ids."""
        self.hand = ByHand()
        self._waiting.clear()
        self.journal = Journal(
            self.files,
            FOLDER,
            owner=OWNER,
            runner=self.hand,
            after=self.snapshot,
            segment_bytes=self.segment_bytes,
            most_waiting_bytes=2**20,
        )
        found = []
        for record in self.journal.records(after=self.snapshot):
            found.append(int.from_bytes(record.payload[:4], "little"))
            assert record.payload == payload(found[-1]), "never read as data what was not written"
            assert record.kind == found[-1] % 7
            self._numbers[found[-1]] = record.number
        self._check(found)
        self.acknowledged = {name for name in self.acknowledged if name >= self.removed_to} | set(found)
        self.failed -= set(found)
        return found

    def append(self, count: int, *, wait: bool = True) -> None:
        """Append so many, and wait for none. wait=False: nor does anybody else, so they are written, and not synced."""
        for _ in range(count):
            name = len(self.appended)
            self.appended.append(name)
            whole = payload(name)
            number = self.journal.append(name % 7, [whole[:3], b"", memoryview(whole)[3:]], wait=wait)
            self._numbers[name] = number
            self._waiting.append((name, self.journal.when_synced(number)))

    def work(self) -> None:
        """All that waits is written, or fails; whoever waited hears of it."""
        try:
            self.hand.work()
        finally:
            for name, done in [one for one in self._waiting if one[1].done()]:
                self._waiting.remove((name, done))
                (self.acknowledged if done.exception() is None else self.failed).add(name)

    def remove_half(self) -> None:
        """The first half of what is there is needed no more."""
        names = sorted(self.acknowledged)
        if names:
            name = names[len(names) // 2]
            self.removed_to, self.snapshot = name, self._numbers[name] - 1
            done = self.journal.remove_before(self._numbers[name])
            self.work()
            done.exception()

    def close(self) -> None:
        try:
            asyncio.run(self.journal.close())
        finally:
            self.work()

    def _check(self, found: list[int]) -> None:
        assert found == sorted(set(found)), "in the order they were appended in"
        assert set(found) <= set(self.appended), "nothing that was not appended"
        assert {name for name in self.acknowledged if name >= self.removed_to} <= set(found), (
            "all that was acknowledged"
        )
        for name in self.failed & set(found):
            assert not [later for later in self.acknowledged if later > name], "what failed, before what did not"


def payload(name: int) -> bytes:
    """What is appended under an id."""
    return name.to_bytes(4, "little") + bytes((name * 31 + place) % 256 for place in range(name * 37 % 70))


def script(lives: Lives) -> None:
    """Two lives of everything that a journal does."""
    for _ in range(2):
        lives.begin()
        for count in (1, 3, 2, 4):
            lives.append(count)
            lives.work()
        lives.remove_half()
        for count in (2, 3):
            lives.append(count, wait=False)
            lives.work()
        lives.append(2)
        lives.work()
        lives.append(1, wait=False)
        lives.work()
        lives.close()


def until_it_ends(lives: Lives, steps: Callable[[Lives], None]) -> bool:
    """Whether the power went meanwhile. What fails is told to those who waited, and else ends the script."""
    try:
        steps(lives)
    except PowerCut:
        return True
    except MempoolError:
        pass
    return False
