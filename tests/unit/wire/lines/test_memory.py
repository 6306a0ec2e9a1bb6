"""Memory that two processes share: what is taken is nobody else's, and what cannot be trusted is refused."""

import fcntl
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.wire.lines.memory import MEMORY_BYTES, Extents, ReceivedMemory, SentMemory

SIZE = 64 * 4096


@given(sizes=st.lists(st.integers(1, 20 * 4096), max_size=60), order=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_parts_that_are_taken_do_not_overlap_and_come_together_again(sizes: list[int], order: object) -> None:
    extents, taken = Extents(SIZE), []
    for size in sizes:
        extent = extents.take(size)
        if extent is None:
            free = SIZE - sum(end - begin for begin, end in taken)
            assert free < SIZE or size > SIZE
        else:
            begin, end = extent
            assert 0 <= begin < end <= SIZE
            assert end - begin >= size
            assert all(end <= other or begin >= after for other, after in taken)
            taken.append(extent)
        if taken and order.random() < 0.4:  # type: ignore[attr-defined]
            extents.give_back(taken.pop(order.randrange(len(taken))))  # type: ignore[attr-defined]
    for extent in taken:
        extents.give_back(extent)
    assert extents.take(SIZE) == (0, SIZE)


def test_a_body_is_as_it_was_put_until_it_is_given_back() -> None:
    sent = SentMemory(SIZE)
    received = ReceivedMemory(sent.descriptor)
    one, two = os.urandom(5000), os.urandom(9000)
    first, second = sent.put([one[:10], one[10:]], 5000), sent.put([memoryview(two)], 9000)
    assert first is not None
    assert second is not None
    assert (bytes(received.view(first[0], 5000)), bytes(received.view(second[0], 9000))) == (one, two)
    assert sent.put([bytes(SIZE)], SIZE) is None, "there is no room"
    sent.give_back(first)
    sent.give_back(second)
    assert sent.put([bytes(SIZE)], SIZE) is not None
    with pytest.raises(InvalidRequest, match="does not lie in the memory"):
        received.view(SIZE - 10, 11)
    sent.close()
    sent.close()
    assert received.view(0, SIZE) == bytes(SIZE), "it is there as long as anybody has it"


@pytest.mark.parametrize(("size", "sealed"), [(SIZE, False), (2 * MEMORY_BYTES, True), (0, True)])
def test_memory_that_could_shrink_or_is_of_no_such_size_is_refused(size: int, sealed: bool) -> None:
    """Who reads beyond its end would be ended by the system."""
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    if sealed:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    with pytest.raises(InvalidRequest, match="cannot be shared"):
        ReceivedMemory(descriptor)
    os.close(descriptor)


def test_what_was_handed_over_cannot_shrink() -> None:
    sent = SentMemory(SIZE)
    with pytest.raises(PermissionError):
        os.ftruncate(sent.descriptor, 0)
    sent.close()
