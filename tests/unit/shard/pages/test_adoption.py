"""Pages that come, go and change their blocks: none is published before all are there, and failing changes nothing."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.shard.pages import staging
from mempool.shard.pages.adoption import StagedPages
from mempool.shard.pages.arena import Arena
from mempool.types import FlatKeySpec, OptimizerSpec, ProductKeySpec
from tests.contract.driver import make_schema
from tests.contract.layouts import LAYOUTS

from .whole_tables import MovingTable, contents, same_bits

SCHEMA = make_schema(optimizer=OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1), keys=FlatKeySpec(key_dim=5))
HEADS = make_schema(num_slots=49, keys=ProductKeySpec(heads=3, key_dim=6))
OWNERS = st.lists(st.lists(st.sampled_from([0, 0, 1]), min_size=3, max_size=3), min_size=7, max_size=7)


def _is_right(moving: MovingTable) -> bool:
    """Whether every page that is owned holds what the library has, and no room is leaked."""
    table, ids = moving.table, torch.arange(moving.schema.num_slots)
    every = tuple(range(moving.schema.num_blocks))
    for name, array in table.arrays.items():
        columns = torch.from_numpy(array.places(table.row_blocks(name), every))
        owned = torch.zeros(len(ids), array.width(every), dtype=torch.bool)
        for page, blocks in enumerate(table.owned):
            places = array.places(tuple(np.flatnonzero(blocks).tolist()), every)
            owned[page * 8 : page * 8 + 8, torch.from_numpy(places)] = True
        expected = torch.where(owned, moving.library.read(name, ids), 0)[:, columns]
        if not torch.equal(table.read(name, ids), expected):
            return False
    for head, keys in zip(table.heads, table.head_keys, strict=True):
        if not torch.equal(keys, moving.library.head_keys[head]):
            return False
    return all(
        arena.num_taken == int((arena.page_of >= 0).sum()) > 0
        and len(np.unique(arena.page_of[arena.page_of >= 0])) == arena.num_taken
        for arena in table.arenas.values()
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(OWNERS, min_size=1, max_size=5))
def test_pages_are_where_every_placement_says(owners: list[list[list[int]]]) -> None:
    moving = MovingTable(SCHEMA)
    for each in owners:
        moving.move(each)
        assert _is_right(moving)


def test_heads_come_and_go() -> None:
    moving = MovingTable(HEADS, key_owners=[0, 1, 1])
    for key_owners in ([0, 0, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]):
        moving.move("one", key_owners=key_owners)
        assert moving.table.heads == tuple(np.flatnonzero(np.array(key_owners) == 0))
        assert _is_right(moving)


@contextmanager
def _failing_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The number-th time that adopting needs memory there is none."""
    calls = itertools.count()
    failed: list[int] = []

    def limited(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                failed.append(number)
                raise MemoryError("none left")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "reserve", limited(Arena.reserve))
        patch.setattr(Arena, "copy_from", limited(Arena.copy_from))
        patch.setattr(staging, "adopted_head_keys", limited(staging.adopted_head_keys))
        yield failed


@pytest.mark.parametrize(("schema", "key_owners"), [(SCHEMA, []), (HEADS, [0, 1, 1])], ids=["flat keys", "heads"])
def test_failing_half_way_changes_nothing_and_a_second_try_succeeds(
    schema: Any, key_owners: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    after = [1, 0, 0][: len(key_owners)]
    for number in itertools.count():
        moving = MovingTable(schema, "grid", key_owners=key_owners)
        before, size = contents(moving.table), moving.table.num_bytes
        target = MovingTable(schema, "mixed", key_owners=after).placement
        moving.stage(target)
        taken = {blocks: arena.num_taken for blocks, arena in moving.table.arenas.items()}
        with _failing_at(number, monkeypatch) as failed:
            try:
                moving.staging.adopt(target, version=0)
            except MemoryError:
                assert failed
        if failed:
            assert same_bits(contents(moving.table), before)
            assert {blocks: arena.num_taken for blocks, arena in moving.table.arenas.items()} == taken
            moving.staging.adopt(target, version=0)
        assert _is_right(moving)
        moving.move("grid", key_owners=key_owners)
        assert same_bits(contents(moving.table), before)
        assert moving.table.num_bytes <= 2 * size
        if not failed:
            break
    assert number > (3 if key_owners else 2)


def test_staged_pages_are_found_again() -> None:
    staged = StagedPages()
    staged.add(np.array([7, 2]), np.array([10, 11]))
    staged.add(np.array([4, 0]), np.array([12, 13]))
    assert staged.places(np.array([0, 7, 4, 2])).tolist() == [13, 10, 12, 11]
    assert staged.has(np.array([1, 2, 7, 8])).tolist() == [False, True, True, False]


def test_layouts_of_the_contract_follow_each_other() -> None:
    moving = MovingTable(SCHEMA)
    for first, second in itertools.permutations(sorted(LAYOUTS), 2):
        moving.move(first)
        moving.move(second)
        assert _is_right(moving)
