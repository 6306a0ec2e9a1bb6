"""What a controller does from what it hears, by values alone: newest views, pending tables, thaws."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.agreement.recovery import Attach, Confirm, Drop, Heard, Knowledge, Push, Thaws, learn_all, owed, thaws
from mempool.config import TableConfig, resolve
from mempool.types import Placement, SavedTable, ShardInfo, TableView

INFOS = tuple(ShardInfo(shard=shard, address="", incarnation=1) for shard in range(3))
ADOPTING = Knowledge(complete=False)


def view(table_id: int, *, name: str = "", epoch: int = 1, owners: tuple[int, ...] = (0, 1)) -> TableView:
    schema = resolve(TableConfig(name=name or f"t{table_id}", num_slots=128, page_slots=64, value_dim=4))
    placed = np.array([[owner] for owner in owners], dtype=np.int32)
    placement = Placement(table_id=table_id, epoch=epoch, owners=placed, key_owners=np.empty(0, dtype=np.int32))
    return TableView(schema=replace(schema, table_id=table_id), placement=placement, shards=INFOS)


def test_the_newest_view_of_a_table_is_the_pools() -> None:
    old, new = view(1), view(1, epoch=2, owners=(1, 1))
    known = learn_all(ADOPTING, [Heard(views=(old,)), Heard(views=(new,)), Heard()], everyone=True)
    assert known.complete
    assert known.views == {"t1": new}
    (push,) = owed(known, INFOS[0], Heard(views=(old,)))
    assert isinstance(push, Push)
    assert push.view is new
    assert owed(known, INFOS[1], Heard(views=(new,))) == []
    (attach,) = owed(known, INFOS[1], Heard())
    assert isinstance(attach, Attach)
    assert attach.mode == "lost"
    (attach,) = owed(known, INFOS[2], Heard())
    assert isinstance(attach, Attach)
    assert attach.mode == "empty"


def test_a_table_that_is_confirmed_nowhere_is_dropped_once_all_were_heard() -> None:
    heard = Heard(pending=frozenset({1}))
    some = learn_all(ADOPTING, [heard], everyone=False)
    assert owed(some, INFOS[0], heard) == [], "a silent shard may have it confirmed"
    assert not some.complete
    assert some.unmade == frozenset()
    everyone = learn_all(some, [heard, Heard(), Heard()], everyone=True)
    assert everyone.unmade == {1}, "it may be confirmed just now: who would be told that is asked"
    assert owed(everyone, INFOS[0], heard) == []


def test_a_table_that_is_confirmed_anywhere_is_confirmed_everywhere() -> None:
    made, pending = view(1), Heard(pending=frozenset({1}))
    known = learn_all(ADOPTING, [pending, Heard(views=(made,)), pending], everyone=True)
    (confirm,) = owed(known, INFOS[0], pending)
    assert isinstance(confirm, Confirm)
    assert confirm.view is made


@pytest.mark.parametrize("known", [ADOPTING, Knowledge(views={"t1": view(1)})])
def test_a_table_that_one_shard_was_told_to_drop_is_dropped_everywhere(known: Knowledge) -> None:
    told, missed = Heard(dropped=frozenset({1})), Heard(views=(view(1), view(2)))
    for heard in ([told, missed], [missed, told]):
        learned = learn_all(known, heard, everyone=True)
        assert "t1" not in learned.views
        assert Drop(1) in owed(learned, INFOS[1], missed)
        assert not any(
            isinstance(action, Attach) and action.view.schema.table_id == 1 for action in owed(learned, INFOS[0], told)
        )
    assert learn_all(known, [told, told], everyone=True).dropped == frozenset(), "nobody has it any more"


def test_a_table_that_this_controller_is_making_is_left_alone() -> None:
    known = Knowledge(views={"t1": view(1)}, making=frozenset({1}))
    heard = Heard(pending=frozenset({1}), frozen={1: "r"})
    known = learn_all(known, [heard] * 3, everyone=True)
    assert owed(known, INFOS[0], heard) == []
    assert owed(known, INFOS[1], Heard()) == []
    assert thaws(known, {0: heard}) == []


def test_what_somebody_else_makes_under_a_controller_that_knows_its_pool_is_ended() -> None:
    """It is of a controller before this one: its message was late."""
    known = learn_all(Knowledge(), [Heard(pending=frozenset({4}), views=(view(5),))], everyone=True)
    assert known.unmade == {4}, "made ones it leaves"
    assert not known.views


def test_what_somebody_else_has_made_is_confirmed_where_it_is_pending() -> None:
    pending = Heard(pending=frozenset({4}))
    known = learn_all(Knowledge(), [Heard(views=(view(4),)), pending], everyone=True)
    assert known.unmade == frozenset()
    assert known.complete
    (confirm,) = owed(known, INFOS[1], pending)
    assert isinstance(confirm, Confirm)


def test_other_tables_that_it_does_not_know_are_not_taken_over_with_it() -> None:
    """A shard that missed a drop has them still."""
    heard = Heard(views=(view(4, name="a"), view(5, name="b")))
    known = learn_all(Knowledge(), [heard, Heard(pending=frozenset({4}))], everyone=True)
    assert set(known.views) == {"a"}


def test_of_two_tables_of_one_name_the_later_lives() -> None:
    first, second = view(1, name="a"), view(2, name="a")
    for order in ((first, second), (second, first)):
        known = learn_all(ADOPTING, [Heard(views=(each,)) for each in order], everyone=True)
        assert known.views == {"a": second}
        assert owed(known, INFOS[0], Heard(views=(first,)))[0] == Drop(1)


def test_a_table_whose_name_another_one_has_by_now_is_dropped_where_that_was_missed() -> None:
    """Simulation, seed 5959: it had updates for nobody, and its pages, for as long as the shard lived."""
    second = view(2, name="a")
    hides = Heard(views=(second,), hidden=frozenset({1}))
    for known in (ADOPTING, Knowledge(views={"a": second}), Knowledge(views={"a": second}, dropped=frozenset({1}))):
        learned = learn_all(known, [hides, Heard(views=(second,))], everyone=True)
        assert learned.views == {"a": second}
        assert owed(learned, INFOS[0], hides) == [Drop(1)]
        assert owed(learned, INFOS[1], Heard(views=(second,))) == []


def test_what_is_frozen_anywhere_is_thawed_at_its_gate_first() -> None:
    table = view(1, epoch=3, owners=(1, 2))
    heard = {0: Heard(views=(table,)), 1: Heard(views=(table,)), 2: Heard(views=(table,), frozen={1: "r"})}
    known = learn_all(ADOPTING, heard.values(), everyone=True)
    assert thaws(known, heard) == [Thaws(table_id=1, tokens=("r",), epoch=3, gate=1, others=(0, 2))]
    heard[0] = replace(heard[0], frozen={1: "", 9: "of none"})
    assert thaws(known, heard)[0].tokens == ("", "r")
    assert thaws(known, {shard: replace(each, frozen={}) for shard, each in heard.items()}) == []


State = st.sampled_from(["absent", "pending", "made"])


@given(states=st.lists(State, min_size=3, max_size=3), silent=st.sets(st.integers(0, 2)))
@settings(max_examples=100, deadline=None)
def test_a_creation_that_was_cut_anywhere_ends_whole_or_not_at_all(states: list[str], silent: set[int]) -> None:
    table, now = view(1, owners=(0, 2)), dict(enumerate(states))
    if "made" in states:  # it is confirmed only once all have it
        now = {shard: "pending" if state == "absent" else state for shard, state in now.items()}
    known = ADOPTING
    for unheard in (silent, set[int]()):  # those who were silent are heard at last
        heard = {
            shard: Heard(
                views=(table,) if state == "made" else (),
                pending=frozenset({1}) if state == "pending" else frozenset(),
            )
            for shard, state in now.items()
            if shard not in unheard
        }
        known = learn_all(known, heard.values(), everyone=not unheard)
        known = replace(known, dropped=known.dropped | known.unmade)  # as the first shard does not refuse
        for shard, report in heard.items():
            for action in owed(known, INFOS[shard], report):
                assert not isinstance(action, Attach), "its pages would be lost"
                now[shard] = "absent" if isinstance(action, Drop) else "made"
    assert set(now.values()) == ({"made"} if "made" in states else {"absent"})


def saved(version: int, taken: int = 1) -> SavedTable:
    return SavedTable(url="/ckpt", checkpoint=f"00000{taken}-aa", table="t1", version=version, taken=taken)


def test_the_newest_checkpoint_that_any_shard_knows_is_told_to_all() -> None:
    plain, older, newer = (replace(view(1), saved=each) for each in (None, saved(3, 2), saved(7, 1)))
    known = learn_all(ADOPTING, [Heard(views=(each,)) for each in (older, newer, plain)], everyone=True)
    assert known.views["t1"].saved == saved(7, 1)
    assert owed(known, INFOS[1], Heard(views=(newer,))) == []
    for each in (older, plain):
        (push,) = owed(known, INFOS[0], Heard(views=(each,)))
        assert isinstance(push, Push)
        assert push.view.saved == saved(7, 1)
    moved = view(1, epoch=2, owners=(1, 1))  # told by a controller that knew of no checkpoint
    assert learn_all(known, [Heard(views=(moved,))], everyone=True).views["t1"].saved == saved(7, 1)


def test_shards_are_told_where_a_new_controller_is() -> None:
    known = Knowledge(views={"t1": replace(view(1), controller="new:1")})
    (push,) = owed(known, INFOS[0], Heard(views=(replace(view(1), controller="old:1"),)))
    assert isinstance(push, Push)
    assert owed(known, INFOS[0], Heard(views=(push.view,))) == []
