"""Plans of moves and the pulls of a round, as values; what a mover says of itself. Carrying out: test_controller.py."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.config import ProductKeys, TableConfig, resolve
from mempool.controller.mover import Mover, _prepared, plan_moves
from mempool.controller.pulls import pulls
from mempool.controller.roster import Roster
from mempool.placement import apply_moves, moves, plan
from mempool.types import Placement, ShardInfo, TableView


def view(*, shards: int, layout: Any = "auto", heads: int = 3, row_pages: int = 16) -> TableView:
    schema = resolve(
        TableConfig(
            name="a",
            num_slots=16 * row_pages,
            page_slots=16,
            value_dim=12,
            block_dim=4,
            keys=ProductKeys(heads=heads, key_dim=4),
        )
    )
    found = plan(None, range(shards), num_row_pages=row_pages, num_blocks=3, num_key_pages=heads, layout=layout)
    infos = tuple(ShardInfo(shard=shard, address="", incarnation=1) for shard in range(8))
    placement = Placement(table_id=0, epoch=4, owners=found.owners, key_owners=found.key_owners)
    return TableView(schema=schema, placement=placement, shards=infos)


@given(
    before=st.integers(1, 6),
    after=st.integers(1, 6),
    layout=st.sampled_from(["auto", "columns", "rows", "grid"]),
    round_bytes=st.integers(1, 60_000),
)
@settings(max_examples=60, deadline=None)
def test_pulls_fetch_each_page_of_a_round_once_from_its_owner(
    before: int, after: int, layout: str, round_bytes: int
) -> None:
    present = view(shards=before, layout=layout)
    found = plan_moves(present, range(after), round_bytes)
    assert (found.name, found.epoch, found.present.owners.tolist()) == ("a", 4, present.placement.owners.tolist())
    state = found.present
    for part in found.rounds(round_bytes):
        pulled: list[tuple[int, ...]] = []
        for dest, requests in pulls(present, part):
            for request in requests:
                source = request.source.shard
                assert list(request.blocks) == sorted(request.blocks)
                assert request.row_pages.tolist() == sorted(request.row_pages.tolist())
                pulled += [(int(page), block, source, dest) for page in request.row_pages for block in request.blocks]
                pulled += [(head, source, dest) for head in request.key_pages]
        assert len(pulled) == len(set(pulled)) == part.num_pages
        following = apply_moves(state, part)
        for page, block, source, dest in (pull for pull in pulled if len(pull) == 4):
            assert (state.owners[page, block], following.owners[page, block]) == (source, dest)
        for head, source, dest in (pull for pull in pulled if len(pull) == 3):
            assert (state.key_owners[head], following.key_owners[head]) == (source, dest)
        state = following
    assert state == found.target
    assert found.pages == moves(found.present, found.target).num_pages


def test_row_pages_that_move_in_the_same_blocks_go_together() -> None:
    present = view(shards=1)
    target = present.placement.owners.copy()
    target[2:5, :2] = 1
    target[7, 2] = 1
    changed = replace(present.placement, owners=target)
    before, after = (
        plan_moves(replace(present, placement=each), [0], 1).present for each in (present.placement, changed)
    )
    ((dest, requests),) = pulls(present, moves(before, after))
    assert dest == 1
    assert sorted((request.blocks, request.row_pages.tolist()) for request in requests) == [
        ((0, 1), [2, 3, 4]),
        ((2,), [7]),
    ]


@pytest.mark.parametrize(("gate", "kept"), [(2, []), (3, []), (3, [2]), (5, [2, 3])])
def test_where_the_gate_changes_the_new_one_fetches_what_the_old_one_decided(gate: int, kept: list[int]) -> None:
    """Whether or not it owned pages before, and wherever they come from."""
    present = view(shards=6, layout="rows")
    present = replace(present, placement=placed(present, [2, 3, 5]))
    following = placed(present, [*kept, gate] if kept else [gate])
    before, after = (
        plan_moves(replace(present, placement=each), [0], 1).present for each in (present.placement, following)
    )
    _, round_ = _prepared(present, moves(before, after), before)
    found = [(dest, request.source.shard) for dest, request in round_.pulls if request.of_decisions]
    assert found == ([] if round_.moved.placement.shards[0] == 2 else [(gate, 2)])


def placed(present: TableView, owners: list[int]) -> Placement:
    """Row pages and heads given to these in turn."""
    of = present.placement
    rows = np.array([owners[page % len(owners)] for page in range(len(of.owners))], dtype=np.int32)
    heads = np.array([owners[head % len(owners)] for head in range(len(of.key_owners))], dtype=np.int32)
    return replace(of, owners=np.repeat(rows[:, None], of.owners.shape[1], axis=1), key_owners=heads)


def test_a_mover_counts_once_and_says_what_has_moved() -> None:
    plans = [replace_name(plan_moves(view(shards=1), range(2), 10_000), name) for name in ("a", "b")]
    mover = Mover(
        shards_before=1,
        shards_after=2,
        plans=plans,
        roster=Roster(),
        call=None,  # type: ignore[arg-type]
        untold=lambda: None,
    )
    assert not mover.begun
    total = sum(each.pages for each in plans)
    assert mover.progress(table="").pages_total == total
    assert mover.moved_text() == (
        f"0 of {total} pages have moved (0 of {plans[0].pages} of table 'a', 0 of {plans[1].pages} of table 'b')"
    )
    mover._pages_moved = plans[0].pages + 1
    assert mover.begun
    assert (
        f"{plans[0].pages} of {plans[0].pages} of table 'a', 1 of {plans[1].pages} of table 'b'" in mover.moved_text()
    )


def replace_name(found: Any, name: str) -> Any:
    return replace(found, schema=replace(found.schema, name=name))


@pytest.mark.parametrize("layout", ["auto", "columns", "rows"])
def test_a_million_pages_are_planned_and_cut_as_arrays(layout: Any) -> None:
    """The largest table that any door takes: no object is made for a page."""
    schema = resolve(TableConfig(name="a", num_slots=2**20, page_slots=1, value_dim=1))
    owners = np.zeros((2**20, 1), dtype=np.int32)
    placement = Placement(table_id=0, epoch=1, owners=owners, key_owners=np.empty(0, dtype=np.int32))
    large = TableView(schema=replace(schema, layout=layout), placement=placement, shards=())
    found = plan_moves(large, [0, 1, 2], 64 * 2**20)
    assert found.pages == (0 if layout == "columns" else 2 * (2**20 // 3))
    assert all(part.num_pages <= 2**16 for part in found.rounds(64 * 2**20)), "pages of a round are named one by one"
