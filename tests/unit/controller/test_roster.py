"""The controller's memory as events alone: what is news, and what is not."""

import time
from dataclasses import replace

import numpy as np
import pytest

from mempool.config import TableConfig, resolve
from mempool.controller.roster import Roster
from mempool.errors import NotFound, ShardUnavailable
from mempool.types import Placement, ShardInfo, TableView


def info(shard: int, incarnation: int = 1) -> ShardInfo:
    return ShardInfo(shard=shard, address=f"host:{shard}", incarnation=incarnation)


def view(
    table_id: int, *, name: str = "a", epoch: int = 1, owner: int = 0, shards: tuple[ShardInfo, ...] = ()
) -> TableView:
    schema = replace(resolve(TableConfig(name=name, num_slots=32, value_dim=4)), table_id=table_id)
    owners = np.full((schema.num_row_pages, 1), owner, dtype=np.int32)
    placement = Placement(table_id=table_id, epoch=epoch, owners=owners, key_owners=np.empty(0, dtype=np.int32))
    return TableView(schema=schema, placement=placement, shards=shards)


def made(*views: TableView) -> Roster:
    roster = Roster()
    roster.set_shards([info(0), info(1)])
    for each in views:
        roster.put(each.schema, each.placement)
    return roster


def test_views_name_the_shards_as_they_are_now() -> None:
    roster = made(view(1))
    roster.set_shards([info(1, 5), info(2)])
    assert roster.view("a").shards == (info(0), info(1, 5), info(2))
    roster.remove_shards([1, 9])
    assert roster.view("a").shards == (info(0), info(2))
    assert roster.infos == (info(0), info(2))


def test_a_higher_epoch_is_news_and_a_lower_one_is_not() -> None:
    roster = made(view(1, epoch=3))
    roster.hear(view(1, epoch=2, owner=1))
    assert roster.view("a").placement.epoch == 3
    roster.hear(view(1, epoch=4, owner=1))
    assert (roster.view("a").placement.epoch, roster.owners) == (4, {1})


def test_unknown_tables_are_news_only_after_an_adoption() -> None:
    roster = made()
    roster.hear(view(1))
    assert roster.views == ()
    roster.complete = False
    roster.hear(view(1))
    assert roster.names == {"a"}


def test_of_two_tables_of_a_name_the_later_one_lives() -> None:
    for ids in ((5, 9), (9, 5)):
        roster = made()
        roster.complete = False
        for table_id in ids:
            roster.hear(view(table_id))
        assert roster.view("a").schema.table_id == 9
        assert roster.dropped == {5}


def test_what_is_dropped_or_being_made_is_no_news() -> None:
    roster = made(view(3))
    roster.complete = False
    roster.forget(view(3).schema.table_id)
    roster.hear(view(3, epoch=9))
    roster.unfinished.add(4)
    roster.hear(view(4, name="b"))
    assert roster.views == ()
    assert roster.dropped == {3}


def test_an_id_that_no_controller_can_have_drawn_takes_none_from_those_to_come() -> None:
    roster = Roster(wall_clock=lambda: 5.0)
    roster.hear_ids([2**64 - 1])
    roster.forget(2**64 - 1)
    assert roster.new_table_id() == 5000


def test_ids_ascend_whatever_the_clock_says() -> None:
    ahead = int(1000 * time.time()) + 24 * 3600 * 1000
    roster = made(view(ahead))
    first = roster.new_table_id()
    assert first == ahead + 1
    assert roster.new_table_id() == first + 1


def test_the_highest_incarnation_is_remembered_from_views_and_shards() -> None:
    roster = made()
    assert roster.highest_incarnation == 1
    roster.set_shards([info(0, 7)])
    roster.remove_shards([0])
    assert roster.highest_incarnation == 7
    roster.hear(view(1, shards=(info(5, 2**50),)))  # even where the table itself is no news
    assert roster.highest_incarnation == 2**50


def test_a_message_names_a_few_tables_and_cuts_what_was_asked_for() -> None:
    roster = made(*(view(number, name=f"t{number:03}") for number in range(1, 500)))
    with pytest.raises(NotFound) as caught:
        roster.view("x" * 10**6)
    assert len(str(caught.value)) < 500
    assert str(caught.value).endswith("t020, and 479 more")


def test_where_it_is_not_known_whether_there_is_a_table_the_shard_that_is_late_is_named() -> None:
    roster = made()
    roster.doubt()
    roster.unheard = (1,)
    with pytest.raises(ShardUnavailable, match="shard 1 has not said what it has") as told:
        roster.view("a")
    assert told.value.shard == 1
