"""Checks of the ids and matrices of reads and writes. (How they are cut into messages: test_table.)"""

import pytest
import torch

from mempool.client.rows import checked_key_rows, checked_matrix, checked_rows, distinct_rows
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, ProductKeySpec
from tests.support.faulty import make_schema


def test_rows_are_named_by_a_vector_in_range() -> None:
    assert checked_rows(torch.tensor([3, 3, 99]), num_slots=100, table="facts").tolist() == [3, 3, 99]
    with pytest.raises(InvalidRequest, match=r"ids has shape \[1, 1\]; rows are named by ids \[M\]"):
        checked_rows(torch.tensor([[3]]), num_slots=100, table="facts")
    with pytest.raises(InvalidRequest, match=r"ids\[1\] = 4 is outside table 'facts': it has 4 heads, 0 to 3"):
        checked_rows(torch.tensor([3, 4]), num_slots=4, table="facts", what="heads")


def test_rows_may_be_named_by_a_list() -> None:
    for ids in ([3, 0], (3, 0), range(3, -1, -3)):
        assert torch.equal(checked_rows(ids, num_slots=4, table="facts"), torch.tensor([3, 0]))
    assert checked_rows([], num_slots=4, table="facts").shape == (0,)
    for wrong in ([1.0], [True], [2**63], [[1]], ["1"]):
        with pytest.raises(InvalidRequest, match="ids must be integers, as a tensor or as a list of int"):
            checked_rows(wrong, num_slots=4, table="facts")
    with pytest.raises(InvalidRequest, match=r"ids must be a torch\.Tensor, not int"):
        checked_rows(3, num_slots=4, table="facts")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"ids\[0\] = 4 is outside"):
        checked_rows([4], num_slots=4, table="facts")


def test_rows_of_a_write_are_distinct() -> None:
    ids = torch.tensor([5, 3, 99])
    assert distinct_rows(ids, num_slots=100, table="facts").tolist() == [5, 3, 99]
    with pytest.raises(InvalidRequest, match=r"ids\[0\], ids\[2\] are both 5; ids of a write must be distinct"):
        distinct_rows(torch.tensor([5, 3, 5]), num_slots=100, table="facts")


def test_matrices_become_the_messages_own() -> None:
    source = torch.rand(3, 2, dtype=torch.float64).t()
    own = checked_matrix("values", source, [2, 3], torch.float32, table="facts")
    assert own.is_contiguous()
    assert torch.equal(own, source.float())
    with pytest.raises(InvalidRequest, match=r"table 'facts': values has shape \[2, 3\], must be \[2, 4\]"):
        checked_matrix("values", source, [2, 4], torch.float32, table="facts")


def test_keys_are_named_by_slots_or_by_heads() -> None:
    flat = make_schema(keys=FlatKeySpec(key_dim=5))
    product = make_schema(keys=ProductKeySpec(heads=3, key_dim=4), stride=8)
    ids, shape = checked_key_rows(None, schema=flat)
    assert (ids.tolist(), shape) == (list(range(64)), [64, 5])
    ids, shape = checked_key_rows(None, schema=product)
    assert (ids.tolist(), shape) == ([0, 1, 2], [3, 2, 8, 2])
    assert checked_key_rows(torch.tensor([63]), schema=flat)[1] == [1, 5]
    with pytest.raises(InvalidRequest, match="it has 3 heads, 0 to 2"):
        checked_key_rows(torch.tensor([3]), schema=product)
    with pytest.raises(InvalidRequest, match="has no keys in the pool"):
        checked_key_rows(None, schema=make_schema())
