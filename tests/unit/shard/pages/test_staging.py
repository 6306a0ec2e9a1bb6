"""Staged pages: they answer nothing, are overwritten, dropped, and come with the ledger that belongs to them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mempool.errors import Internal, InvalidRequest
from mempool.shard.pages.staging import Staging
from mempool.shard.pages.transfer import export
from mempool.types import ExportPages, FlatKeySpec, Ledger, PageBatch, ProductKeySpec
from tests.contract.driver import make_schema

from .whole_tables import MovingTable, contents, make_table, placement_of, same_bits

SCHEMA = make_schema(keys=FlatKeySpec(key_dim=5))
HEADS = make_schema(num_slots=49, keys=ProductKeySpec(heads=2, key_dim=6))
NOTHING = [[1, 1, 1]] * 7


def _batch(row_pages: list[int], blocks: tuple[int, ...] = (0, 1, 2), *, version: int = 0) -> PageBatch:
    request = ExportPages(table_id=1, row_pages=np.array(row_pages, dtype=np.int64), blocks=blocks)
    return export(make_table(SCHEMA), request, version=version)


def _staging() -> Staging:
    return Staging(make_table(SCHEMA, NOTHING))


def test_staged_pages_answer_nothing_until_they_are_adopted() -> None:
    staging = _staging()
    assert staging.put(_batch([2, 5])) == 2 * 8 * (10 + 10 + 5) * 4
    staging.put(_batch([3], (1,)))
    staging.put_ledger(Ledger())
    assert np.argwhere(staging.mask).tolist() == [[2, 0], [2, 1], [2, 2], [3, 1], [5, 0], [5, 1], [5, 2]]
    table = staging._table
    assert table.read("values", torch.arange(50)).shape == (50, 0)
    owners = np.ones((7, 3), dtype=np.int32)
    owners[[2, 5]] = 0
    staging.adopt(placement_of(owners, epoch=2), version=0)
    assert torch.equal(
        table.read("values", torch.arange(16, 24)), make_table(SCHEMA).read("values", torch.arange(16, 24))
    )
    assert not staging.mask.any()
    assert list(table.arenas) == [(0, 1, 2)]  # the page that nobody wanted is gone


def test_pages_that_come_again_replace_what_was_staged() -> None:
    staging = _staging()
    staging.put(_batch([2, 5]))
    size = staging._table.num_bytes
    again = _batch([5, 2])
    staging.put(replace(again, arrays={name: rows + 1 for name, rows in again.arrays.items()}))
    staging.put_ledger(Ledger())
    assert staging._table.num_bytes == size
    owners = np.ones((7, 3), dtype=np.int32)
    owners[[2, 5]] = 0
    staging.adopt(placement_of(owners, epoch=2), version=0)
    expected = make_table(SCHEMA).read("values", torch.arange(40, 48)) + 1
    assert torch.equal(staging._table.read("values", torch.arange(40, 48)), expected)


def test_dropping_gives_all_memory_back() -> None:
    staging = _staging()
    assert staging.new_bytes(np.array([1, 2]), (0,), ()) > 0
    staging.reserve(np.array([1, 2, 3]), (0, 1, 2))
    staging.put(_batch([1, 2]))
    assert staging.new_bytes(np.array([1, 2]), (0, 1, 2), ()) == 0
    staging.drop()
    assert (staging._table.num_bytes, staging.num_bytes) == (0, 0)


def test_what_is_here_already_or_nowhere_is_refused_and_nothing_changes() -> None:
    moving = MovingTable(HEADS, "rows", key_owners=[0, 1])
    before = contents(moving.table)
    for row_pages, blocks, key_pages, match in (
        ([3], (1,), (), "owns block 1 of row page 3"),
        ([], (), (0,), "owns one of the key pages"),
        ([7], (1,), (), "has no row page 7: it has 7"),
        ([4], (3,), (), "has no block 3"),
        ([4], (), (2,), "has no key page 2"),
        ([4, 4], (1,), (), "named twice"),
        ([4], (2, 1), (), "not ascending"),
        ([-1], (1,), (), "has no row page -1"),
        ([4] * 100, (1,), (), r"named twice in \[4, 4, 4, 4, 4, 4, 4, 4\] \.\.\."),
    ):
        with pytest.raises(InvalidRequest, match=match):
            moving.staging.check_pull(np.array(row_pages, dtype=np.int64), blocks, key_pages)
    assert same_bits(contents(moving.table), before)


def test_pages_from_ahead_need_their_ledger() -> None:
    moving = MovingTable(SCHEMA, "rows")
    assert not moving.staging.lacks_ledger(0)
    moving.staging.put(_batch([5], version=4))
    assert moving.staging.lacks_ledger(3)
    assert not moving.staging.lacks_ledger(4)  # it has got every commit that they got
    staging = _staging()
    assert not staging.lacks_ledger(0)
    staging.put(_batch([2], version=4))
    assert staging.lacks_ledger(4)  # it owned nothing, and was told nothing
    owners = np.ones((7, 3), dtype=np.int32)
    owners[2] = 0
    with pytest.raises(Internal, match="at version 4 whose ledger did not come; pull them again"):
        staging.adopt(placement_of(owners, epoch=2), version=0)
    with pytest.raises(Internal, match="at version 4 and their ledger at 5"):
        staging.put_ledger(Ledger(version=5))
    staging.put_ledger(Ledger(version=4))
    assert not staging.lacks_ledger(0)
    staging.put(_batch([3], version=5))  # a later round, or an owner that did not stand still
    assert staging.lacks_ledger(0)
    staging.put_ledger(Ledger(version=5))
    staging.adopt(placement_of(owners, epoch=2), version=0)
    assert (staging.version, staging.ledger) == (None, None)


def test_a_placement_of_pages_that_did_not_come_is_refused() -> None:
    staging = _staging()
    staging.put(_batch([2]))
    with pytest.raises(Internal, match=r"gives shard 0 18 pages .* the first being block 0 of row page 0"):
        staging.adopt(placement_of("one", epoch=2), version=0)
    moving = MovingTable(HEADS, key_owners=[0, 1])
    with pytest.raises(Internal, match=r"the keys of heads \[1\]"):
        moving.staging.adopt(placement_of("one", epoch=2, key_owners=[0, 0]), version=0)
