"""Moves and rounds: together they turn the present into the target, in valid steps."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.placement import Assignment, KeyMove, Move, apply_round, moves, plan, rounds

from .strategies import LAYOUTS, presents, shard_sets


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
    plan_rounds = rounds(all_moves[::-1], page_bytes=page_bytes, key_page_bytes=key_bytes, max_bytes=max_bytes)

    joined = [move for one in plan_rounds for move in one.moves] + [
        move for one in plan_rounds for move in one.key_moves
    ]
    assert joined == all_moves, "the rounds, in order, are the moves, in order"
    seen_rows = [{move.row_page for move in one.moves} for one in plan_rounds]
    assert sum(map(len, seen_rows)) == len(set().union(*seen_rows)), "a row page is in two rounds"
    for one, row_pages in zip(plan_rounds, seen_rows, strict=True):
        assert one.num_pages == len(one.moves) + len(one.key_moves) > 0
        assert one.num_bytes == len(one.moves) * page_bytes + len(one.key_moves) * key_bytes
        assert one.num_bytes <= max_bytes or len(row_pages) + len(one.key_moves) == 1
    for one, following in pairwise(plan_rounds):
        first = following.moves[0].row_page if following.moves else None
        together = [move for move in following.moves if move.row_page == first]
        group_bytes = len(together) * page_bytes if together else key_bytes
        assert one.num_bytes + group_bytes > max_bytes, "the next group had fitted"

    state = present
    for one in plan_rounds:
        before = state.owners.copy()
        following = apply_round(state, one)
        np.testing.assert_array_equal(state.owners, before)
        changed = (following.owners != state.owners).sum() + (following.key_owners != state.key_owners).sum()
        assert changed == one.num_pages
        state = following
    assert state == target


def table(owners, keys=()):
    return Assignment(owners=np.array(owners, dtype=np.int32), key_owners=np.array(keys, dtype=np.int32))


def test_moves_name_page_source_and_dest_in_order():
    present = table([[0, 1], [0, 1], [2, 2]], [0, 1])
    target = table([[0, 3], [3, 0], [2, 2]], [0, 3])
    assert moves(present, target) == [Move(0, 1, 1, 3), Move(1, 0, 0, 3), Move(1, 1, 1, 0), KeyMove(1, 1, 3)]
    assert moves(present, present) == []
    assert rounds([], page_bytes=1, max_bytes=1) == []


def test_a_key_page_is_as_large_as_a_page_unless_told():
    (one,) = rounds([KeyMove(0, 0, 1), Move(0, 0, 0, 1)], page_bytes=7, max_bytes=100)
    assert one.num_bytes == 14


def test_moves_of_different_tables_are_refused():
    with pytest.raises(InvalidRequest, match="not of the same table"):
        moves(table([[0, 1]]), table([[0], [1]]))
    with pytest.raises(InvalidRequest, match="not of the same table"):
        moves(table([[0]], [1]), table([[0]]))


def test_a_round_that_does_not_fit_the_assignment_is_refused():
    present = table([[0, 1]], [0])
    (one,) = rounds([Move(0, 1, 1, 2), KeyMove(0, 0, 2)], page_bytes=1, max_bytes=10)
    done = apply_round(present, one)
    assert done == table([[0, 2]], [2])
    with pytest.raises(InvalidRequest, match="shard 2 owns it"):
        apply_round(done, one)
    with pytest.raises(InvalidRequest, match="does not exist"):
        apply_round(present, replace(one, moves=(Move(0, 2, 1, 2),)))
    with pytest.raises(InvalidRequest, match="does not exist"):
        apply_round(present, replace(one, moves=(Move(-1, 0, 0, 2),)))


@pytest.mark.parametrize("name", ["page_bytes", "max_bytes", "key_page_bytes"])
def test_bytes_below_one_are_refused(name):
    sizes = {"page_bytes": 4, "max_bytes": 8, "key_page_bytes": 4} | {name: 0}
    with pytest.raises(InvalidRequest, match=f"{name} = 0"):
        rounds([KeyMove(0, 0, 1)], **sizes)
