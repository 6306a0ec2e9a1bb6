"""Random tables and presents for the tests of placement."""

import numpy as np
from hypothesis import strategies as st

from mempool.placement import Assignment

LAYOUTS = ("auto", "columns", "rows", "grid")

shard_sets = st.lists(st.integers(0, 40), min_size=1, max_size=7, unique=True)


@st.composite
def presents(draw: st.DrawFn, *, max_rows: int = 12, max_blocks: int = 6, max_shards: int = 6) -> Assignment:
    """Any owners at all: scattered pages, ranges of row pages, or whole columns; 0 to 5 key pages."""
    num_rows, num_blocks = draw(st.integers(1, max_rows)), draw(st.integers(1, max_blocks))
    ids = draw(st.lists(st.integers(0, 40), min_size=1, max_size=max_shards, unique=True))
    owner = st.sampled_from(ids)
    kind = draw(st.sampled_from(["pages", "rows", "columns"]))
    if kind == "pages":
        rows = [draw(st.lists(owner, min_size=num_blocks, max_size=num_blocks)) for _ in range(num_rows)]
    elif kind == "rows":
        rows = [[draw(owner)] * num_blocks for _ in range(num_rows)]
    else:
        rows = [draw(st.lists(owner, min_size=num_blocks, max_size=num_blocks))] * num_rows
    keys = draw(st.lists(owner, max_size=5))
    return Assignment(owners=np.array(rows, dtype=np.int32), key_owners=np.array(keys, dtype=np.int32))
