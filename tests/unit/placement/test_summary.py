"""What people are shown of an assignment."""

import numpy as np
import pytest
from hypothesis import given, settings

from mempool.placement import Assignment, ShardSummary, describe, layout_kind, plan

from .strategies import presents


def test_describes_whole_blocks_parts_keys_and_empty_shards():
    owners = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 2]], dtype=np.int32)
    assignment = Assignment(owners=owners, key_owners=np.array([4, 1], dtype=np.int32))
    assert describe(assignment, shards=[0, 9]) == [
        ShardSummary(shard=0, pages=8, share=0.5, blocks="0-1", key_pages=0, layout="mixed"),
        ShardSummary(shard=1, pages=7, share=0.4375, blocks="2, 3 (75%)", key_pages=1, layout="mixed"),
        ShardSummary(shard=2, pages=1, share=0.0625, blocks="3 (25%)", key_pages=0, layout="mixed"),
        ShardSummary(shard=4, pages=0, share=0.0, blocks="", key_pages=1, layout="mixed"),
        ShardSummary(shard=9, pages=0, share=0.0, blocks="", key_pages=0, layout="mixed"),
    ]


@given(assignment=presents())
@settings(max_examples=60, deadline=None)
def test_lines_add_up_to_the_table(assignment):
    lines = describe(assignment)
    assert sum(line.pages for line in lines) == assignment.owners.size
    assert sum(line.key_pages for line in lines) == assignment.num_key_pages
    assert sum(line.share for line in lines) == pytest.approx(1)
    for line in lines:
        assert line.pages == (assignment.owners == line.shard).sum()


@pytest.mark.parametrize(
    ("layout", "num_shards", "kind"),
    [("columns", 4, "columns"), ("rows", 4, "rows"), ("grid", 8, "grid"), ("auto", 2, "columns"), ("auto", 3, "mixed")],
)
def test_names_the_layout_that_was_planned(layout, num_shards, kind):
    target = plan(None, range(num_shards), num_row_pages=12, num_blocks=4, num_key_pages=0, layout=layout)
    assert layout_kind(target) == kind
