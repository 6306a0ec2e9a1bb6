"""Routes say of every shard exactly what its owners say."""

import numpy as np
import pytest
from hypothesis import given, settings

from mempool.placement import Assignment, plan, routes

from .strategies import presents


@given(assignment=presents(max_rows=20))
@settings(max_examples=200, deadline=None)
def test_routes_agree_with_the_owners(assignment):
    owners = assignment.owners
    found = routes(assignment)
    assert list(found) == sorted(set(owners.ravel().tolist()))
    for shard, route in found.items():
        mine = owners == shard
        assert route.blocks == tuple(np.flatnonzero(mine.any(axis=0)).tolist())
        assert route.sole == tuple(np.flatnonzero(mine.all(axis=0)).tolist())
        if route.row_mask is None:
            assert mine.any(axis=1).all()
        else:
            assert not route.sole
            assert not route.row_mask.all()
            np.testing.assert_array_equal(route.row_mask, mine.any(axis=1))
    # Every page is answered exactly once.
    answered = np.zeros(owners.shape, dtype=int)
    for shard in found:
        answered += owners == shard
    assert (answered == 1).all()


def test_columns_need_all_pairs_and_rows_only_their_own():
    columns = routes(plan(None, [0, 1], num_row_pages=4, num_blocks=4, num_key_pages=0, layout="columns"))
    assert [(route.blocks, route.sole, route.row_mask) for route in columns.values()] == [
        ((0, 1), (0, 1), None),
        ((2, 3), (2, 3), None),
    ]
    rows = routes(plan(None, [0, 1], num_row_pages=4, num_blocks=2, num_key_pages=0, layout="rows"))
    assert [(route.blocks, route.sole) for route in rows.values()] == [((0, 1), ()), ((0, 1), ())]
    assert rows[0].row_mask.tolist() == [True, True, False, False]
    assert rows[1].row_mask.tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="read-only"):
        rows[0].row_mask[0] = False


def test_a_shard_with_only_key_pages_has_no_route():
    assignment = Assignment(owners=np.zeros((2, 2), dtype=np.int32), key_owners=np.array([5], dtype=np.int32))
    assert list(routes(assignment)) == [0]
