"""Pulls against the plainest way to make them, a page at a time."""

from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.config import ProductKeys, TableConfig, resolve
from mempool.controller.pulls import pulls
from mempool.placement import Moves
from mempool.types import Placement, ShardInfo, TableView

ROWS, BLOCKS, HEADS, SHARDS = 6, 130, 4, 5  # more blocks than one word has bits


def view() -> TableView:
    keys = ProductKeys(heads=HEADS, key_dim=2)
    schema = resolve(TableConfig(name="a", num_slots=36, page_slots=8, value_dim=BLOCKS, block_dim=1, keys=keys))
    owners = np.zeros((schema.num_row_pages, BLOCKS), dtype=np.int32)
    placement = Placement(table_id=0, epoch=1, owners=owners, key_owners=np.zeros(HEADS, dtype=np.int32))
    infos = tuple(ShardInfo(shard=shard, address="", incarnation=1) for shard in range(SHARDS))
    return TableView(schema=schema, placement=placement, shards=infos)


shard = st.integers(0, SHARDS - 1)
cells = st.dictionaries(
    st.tuples(st.integers(0, ROWS - 1), st.sampled_from([0, 1, 2, 63, 64, 65, 128, 129])),
    st.tuples(shard, shard),
    max_size=40,
)
key_cells = st.dictionaries(st.integers(0, HEADS - 1), st.tuples(shard, shard))


def made(pages: dict[tuple[int, int], tuple[int, int]], keys: dict[int, tuple[int, int]]) -> Moves:
    rows = np.array([(*place, *way) for place, way in sorted(pages.items())], dtype=np.int64).reshape(-1, 4).T
    heads = np.array([(head, *way) for head, way in sorted(keys.items())], dtype=np.int64).reshape(-1, 3).T
    return Moves(
        row_pages=rows[0],
        blocks=rows[1],
        sources=rows[2],
        dests=rows[3],
        heads=heads[0],
        key_sources=heads[1],
        key_dests=heads[2],
    )


@given(pages=cells, keys=key_cells)
@settings(max_examples=150, deadline=None)
def test_row_pages_of_one_way_and_the_same_blocks_are_one_pull(
    pages: dict[tuple[int, int], tuple[int, int]], keys: dict[int, tuple[int, int]]
) -> None:
    blocks_of: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for (row_page, block), (source, dest) in sorted(pages.items()):
        blocks_of[dest, source, row_page].append(block)
    expected: dict[tuple[int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    for (dest, source, row_page), blocks in blocks_of.items():
        expected[dest, source, tuple(blocks)].append(row_page)
    expected_keys: dict[tuple[int, int], list[int]] = defaultdict(list)
    for head, (source, dest) in sorted(keys.items()):
        expected_keys[dest, source].append(head)

    found = pulls(view(), made(pages, keys))
    assert [dest for dest, _ in found] == sorted({dest for _, dest in [*pages.values(), *keys.values()]})
    of_rows = {
        (dest, request.source.shard, request.blocks): request.row_pages.tolist()
        for dest, requests in found
        for request in requests
        if not request.key_pages
    }
    of_keys = {
        (dest, request.source.shard): list(request.key_pages)
        for dest, requests in found
        for request in requests
        if request.key_pages
    }
    assert of_rows == {key: sorted(row_pages) for key, row_pages in expected.items()}
    assert of_keys == dict(expected_keys)
    assert sum(len(requests) for _, requests in found) == len(expected) + len(expected_keys)


def test_many_pages_between_many_shards_are_few_pulls() -> None:
    """All ways between the shards, not one pass over all pages for each."""
    row_pages = np.repeat(np.arange(2**10, dtype=np.int64), 64)
    blocks = np.tile(np.arange(64, dtype=np.int64), 2**10)
    moves = Moves(row_pages=row_pages, blocks=blocks, sources=blocks % SHARDS, dests=(blocks + 1) % SHARDS)
    found = pulls(view(), moves)
    assert sum(len(requests) for _, requests in found) == SHARDS
    assert sum(len(request.row_pages) * len(request.blocks) for _, each in found for request in each) == 2**16
