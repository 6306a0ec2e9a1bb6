"""Numbers of writes: whatever comes twice, late or never, no newer acknowledged write of the client is undone."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.agreement import writes
from mempool.agreement.writes import MAX_OPEN, OpenWrite, SeenWrites, Writer
from mempool.errors import InvalidRequest
from mempool.types import WriteId


def _id(number: int, *before: int, writer: int = 7) -> WriteId:
    return WriteId(writer=writer, number=number, open=before)


def _does(seen: SeenWrites, write_id: WriteId) -> bool:
    due = seen.is_due(write_id)
    seen.did(write_id)
    return due


def test_a_repeat_of_an_open_write_is_answered_and_not_done_again() -> None:
    seen = SeenWrites()
    assert _does(seen, _id(1))
    assert not _does(seen, _id(1))
    assert _does(seen, _id(2, 1))
    assert not _does(seen, _id(1))


def test_a_copy_of_a_write_that_is_over_is_late() -> None:
    seen = SeenWrites()
    assert _does(seen, _id(1))
    assert _does(seen, _id(4, 2))  # 1 and 3 are over; 3 never came
    for number in (1, 3):
        match = rf"write {number} of writer 7 is late: its client has said with write 4 .* Nothing was changed"
        with pytest.raises(InvalidRequest, match=match):
            seen.is_due(_id(number))
    assert _does(seen, _id(2))
    assert _does(seen, _id(3, writer=8))


def test_one_that_was_given_up_beside_one_that_goes_on_is_over_all_the_same() -> None:
    """A floor alone would stand below the one that goes on."""
    writer = Writer(7)
    seen = SeenWrites()
    with writer.begin() as long:
        with writer.begin() as given_up:
            late = given_up.id
        with writer.begin() as newer:
            assert _does(seen, newer.id)
        with pytest.raises(InvalidRequest, match="is late"):
            seen.is_due(late)
        assert _does(seen, long.id)


def test_what_fails_is_still_due() -> None:
    seen = SeenWrites()
    assert seen.is_due(_id(1))
    assert seen.is_due(_id(1))
    assert _does(seen, _id(2, 1))
    assert seen.is_due(_id(1))


def test_writes_without_a_number_are_always_due() -> None:
    seen = SeenWrites()
    for _ in range(2):
        assert seen.is_due(None)
        seen.did(None)


def test_under_another_view_nothing_is_known() -> None:
    """A repeat is of more rows of this shard there, and copies of before are refused by their epoch."""
    seen = SeenWrites()
    assert _does(seen, _id(1))
    seen.clear()
    assert _does(seen, _id(1))


def test_who_has_been_silent_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writes, "MAX_WRITERS", 2)
    seen = SeenWrites()
    for writer in (1, 2, 1, 3):
        seen.did(_id(5, writer=writer))
    assert [seen.is_due(_id(5, writer=writer)) for writer in (1, 2, 3)] == [False, True, False]


def test_open_numbers_of_all_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writes, "MAX_NUMBERS", 3 * MAX_OPEN)
    seen = SeenWrites()
    for start in range(1, 10 * MAX_OPEN, MAX_OPEN):
        for writer in range(1, 6):
            seen.did(_id(start + MAX_OPEN, *range(start, start + MAX_OPEN), writer=writer))
            kept = [len(known.open) for known in seen._writers.values()]
            assert sum(kept) == seen._num_numbers <= 3 * MAX_OPEN
            assert max(kept) <= MAX_OPEN + 1
            assert not seen.is_due(_id(start + MAX_OPEN, writer=writer))


@dataclass(eq=False)
class _Write:
    """A write of the histories below: when it began and ended, in events."""

    context: AbstractContextManager[OpenWrite]
    open: OpenWrite
    began: int
    ended: int | None = None
    acknowledged: bool = False
    done: bool = False


@dataclass
class _World:
    """One client, one shard, and what is on the wire between them; it stays there, to come again."""

    writer: Writer = field(default_factory=lambda: Writer(7))
    seen: SeenWrites = field(default_factory=SeenWrites)
    writes: list[_Write] = field(default_factory=list)
    messages: list[tuple[_Write, WriteId]] = field(default_factory=list)
    now: int = 0

    def play(self, what: str, number: int) -> None:
        self.now += 1
        going = [write for write in self.writes if write.ended is None]
        if what == "begins":
            context = self.writer.begin()
            self.writes.append(_Write(context, context.__enter__(), self.now))
        elif what == "is sent" and going:
            write = going[number % len(going)]
            self.messages.append((write, write.open.id))
        elif what == "arrives" and self.messages:
            self._arrives(*self.messages[number % len(self.messages)])
        elif what == "is given up" and going:
            self._ends(going[number % len(going)])
        elif what == "is acknowledged" and any(write.done for write in going):
            done = [write for write in going if write.done]
            write = done[number % len(done)]
            write.acknowledged = True
            self._ends(write)

    def _ends(self, write: _Write) -> None:
        write.ended = self.now
        write.context.__exit__(None, None, None)

    def _arrives(self, write: _Write, write_id: WriteId) -> None:
        try:
            due = self.seen.is_due(write_id)
        except InvalidRequest:
            assert write.ended is not None, "a write that goes on is not late"
            return
        self.seen.did(write_id)
        if not due:
            assert write.done, "a write is answered that was never done"
            return
        assert not write.done, "a write is done twice"
        write.done = True
        for newer in self.writes:
            undone = newer.acknowledged and write.ended is not None and write.ended < newer.began
            assert not undone, "a copy that is late undoes a newer acknowledged write"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begins", "is sent", "is sent", "arrives", "arrives", "is acknowledged", "is given up"]),
            st.integers(0, 20),
        ),
        max_size=120,
    )
)
def test_no_order_of_copies_undoes_an_acknowledged_write(events: list[tuple[str, int]]) -> None:
    world = _World()
    for what, number in events:
        world.play(what, number)
