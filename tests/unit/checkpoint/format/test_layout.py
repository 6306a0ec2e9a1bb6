"""Every page that is wanted is in one group, and groups and files are as small as they should be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.checkpoint.format.layout import group_files, group_pages, live_bytes
from mempool.checkpoint.format.pages import Pages
from mempool.types import TableSchema
from tests.unit.checkpoint.contents import PLAIN, page_arrays
from tests.unit.wire.right_schemas import schemas


@settings(max_examples=80, deadline=None)
@given(
    schema=schemas(),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    batch_bytes=st.sampled_from([1, 1000, 100_000, 2**24]),
    file_bytes=st.sampled_from([1, 50_000, 2**30]),
)
def test_each_page_is_in_one_group(
    schema: TableSchema, seed: int, share: float, batch_bytes: int, file_bytes: int
) -> None:
    arrays = page_arrays(schema)
    rng = np.random.default_rng(seed)
    every = Pages.all(schema)
    wanted = Pages(rng.random(every.row_pages.shape) < share, rng.random(every.key_pages.shape) < share)
    groups = list(group_pages(schema, arrays, wanted, batch_bytes=batch_bytes))
    rows, heads = np.zeros(every.row_pages.shape, int), np.zeros(every.key_pages.shape, int)
    for group in groups:
        assert list(group.rows) == sorted(group.rows)
        if group.rows:
            rows[np.ix_(group.rows, group.blocks)] += 1
        heads[list(group.heads)] += 1
        assert group.num_bytes(schema, arrays) <= batch_bytes or len(group.rows) + len(group.heads) == 1
    assert (rows == wanted.row_pages).all()
    assert (heads == wanted.key_pages).all()

    files = list(group_files(schema, arrays, iter(groups), file_bytes=file_bytes))
    assert [group for file in files for group in file] == groups
    for file in files:
        assert sum(group.num_bytes(schema, arrays) for group in file) <= file_bytes or len(file) == 1
    if share == 1.0:
        assert sum(group.num_bytes(schema, arrays) for group in groups) == live_bytes(schema, arrays)


def test_rows_of_very_many_kinds_are_grouped_by_block() -> None:

    schema = replace(PLAIN, num_slots=8000, value_dim=80, block_dim=8, stride=0)
    pages = Pages(np.random.default_rng(0).random((1000, 10)) < 0.5, np.zeros(0, np.bool_))
    groups = list(group_pages(schema, page_arrays(schema), pages))
    assert [group.blocks for group in groups] == [(block,) for block in range(10)]
    assert sum(len(group.rows) for group in groups) == len(pages)
