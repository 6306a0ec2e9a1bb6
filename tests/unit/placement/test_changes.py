"""Changes of views: what is made of one is the view that was meant, or nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.placement.changes import (
    Changes,
    ToldViews,
    ViewChange,
    change_between,
    changed,
    digest_of,
    known_view,
)
from mempool.types import OptimizerSpec, Placement, ProductKeySpec, SavedTable, ShardInfo, TableSchema, TableView
from mempool.wire.codecs.tables import VIEW_CHANGE

SCHEMA = TableSchema(
    table_id=3,
    name="facts",
    num_slots=1024,
    value_dim=12,
    block_dim=4,
    page_slots=64,
    dtype="float32",
    seed=0,
    init_std=1.0,
    stride=32,
    layout="auto",
    optimizer=OptimizerSpec(algorithm="sgd", lr=0.5),
    keys=ProductKeySpec(heads=2, key_dim=4),
)


def make_view(epoch: int, owners: object, key_owners: object = (0, 0), **changes: object) -> TableView:
    placement = Placement(
        table_id=3,
        epoch=epoch,
        owners=np.array(owners, dtype=np.int32).reshape(16, 3),
        key_owners=np.array(key_owners, dtype=np.int32),
    )
    infos = tuple(ShardInfo(shard=shard, address=f"host-{shard}:1", incarnation=1) for shard in range(4))
    return replace(TableView(schema=SCHEMA, placement=placement, shards=infos, controller="here:1"), **changes)  # type: ignore[arg-type]


BEFORE = make_view(4, np.arange(48) % 4)
AFTER = make_view(5, [3, 3, *(np.arange(2, 48) % 4)], (0, 2))


def sent(change: ViewChange | None) -> ViewChange:
    assert change is not None
    return VIEW_CHANGE.from_wire(VIEW_CHANGE.to_wire(change), "change")  # type: ignore[no-any-return]


def same(first: TableView, second: TableView) -> bool:
    return (
        first.placement.same_owners(second.placement)
        and first.placement.epoch == second.placement.epoch
        and set(first.shards) == set(second.shards)
        and (first.schema, first.controller, first.saved) == (second.schema, second.controller, second.saved)
    )


@given(
    owners=st.lists(st.integers(0, 3), min_size=48, max_size=48),
    moved=st.dictionaries(st.integers(0, 47), st.integers(0, 3), max_size=15),  # of more the view is shorter
    key_owners=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    shards=st.lists(st.integers(0, 5), unique=True),
    restarted=st.sets(st.integers(0, 5)),
)
def test_what_is_made_is_what_was_meant(
    owners: list[int], moved: dict[int, int], key_owners: tuple[int, int], shards: list[int], restarted: set[int]
) -> None:
    known = make_view(7, owners)
    after = [moved.get(number, owner) for number, owner in enumerate(owners)]
    named = sorted({*shards, *after, *key_owners})
    infos = tuple(
        ShardInfo(shard=shard, address=f"host-{shard}:1", incarnation=1 + (shard in restarted)) for shard in named
    )
    view = make_view(9, after, key_owners, shards=infos, controller="there:1")
    assert same(changed([known], sent(change_between(known, view))), view)


def test_few_bytes_say_few_pages() -> None:
    change = change_between(BEFORE, AFTER)
    assert change is not None
    assert change.pages.tolist() == [[0, 0, 3], [0, 1, 3]]
    assert change.key_pages.tolist() == [[1, 2]]
    assert change.shards == change.gone == ()


def test_a_start_of_a_shard_changes_no_page() -> None:
    saved = SavedTable(url="/ckpt", checkpoint="c1", table="facts", version=3, taken=5)
    restarted = (*BEFORE.shards[:3], ShardInfo(shard=3, address="elsewhere:1", incarnation=2))
    view = replace(BEFORE, shards=restarted, saved=saved)
    change = change_between(BEFORE, view)
    assert change is not None
    assert change.shards == restarted[3:]
    assert same(changed([BEFORE], sent(change)), view)


@pytest.mark.parametrize(
    "view",
    [
        make_view(3, AFTER.placement.owners),
        make_view(4, AFTER.placement.owners),
        make_view(5, (BEFORE.placement.owners + 1) % 4),
        replace(AFTER, schema=replace(SCHEMA, seed=1)),
    ],
    ids=["older", "another of this epoch", "nearly all pages", "another table"],
)
def test_some_views_are_no_change_of_the_known_one(view: TableView) -> None:
    assert change_between(BEFORE, view) is None


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], "not here"),
        ([AFTER], "epoch 5 is here"),
        ([make_view(4, [1, *BEFORE.placement.owners.reshape(-1)[1:]], (3, 3))], "another view of epoch 4"),
        ([replace(BEFORE, shards=BEFORE.shards[1:])], "another view of epoch 4"),
    ],
    ids=["no such table", "told already", "two controllers", "a start that only the shard knows"],
)
def test_a_change_of_another_view_makes_none(views: list[TableView], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        changed(views, sent(change_between(BEFORE, AFTER)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"epoch": 3}, "from epoch 4 to 3"),
        ({"epoch": 4}, "from epoch 4 to 4"),
        ({"pages": np.zeros((1, 2), np.int32)}, "columns"),
        ({"pages": np.array([[16, 0, 1]], np.int32)}, "does not have"),
        ({"pages": np.array([[0, -1, 1]], np.int32)}, "does not have"),
        ({"key_pages": np.array([[2, 1]], np.int32)}, "does not have"),
        ({"digest": 1}, "another view"),
        ({"table_id": 9}, "not here"),
    ],
)
def test_a_hostile_change_makes_no_view(fault: dict[str, object], message: str) -> None:
    change = change_between(BEFORE, AFTER)
    assert change is not None
    before = BEFORE.placement.owners.copy()
    with pytest.raises(InvalidRequest, match=message):
        changed([BEFORE], sent(replace(change, **fault)))  # type: ignore[arg-type]
    assert np.array_equal(BEFORE.placement.owners, before)


@pytest.mark.parametrize("owner", [7, -1])
def test_pages_go_to_shards_that_are_named(owner: int) -> None:
    owners = BEFORE.placement.owners.copy()
    owners[0, 0] = owner
    change = change_between(BEFORE, make_view(5, owners))
    with pytest.raises(InvalidRequest, match="does not name"):
        changed([BEFORE], sent(change))


def test_many_shards_are_told_one_change() -> None:
    changes = Changes(most=2)
    first = changes.between(BEFORE, AFTER)
    assert changes.between(BEFORE, AFTER) is first
    for epoch in (6, 7):
        changes.between(AFTER, make_view(epoch, BEFORE.placement.owners))
    assert changes.between(BEFORE, AFTER) is not first
    assert len(changes._found) == 2


def test_the_digest_is_the_same_on_every_machine() -> None:
    assert digest_of(BEFORE) == digest_of(replace(BEFORE, shards=BEFORE.shards[::-1]))
    assert f"{digest_of(BEFORE):016x}" == "df87e3a9479a0847"


@given(
    moves=st.lists(st.tuples(st.integers(0, 47), st.integers(0, 3)), min_size=1, max_size=12),
    asks=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12),
    most=st.integers(1, 4),
)
def test_who_knows_a_view_that_was_told_hears_what_is_other_and_nobody_hears_anything_else(
    moves: list[tuple[int, int]], asks: list[tuple[int, int]], most: int
) -> None:
    views = [BEFORE]
    for place, owner in moves:
        owners = views[-1].placement.owners.reshape(-1).copy()
        owners[place] = owner
        views.append(make_view(views[-1].placement.epoch + 1, owners))
    told = ToldViews(most=most)
    of_late: list[TableView] = []
    for has, now in asks:
        known, view = views[min(has, len(views) - 1)], views[min(now, len(views) - 1)]
        told.tell(view)
        of_late = [*(each for each in of_late if each is not view), view][-most:]
        change = told.change(known_view(known), view)
        kept = any(each is known for each in of_late)
        assert (change is not None) == (kept and known.placement.epoch <= view.placement.epoch)
        if change is not None:
            assert same(changed([known], sent(change)), view)
        if kept:
            of_late = [*(each for each in of_late if each is not known), known]


def test_of_views_that_were_told_a_bounded_number_of_owners_is_kept() -> None:
    per_view = BEFORE.placement.owners.size + BEFORE.placement.key_owners.size
    told = ToldViews(most_owners=3 * per_view)
    views = [make_view(epoch, BEFORE.placement.owners) for epoch in range(4, 9)]
    for view in views:
        told.tell(view)
    found = [told.change(known_view(view), views[-1]) is not None for view in views]
    assert found == [False, False, True, True, True]
    assert len(told._told) == 3
    ToldViews(most_owners=per_view - 1).tell(BEFORE)


def test_what_is_known_is_one_view_and_no_other_of_its_epoch() -> None:
    told = ToldViews()
    told.tell(BEFORE)
    told.tell(AFTER)
    other = make_view(4, [1, *BEFORE.placement.owners.reshape(-1)[1:]], (3, 3))
    assert told.change(known_view(other), AFTER) is None
    assert told.change(known_view(BEFORE), AFTER) is not None
