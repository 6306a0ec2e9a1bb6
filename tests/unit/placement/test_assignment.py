"""An assignment is checked, immutable and compared by content."""

import numpy as np
import pytest

from mempool.errors import InvalidRequest
from mempool.placement import Assignment

NO_KEYS = np.zeros(0, dtype=np.int32)


def test_keeps_its_own_read_only_copy():
    owners = np.array([[0, 1]], dtype=np.int64)
    assignment = Assignment(owners=owners, key_owners=NO_KEYS)
    owners[0, 0] = 7
    assert assignment.owners.tolist() == [[0, 1]]
    assert assignment.owners.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        assignment.owners[0, 0] = 7


def test_a_read_only_view_of_something_writable_is_copied_too():
    base = np.zeros((2, 2), dtype=np.int32)
    view = base[:1]
    view.flags.writeable = False
    assignment = Assignment(owners=view, key_owners=NO_KEYS)
    base[:] = 3
    assert assignment.owners.tolist() == [[0, 0]]


def test_equal_by_content():
    one = Assignment(owners=np.array([[0, 1]]), key_owners=np.array([2]))
    assert one == Assignment(owners=np.array([[0, 1]], dtype=np.int16), key_owners=np.array([2]))
    assert one != Assignment(owners=np.array([[0, 1]]), key_owners=np.array([3]))
    assert one != Assignment(owners=np.array([[0], [1]]), key_owners=np.array([2]))
    assert one != "one"


@pytest.mark.parametrize(
    ("owners", "keys", "words"),
    [
        (np.array([0, 1]), NO_KEYS, r"owners must be an integer array of rank 2, not int64 of shape \(2,\)"),
        (np.array([[0.0]]), NO_KEYS, "owners must be an integer array of rank 2, not float64"),
        ([[0]], NO_KEYS, "not list"),
        (np.zeros((0, 2), dtype=np.int32), NO_KEYS, "at least one row page"),
        (np.zeros((2, 0), dtype=np.int32), NO_KEYS, "at least one row page"),
        (np.array([[-1]]), NO_KEYS, "shard id -1"),
        (np.array([[1 << 31]]), NO_KEYS, "shard id 2147483648"),
        (np.array([[0]]), np.array([[0]]), "key_owners must be an integer array of rank 1"),
        (np.array([[0]]), np.array([-2]), "key_owners holds shard id -2"),
    ],
)
def test_what_is_no_assignment_is_refused(owners, keys, words):
    with pytest.raises(InvalidRequest, match=words):
        Assignment(owners=owners, key_owners=keys)
