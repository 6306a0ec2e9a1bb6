"""Pairs in canonical order: found once for shards that hold the same bags, each with rows of its own."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from mempool import kernels
from mempool.kernels import SortedPairs
from mempool.shard.pages.storage import Storage
from mempool.shard.steps.canonical import Canonical
from mempool.shard.steps.held import HeldUpdate
from mempool.types import Placement
from mempool.types.bags import Bags
from tests.contract.bags import make_bags
from tests.contract.driver import make_schema

NUM_SLOTS, PAGE_SLOTS = 50, 8
NUM_PAGES = -(-NUM_SLOTS // PAGE_SLOTS)


def _update(ids: list[int], lengths: list[int], weights: list[float] | None = None, start: float = 0.0) -> HeldUpdate:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    grads = torch.arange(2.0 * len(lengths)).view(-1, 2) + start
    return HeldUpdate(Bags(torch.tensor(ids), torch.tensor(weights) if weights else None, offsets), grads)


def _of_columns(columns: slice, update: HeldUpdate) -> HeldUpdate:
    """As another shard holds it."""
    return HeldUpdate(update.bags, update.grads[:, columns].contiguous())


def _grads(updates: list[HeldUpdate]) -> list[Tensor]:
    return [update.grads for update in updates]


def _table(shard: int, pages: list[int]) -> Storage:
    """With some of the row pages, of one of three column blocks, in an order of its own."""
    schema = make_schema(num_slots=NUM_SLOTS, page_slots=PAGE_SLOTS)
    table = Storage(schema, shard=shard, device=torch.device("cpu"))
    owners = np.full((NUM_PAGES, schema.num_blocks), 9, dtype=np.int32)
    owners[pages, shard] = shard
    placement = Placement(table_id=0, epoch=1, owners=owners, key_owners=np.empty(0, dtype=np.int32))
    for row_page in pages[::-1] if shard else pages:
        arena = table.arena((shard,))
        arena.publish(np.array([row_page]), arena.take(1))
    table.own(placement)
    return table


@contextmanager
def _sorts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pairs are sorted, each time that any are."""
    sort, found = kernels.sort_pairs, []

    def counted(paged: kernels.Paged, ids: Tensor) -> SortedPairs:
        found.append(ids.shape[0])
        return sort(paged, ids)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "sort_pairs", counted)
        yield found


def _assert_sorted(found: SortedPairs, table: Storage, ids: Tensor) -> None:
    expected = kernels.sort_pairs(table.lanes[0].arena.paged(), ids)
    for name in ("order", "rows", "slots", "starts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_pairs_come_in_order_of_sequence_bag_and_pair() -> None:
    updates = [_update([4, 5, 6], [1, 0, 2]), _update([7, 8], [2], [0.5, -1.0], start=100.0)]
    pairs = Canonical.of(updates).pairs(_grads(updates))
    assert pairs.ids.tolist() == [4, 5, 6, 7, 8]
    assert pairs.weights is not None
    assert pairs.weights.tolist() == [1.0, 1.0, 1.0, 0.5, -1.0]
    assert pairs.bags.tolist() == [0, 2, 2, 3, 3]
    assert pairs.grads.tolist() == [[0, 1], [2, 3], [4, 5], [100, 101]]


def test_without_any_weights_there_are_none() -> None:
    updates = [_update([1], [1]), _update([2], [1])]
    assert Canonical.of(updates).pairs(_grads(updates)).weights is None


@pytest.mark.parametrize("num_updates", [1, 3])
def test_shards_with_the_same_bags_sort_once(num_updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [
        HeldUpdate(make_bags(seed, num_slots=NUM_SLOTS, lengths=(40, 0, 30)), torch.rand(3, 6))
        for seed in range(num_updates)
    ]
    tables = [_table(shard, list(range(NUM_PAGES))) for shard in (0, 1)]
    kept, found = [], []
    with _sorts(monkeypatch) as sorts:
        for shard, table in enumerate(tables):
            mine = [_of_columns(slice(3 * shard, 3 * shard + 3), update) for update in updates]
            kept.append(Canonical.of(mine))
            pairs = kept[-1].pairs(_grads(mine))
            assert torch.equal(pairs.grads, torch.cat(_grads(mine)))
            found.append((kept[-1].in_order(table.lanes[0].arena), table, pairs.ids))
        assert sorts == [70 * num_updates]
    assert kept[0] is kept[1]
    assert not torch.equal(found[0][0].rows, found[1][0].rows), "each arena has rows of its own"
    for in_order, table, ids in found:
        _assert_sorted(in_order, table, ids)


def test_a_shard_without_some_of_the_pages_sorts_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes first."""
    for lacking in (0, 1):
        update = HeldUpdate(make_bags(1, num_slots=NUM_SLOTS, lengths=(40, 0, 30)), torch.rand(3, 6))
        tables = [_table(shard, list(range(shard == lacking, NUM_PAGES))) for shard in (0, 1)]
        canonical = Canonical.of([update])
        with _sorts(monkeypatch) as sorts:
            found = [canonical.in_order(table.lanes[0].arena) for table in tables]
            assert len(sorts) == 2
        for in_order, table in zip(found, tables, strict=True):
            _assert_sorted(in_order, table, update.bags.ids)
        assert found[lacking].order.shape[0] < found[1 - lacking].order.shape[0]


def test_rows_are_those_where_pages_lie_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    update = HeldUpdate(make_bags(1, num_slots=NUM_SLOTS, lengths=(40, 0, 30)), torch.rand(3, 6))
    tables = [_table(0, list(range(NUM_PAGES))), _table(0, list(range(NUM_PAGES))[::-1])]
    canonical = Canonical.of([update])
    with _sorts(monkeypatch) as sorts:
        first, moved = (canonical.in_order(table.lanes[0].arena) for table in tables)
        assert len(sorts) == 1
    assert not torch.equal(first.rows, moved.rows)
    _assert_sorted(moved, tables[1], update.bags.ids)


def test_other_bags_are_another_order_and_nothing_is_kept_that_nobody_has() -> None:
    one, other = _update([4, 5, 6], [1, 2]), _update([4, 5, 6], [1, 2])
    both = Canonical.of([one, other])
    assert Canonical.of([one, other]) is both
    assert Canonical.of([one]) is not both
    alone = Canonical.of([one])
    assert alone.pairs(_grads([one])).ids.tolist() == [4, 5, 6]
    gc.disable()
    try:
        del both, alone
        known = list(one.bags.made.values())
        assert len(known) == 1
        assert known[0]() is None, "only those who commit keep it"
    finally:
        gc.enable()
