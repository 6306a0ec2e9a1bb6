"""How a table is cut: pages and blocks cover it exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.placement import block_columns, default_block_dim, default_page_slots, num_blocks, num_row_pages


@given(num_slots=st.integers(1, 10**9), page_slots=st.integers(1, 5000))
def test_row_pages_cover_the_slots(num_slots, page_slots):
    pages = num_row_pages(num_slots, page_slots)
    assert (pages - 1) * page_slots < num_slots <= pages * page_slots


@given(value_dim=st.integers(1, 5000), block_dim=st.integers(1, 700))
def test_blocks_cover_the_columns_once(value_dim, block_dim):
    ranges = [block_columns(block, value_dim, block_dim) for block in range(num_blocks(value_dim, block_dim))]
    assert [column for start, stop in ranges for column in range(start, stop)] == list(range(value_dim))
    assert all(stop - start == block_dim for start, stop in ranges[:-1])


@pytest.mark.parametrize(
    ("value_dim", "block_dim"),
    [(1, 1), (24, 24), (64, 64), (65, 64), (256, 64), (512, 64), (513, 128), (1024, 128), (2048, 256), (4097, 576)],
)
def test_default_block_dim(value_dim, block_dim):
    assert default_block_dim(value_dim) == block_dim


@given(value_dim=st.integers(1, 100_000))
def test_default_blocks_are_at_most_eight(value_dim):
    assert default_block_dim(value_dim) <= value_dim
    assert num_blocks(value_dim, default_block_dim(value_dim)) <= 8


@pytest.mark.parametrize(
    ("num_slots", "page_slots"),
    [(1, 16), (1024, 16), (1025, 32), (65536, 1024), (262144, 4096), (262145, 4096), (2**26, 4096)],
)
def test_default_page_slots(num_slots, page_slots):
    assert default_page_slots(num_slots) == page_slots


@pytest.mark.parametrize(
    "call",
    [
        lambda: num_row_pages(0, 16),
        lambda: num_row_pages(16, 0),
        lambda: num_blocks(0, 64),
        lambda: num_blocks(64, -1),
        lambda: block_columns(4, 256, 64),
        lambda: block_columns(-1, 256, 64),
        lambda: default_block_dim(0),
        lambda: default_page_slots(0),
    ],
)
def test_numbers_that_make_no_table_are_refused(call):
    with pytest.raises(InvalidRequest, match=r"at least 1|does not exist"):
        call()
