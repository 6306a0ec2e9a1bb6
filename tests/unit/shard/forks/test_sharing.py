"""Memory that a table and its forks share: what each reads, and what of it is whose, as the system counts."""

import mmap
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from mempool.shard.forks.sharing import pages_of
from mempool.shard.pages import memory
from mempool.shard.pages.memory import AllocatedRows, ReservedRows, Rows
from tests.support.forks import forked

WIDTH = 96  # of float32: rows lie across the system's pages
ROWS = 40_000

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="elsewhere a fork is a copy")


def filled(rows: int = ROWS, *, max_rows: int = 2 * ROWS) -> ReservedRows:
    made = ReservedRows(max_rows=max_rows, width=WIDTH, dtype=torch.float32)
    made.resize(rows)
    made.first(rows).copy_(torch.randn(rows, WIDTH))
    return made


def shared(rows: ReservedRows) -> ReservedRows:
    while rows.share(2**20):
        pass
    return rows


def write(rows: ReservedRows, at: Tensor, value: float) -> None:
    rows.before_write(at.numpy())
    rows.first(int(at.max()) + 1)[at] = value


def private_bytes(rows: ReservedRows) -> int:
    """Of its mapping, what the system says is its own: what is anonymous."""
    return mapped(rows, "Anonymous:")


def mapped(rows: ReservedRows, kind: str) -> int:
    """Bytes of its mapping of that kind, as the system says in smaps."""
    first = rows.first(1).data_ptr()
    end = first + rows._range.readable(rows._num_bytes)
    own, inside = 0, False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                begin = int(head.split("-")[0], 16)
                inside = first <= begin < end
            elif inside and head == kind:
                own += int(line.split()[1]) * 1024
    return own


def test_moving_memory_changes_neither_what_it_holds_nor_where_it_lies() -> None:
    rows = filled()
    before, at = rows.first(ROWS).clone(), rows.first(1).data_ptr()
    assert shared(rows).first(1).data_ptr() == at
    assert torch.equal(rows.first(ROWS), before)
    assert rows.share(2**20) == 0
    rows.resize(ROWS + 100)
    rows.first(ROWS + 100)[ROWS:] = 1.0  # what has come since is moved, too
    assert shared(rows).fork().first(ROWS + 100)[-1, -1] == 1.0
    assert torch.equal(rows.first(ROWS), before)


def test_memory_that_is_shared_lies_in_huge_pages_where_the_system_gives_them() -> None:
    large = 8 * 2**21 // (4 * WIDTH)
    rows = filled(large, max_rows=large)
    before = rows.first(large).clone()
    shared(rows)
    if memory.libc().madvise(rows._range._address, 2**21, memory._COLLAPSE):
        pytest.skip("it gives none")
    assert mapped(rows, "ShmemPmdMapped:") >= 7 * 2**21
    fork = rows.fork()
    write(rows, torch.tensor([17]), 3.0)
    assert torch.equal(fork.first(large), before)
    assert private_bytes(fork) <= 2 * mmap.PAGESIZE


def test_either_side_writes_for_itself_and_takes_what_it_wrote() -> None:
    rows = shared(filled())
    before = rows.first(ROWS).clone()
    fork = rows.fork()
    size = rows._range.readable(rows._num_bytes)
    assert fork.shared_bytes == size
    assert private_bytes(fork) == 0
    theirs, ours = torch.arange(0, 2_000, 7), torch.arange(1_000, 3_000, 5)
    write(rows, theirs, 7.0)
    write(fork, ours, 9.0)
    expected, forked = before.clone(), before.clone()
    expected[theirs], forked[ours] = 7.0, 9.0
    assert torch.equal(rows.first(ROWS), expected)
    assert torch.equal(fork.first(ROWS), forked)
    written = np.unique(pages_of(torch.cat((theirs, ours)).numpy(), 4 * WIDTH))
    assert size - fork.shared_bytes == len(written) * mmap.PAGESIZE == private_bytes(fork)
    assert private_bytes(rows) == 0  # it has the file


def test_without_being_told_of_a_write_a_fork_would_see_it() -> None:
    rows = shared(filled())
    fork = rows.fork()
    rows.first(ROWS)[5] = 3.0
    assert bool((fork.first(ROWS)[5] == 3.0).all())


@pytest.mark.parametrize("own", ["little", "most"])
def test_several_forks_one_of_a_fork_each_goes_its_way(own: str) -> None:
    """A fork of a fork shares what that shares, unless it is less than that has of its own, which is shared then."""
    rows = shared(filled(4_000))
    before = rows.first(4_000).clone()
    first = rows.fork()
    write(rows, torch.tensor([1]), 1.0)
    second = rows.fork()
    rest = torch.arange(10, 3_000 if own == "most" else 20)
    write(first, rest, 5.0)
    write(first, torch.tensor([2]), 2.0)
    size = rows._range.readable(rows._num_bytes)
    apart = size - first.shared_bytes
    third = shared(first).fork()
    assert (first._borrowed is None) == (own == "most")
    assert third.shared_bytes == (size if own == "most" else size - apart)
    assert private_bytes(third) == size - third.shared_bytes
    write(rows, torch.tensor([3]), 3.0)
    write(third, torch.tensor([4]), 4.0)
    write(first, torch.tensor([3_500]), 6.0)
    fourth = shared(third).fork()
    rows.close()
    del rows
    expected = [before.clone() for _ in range(3)]
    for number, writes in enumerate(({2: 2.0, 3_500: 6.0}, {1: 1.0}, {2: 2.0, 4: 4.0})):
        if number != 1:
            expected[number][rest] = 5.0
        for row, value in writes.items():
            expected[number][row] = value
    for held, wanted in zip((first, second, third, fourth), (*expected, expected[-1]), strict=True):
        assert torch.equal(held.first(4_000), wanted)


def test_forks_live_on_without_what_they_were_forked_of_and_what_they_need_not_is_given_back() -> None:
    rows = shared(filled())
    before = rows.first(ROWS).clone()
    fork, other = rows.fork(), rows.fork()
    size = rows._range.readable(rows._num_bytes)
    half = torch.arange(ROWS // 2)
    write(fork, half, 5.0)
    write(other, half, 6.0)
    file = fork._borrowed.file  # type: ignore[union-attr]
    assert fork.orphan_bytes == 0
    rows.resize(2 * ROWS)
    rows.first(2 * ROWS)[ROWS:] = 1.0
    shared(rows)
    rows.close()
    kept = os.fstat(file._fd).st_blocks * 512
    assert kept < 0.52 * size
    assert fork.orphan_bytes + other.orphan_bytes == kept - fork.shared_bytes
    del rows
    for held, value in ((fork, 5.0), (other, 6.0)):
        assert torch.equal(held.first(ROWS)[ROWS // 2 :], before[ROWS // 2 :])
        assert bool((held.first(ROWS)[: ROWS // 2] == value).all())
    other.close()
    rest = torch.arange(ROWS // 2, ROWS)
    for some in rest.split(ROWS // 20):
        fork.before_write(some.numpy())
        fork.first(ROWS)[some, 0] = 8.0  # of each row a part alone
        assert os.fstat(file._fd).st_blocks * 512 - fork.shared_bytes == fork.orphan_bytes <= size // 8
    assert os.fstat(file._fd).st_blocks * 512 <= size // 8
    expected = before[rest].clone()
    expected[:, 0] = 8.0
    assert torch.equal(fork.first(ROWS)[ROWS // 2 :], expected)


def test_a_forked_process_gives_back_nothing_of_its_parents() -> None:
    rows = shared(filled())
    fork, before = rows.fork(), rows.first(ROWS).clone()
    write(fork, torch.arange(ROWS // 2), 5.0)
    fork.resize(ROWS // 2)

    def let_go() -> None:
        rows.close()
        fork.close()

    assert os.waitpid(forked(let_go), 0)[1] == 0
    assert torch.equal(rows.first(ROWS), before)
    assert bool((fork.first(ROWS // 2) == 5.0).all())


def test_who_gives_memory_back_takes_none_from_the_other() -> None:
    rows = shared(filled())
    before = rows.first(ROWS).clone()
    fork, other = rows.fork(), rows.fork()
    rows.resize(1_001)
    assert torch.equal(fork.first(ROWS), before)
    fork.resize(2_003)
    rows.resize(ROWS)
    fork.resize(ROWS)
    assert torch.equal(rows.first(ROWS)[:1_001], before[:1_001])
    assert not rows.first(ROWS)[1_001:].any()
    assert torch.equal(fork.first(ROWS)[:2_003], before[:2_003])
    assert not fork.first(ROWS)[2_003:].any()
    assert torch.equal(other.first(ROWS), before)
    assert torch.equal(shared(rows).fork().first(ROWS), rows.first(ROWS))
    assert torch.equal(other.first(ROWS), before)


@pytest.mark.parametrize("kind", ["where nothing can be shared", "on another device"])
def test_elsewhere_a_fork_is_a_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SHARES", False)
    rows: Rows = (
        filled(300)
        if "nothing" in kind
        else AllocatedRows(width=WIDTH, dtype=torch.float32, device=torch.device("cpu"))
    )
    rows.resize(300)
    before = rows.first(300).normal_().clone()
    assert rows.share(2**20) == 0
    fork = rows.fork()
    assert not rows.shares
    assert fork.shared_bytes == fork.orphan_bytes == 0
    rows.first(300).zero_()
    assert torch.equal(fork.first(300), before)
    rows.close()
    fork.close()


@pytest.mark.parametrize("row_bytes", [1, 3, 48, 384, 4096, 5000, 8192, 12_000])
def test_the_pages_of_rows_are_all_that_they_lie_in(row_bytes: int) -> None:
    rows = np.array([0, 1, 5, 77, 1000])
    expected = {at // 4096 for row in rows.tolist() for at in range(row * row_bytes, (row + 1) * row_bytes)}
    assert set(pages_of(rows, row_bytes).tolist()) == expected


def test_a_fork_that_has_grown_and_shrunk_is_forked_as_it_is() -> None:
    first = shared(filled(4_000)).fork()
    first.resize(4_600)
    first.first(4_600)[4_000:] = 7.0
    first.resize(3_900)
    before = first.first(3_900).clone()
    second = shared(first).fork()
    assert torch.equal(second.first(3_900), before)
    second.resize(4_600)
    assert not bool(second.first(4_600)[3_900:].any()), "rows that are new hold zeros"
    write(second, torch.tensor([1]), 2.0)
    assert torch.equal(first.first(3_900), before)
