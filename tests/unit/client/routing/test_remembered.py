"""What shards remember for a client, and what they are told to forget."""

import torch

from mempool.client.routing.attempt import LookupRecord, Seen
from mempool.client.routing.remembered import Remembered
from mempool.types.bags import Bags

BAGS = Bags(ids=torch.tensor([0]), weights=None, offsets=torch.tensor([0, 1]))


def record(lookup_id: int, *shards: int, table_id: int = 1) -> LookupRecord:
    return LookupRecord(
        table_id=table_id,
        lookup_id=lookup_id,
        lookups=1,
        bags=BAGS,
        seen=Seen(epoch=1, oldest_version=0, newest_version=0),
        remembered_by=frozenset((shard, 7) for shard in shards),
    )


def test_a_shard_remembers_until_all_its_lookups_are_released() -> None:
    remembered = Remembered()
    first, second = record(1, 0, 1), record(2, 1)
    remembered.add(first)
    remembered.add(second)
    remembered.add(record(3))
    assert remembered.shards() == {1: {0, 1}}
    remembered.release(first)()
    assert remembered.shards() == {1: {1}}
    remembered.release(second)()
    assert remembered.shards() == {}
    # Each is told once, and shards that are told nothing have nothing waiting.
    assert [remembered.take(1, shard) for shard in (0, 1, 1, 2)] == [(1,), (1, 2), (), ()]


def test_a_gather_tells_so_many_at_once() -> None:
    remembered = Remembered()
    for number in range(1_500):
        remembered.add(record(number, 0))
        remembered.release(record(number, 0))()
    assert len(remembered.take(1, 0)) == 1_024
    assert len(remembered.take(1, 0)) == 476


def test_shards_that_left_and_tables_that_were_dropped_are_forgotten() -> None:
    remembered = Remembered()
    for table_id in (1, 2):
        for lookup_id in (1, 2):
            remembered.add(record(lookup_id, 0, 1, table_id=table_id))
        remembered.release(record(1, 0, 1, table_id=table_id))()
    remembered.left(1, [0])
    assert remembered.shards() == {1: {1}, 2: {0, 1}}
    remembered.forget(2)
    remembered.release(record(2, 0, 1, table_id=2))()
    assert remembered.shards() == {1: {1}}
    assert set(remembered.waiting()) <= {(1, 1)}
