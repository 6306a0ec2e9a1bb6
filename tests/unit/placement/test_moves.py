"""Moves and rounds: together they turn the present into the target, in valid steps."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.placement import Assignment, Moves, apply_moves, moves, plan, rounds

from .strategies import LAYOUTS, presents, shard_sets


def listed(some: Moves) -> list[tuple[int, ...]]:
    """(row page, block, source, dest), then (head, source, dest)."""
    pages = zip(*(axis.tolist() for axis in (some.row_pages, some.blocks, some.sources, some.dests)), strict=True)
    keys = zip(*(axis.tolist() for axis in (some.heads, some.key_sources, some.key_dests)), strict=True)
    return [*pages, *keys]


def made(*steps: tuple[int, ...]) -> Moves:
    """Moves of such tuples."""
    pages = np.array([step for step in steps if len(step) == 4], dtype=np.int64).reshape(-1, 4).T
    keys = np.array([step for step in steps if len(step) == 3], dtype=np.int64).reshape(-1, 3).T
    return Moves(
        row_pages=pages[0],
        blocks=pages[1],
        sources=pages[2],
        dests=pages[3],
        heads=keys[0],
        key_sources=keys[1],
        key_dests=keys[2],
    )


@given(
    present=presents(),
    shards=shard_sets,
    layout=st.sampled_from(LAYOUTS),
    page_bytes=st.integers(1, 50),
    key_bytes=st.integers(1, 50),
    max_bytes=st.integers(1, 400),
)
@settings(max_examples=200, deadline=None)
def test_rounds_lead_from_the_present_to_the_target(present, shards, layout, page_bytes, key_bytes, max_bytes):
    rows, blocks = present.owners.shape
    keys = present.num_key_pages
    target = plan(present, shards, num_row_pages=rows, num_blocks=blocks, num_key_pages=keys, layout=layout)
    all_moves = moves(present, target)
    cut = rounds(all_moves, page_bytes=page_bytes, key_page_bytes=key_bytes, max_bytes=max_bytes)
    parts = list(cut)

    joined = [move for part in parts for move in listed(part)]
    assert joined == listed(all_moves), "the rounds, in order, are the moves, in order"
    assert sum(part.num_pages for part in parts) == all_moves.num_pages
    seen_rows = [set(part.row_pages.tolist()) for part in parts]
    assert sum(map(len, seen_rows)) == len(set().union(*seen_rows)), "a row page is in two rounds"

    def size(part: Moves) -> int:
        return part.row_pages.size * page_bytes + part.heads.size * key_bytes

    for part, row_pages in zip(parts, seen_rows, strict=True):
        assert part.num_pages > 0
        assert size(part) <= max_bytes or len(row_pages) + part.heads.size == 1
    for part, following in pairwise(parts):
        first = following.row_pages[0] if following.row_pages.size else None
        together = int((following.row_pages == first).sum())
        group_bytes = together * page_bytes if together else key_bytes
        assert size(part) + group_bytes > max_bytes, "the next group had fitted"

    state = present
    for part in parts:
        before = state.owners.copy()
        following = apply_moves(state, part)
        np.testing.assert_array_equal(state.owners, before)
        changed = (following.owners != state.owners).sum() + (following.key_owners != state.key_owners).sum()
        assert changed == part.num_pages
        state = following
    assert state == target


def table(owners, keys=()):
    return Assignment(owners=np.array(owners, dtype=np.int32), key_owners=np.array(keys, dtype=np.int32))


def test_moves_name_page_source_and_dest_in_order():
    present = table([[0, 1], [0, 1], [2, 2]], [0, 1])
    target = table([[0, 3], [3, 0], [2, 2]], [0, 3])
    found = moves(present, target)
    assert listed(found) == [(0, 1, 1, 3), (1, 0, 0, 3), (1, 1, 1, 0), (1, 1, 3)]
    assert moves(present, present).num_pages == 0
    assert list(rounds(Moves(), page_bytes=1, max_bytes=1)) == []


def test_a_key_page_is_as_large_as_a_page_unless_told():
    steps = made((0, 0, 0, 1), (0, 0, 1))
    assert len(list(rounds(steps, page_bytes=7, max_bytes=14))) == 1
    assert len(list(rounds(steps, page_bytes=7, max_bytes=13))) == 2
    assert len(list(rounds(steps, page_bytes=7, max_bytes=13, key_page_bytes=6))) == 1


def test_the_size_of_a_round_is_asked_for_before_each():
    steps = made(*((page, 0, 0, 1) for page in range(10)))
    sizes = iter([1, 3, 2, 100])
    assert [part.num_pages for part in rounds(steps, page_bytes=1, max_bytes=lambda: next(sizes))] == [1, 3, 2, 4]


def test_a_million_pages_are_planned_as_arrays():
    """No object a page: what is made is a few arrays, and the rounds are views of them."""
    present, target = table(np.zeros((2**20, 1))), table(np.ones((2**20, 1)))
    cut = list(rounds(moves(present, target), page_bytes=64, max_bytes=2**20))
    assert len(cut) == 64
    assert all(part.row_pages.base is not None for part in cut)


def test_moves_of_different_tables_are_refused():
    with pytest.raises(InvalidRequest, match="not of the same table"):
        moves(table([[0, 1]]), table([[0], [1]]))
    with pytest.raises(InvalidRequest, match="not of the same table"):
        moves(table([[0]], [1]), table([[0]]))


def test_moves_that_do_not_fit_the_assignment_are_refused():
    present = table([[0, 1]], [0])
    done = apply_moves(present, made((0, 1, 1, 2), (0, 0, 2)))
    assert done == table([[0, 2]], [2])
    with pytest.raises(InvalidRequest, match=r"takes page \(0, 1\) from shard 1, but shard 2 owns it"):
        apply_moves(done, made((0, 1, 1, 2)))
    with pytest.raises(InvalidRequest, match=r"takes key page \(0,\) from shard 0, but shard 2 owns it"):
        apply_moves(done, made((0, 0, 2)))
    for place in ((0, 2), (-1, 0), (1, 0)):
        with pytest.raises(InvalidRequest, match=r"page \(.*\), which does not exist"):
            apply_moves(present, made((*place, 1, 2)))


@pytest.mark.parametrize("name", ["page_bytes", "max_bytes", "key_page_bytes"])
def test_bytes_below_one_are_refused(name):
    sizes = {"page_bytes": 4, "max_bytes": 8, "key_page_bytes": 4} | {name: 0}
    with pytest.raises(InvalidRequest, match=f"{name} = 0"):
        rounds(made((0, 0, 1)), **sizes)
