"""Rows kept by a client: bitwise what shards would answer at that moment, whoever changes the table; bounded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.client import Pool, Table
from mempool.client.gathers.hot_rows import HotRows
from mempool.client.routing.attempt import LookupRecord, Seen
from mempool.client.routing.plan import make_plan
from mempool.errors import InvalidRequest, NotFound
from mempool.types import Stamp
from mempool.types.bags import Bags
from tests.support.faulty import GRID, LAYOUTS, ROWS, FaultyPool

LR = 0.5
BYTES = 2**16


def read(table: Table, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return table.gather(ids.reshape(-1, 1))


def as_they_are(fake: FaultyPool, ids: Tensor) -> Tensor:
    return fake.values[ids.reshape(-1)].float()


def sent(fake: FaultyPool) -> int:
    """Ids in all gathers so far."""
    return sum(request.ids.numel() for shard in fake.shards for request in shard.requests("gather"))


def train(table: Table) -> None:
    table.gather(torch.arange(64).view(8, 8)).sin().sum().backward()
    table.commit(lr=LR)


@pytest.fixture
def opened(open_pool: Callable[..., Pool]) -> Callable[..., tuple[FaultyPool, Table, Table]]:
    """The same table of a client that keeps rows, and of another one."""

    def make(layout: str = "one") -> tuple[FaultyPool, Table, Table]:
        fake = FaultyPool(LAYOUTS[layout], num_shards=4)
        table, other = (open_pool(fake).table("facts") for _ in range(2))
        table.cache_bytes = BYTES
        return fake, table, other

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_sent_for_once_and_each_shard_confirms(opened, layout: str) -> None:  # type: ignore[no-untyped-def]
    fake, table, _ = opened(layout)
    ids = torch.tensor([3, 60, 9, 3, 3, 33, 60])
    assert torch.equal(read(table, ids), as_they_are(fake, ids))
    first, owners = sent(fake), len(fake.placement.shards)
    assert first <= 4 * owners, "ids that are named twice are sent once"
    assert torch.equal(read(table, ids), as_they_are(fake, ids))
    assert sent(fake) - first <= owners * owners, "one row for each shard that has to confirm"
    more = torch.tensor([3, 5, 60, 33])
    assert torch.equal(read(table, more), as_they_are(fake, more))
    status = table.cache
    assert status is not None
    assert status.rows == 5
    assert status.emptied == 0
    assert status.hits + status.misses == 18
    assert status.hit_rate == status.hits / 18 > 0.3


def test_each_shard_of_kept_rows_is_asked(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table, _ = opened("rows")
    every = torch.arange(64)
    read(table, every)
    calls = [len(shard.requests("gather")) for shard in fake.shards[:3]]
    read(table, torch.tensor([0, 9, 17]))  # of pages 0, 1, 2: of shards 0, 1, 2
    assert [len(shard.requests("gather")) for shard in fake.shards[:3]] == [number + 1 for number in calls]


def _write(fake: FaultyPool, table: Table, other: Table) -> None:  # noqa: ARG001
    other.write([3, 33], torch.ones(2, 12))


CHANGES: dict[str, Callable[[FaultyPool, Table, Table], Any]] = {
    "a commit": lambda _, table, __: train(table),
    "another client's commit": lambda _, __, other: train(other),
    "rows": lambda _, table, __: table.write([3], torch.ones(1, 12)),
    "another client's rows": _write,
    "another client's step": lambda _, __, other: other.set_step(5),
    "a restart": lambda fake, _, __: fake.shards[0].restart(),
    "a move": lambda fake, _, __: fake.move((ROWS + 1) % 4),
    "a move and a write": lambda fake, table, other: (fake.move((GRID + 1) % 4), _write(fake, table, other)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layout", ["one", "rows", "grid"])
def test_after_a_change_rows_are_the_new_ones(opened, change: str, layout: str) -> None:  # type: ignore[no-untyped-def]
    fake, table, other = opened(layout)
    ids = torch.tensor([3, 60, 33])
    for _ in range(2):
        read(table, ids)
    CHANGES[change](fake, table, other)
    for _ in range(2):
        assert torch.equal(read(table, ids), as_they_are(fake, ids))


def test_a_table_that_is_reopened_begins_with_no_rows(open_pool: Callable[..., Pool]) -> None:
    fake = FaultyPool(LAYOUTS["one"])
    pool = open_pool(fake)
    table = pool.table("facts")
    table.cache_bytes = BYTES
    ids = torch.tensor([3, 60, 33])
    read(table, ids)
    fake.drop_and_remake()
    with pytest.raises(NotFound, match="made again"):
        read(table, ids)
    pool.reopen("facts")
    open_pool(fake).table("facts").write(ids, torch.ones(3, 12))
    assert table.cache is not None
    assert table.cache_bytes == BYTES
    assert table.cache.rows == 0
    assert torch.equal(read(table, ids), torch.ones(3, 12))


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(("read", "read", "commit", "other", "write", "restart", "move")), st.integers(0, 3)),
        max_size=20,
    ),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_order_rows_are_those_of_the_shards(opened, moves: list[tuple[str, int]], layout: str) -> None:  # type: ignore[no-untyped-def]
    fake, table, other = opened(layout)
    for move, number in moves:
        if move == "read":
            ids = (torch.rand(9, generator=torch.Generator().manual_seed(number)) ** 3 * 64).long()
            assert torch.equal(read(table, ids), as_they_are(fake, ids))
        elif move == "commit":
            train(table)
        elif move == "other":
            train(other)
        elif move == "write":
            other.write([number], torch.full((1, 12), float(number)))
        elif move == "restart":
            fake.shards[number].restart()
        else:
            fake.move((np.array(fake.placement.owners) + 1) % 4)


def test_rows_that_come_once_displace_none_that_come_often(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table, _ = opened()
    table.cache_bytes = 16 * (4 * 12 + 9)
    hot = torch.arange(4)
    for first in range(4, 60, 4):
        read(table, hot)
        read(table, torch.arange(first, first + 4))
        assert table.cache is not None
        assert table.cache.rows <= 16
    before = sent(fake)
    read(table, torch.cat([hot, torch.tensor([63])]))
    assert sent(fake) - before == 1


def test_what_is_trained_goes_to_the_shards_and_backward_passes_of_kept_rows_are_right(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table, _other = opened("columns")
    ids = torch.tensor([[3], [60], [3]])
    for _ in range(2):
        read(table, ids)
    before, was = len(fake.shards[0].requests("gather")), table.cache
    table.gather(ids)
    assert fake.shards[0].requests("gather")[before].remember
    assert table.cache == was
    values = fake.values
    table.gather(ids, remember=False).sum().backward()
    table.commit(lr=LR)
    expected = values.clone()
    expected[3] -= 2 * LR
    expected[60] -= LR
    torch.testing.assert_close(fake.values, expected)
    assert torch.equal(read(table, ids), as_they_are(fake, ids))


def test_other_bags_are_left_to_the_shards(opened) -> None:  # type: ignore[no-untyped-def]
    fake, table, other = opened()
    ids, offsets = torch.tensor([3, 60, 3]), torch.tensor([0, 1, 1, 3])
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(table.gather(ids, offsets=offsets), other.gather(ids, offsets=offsets))
            table.gather(ids.view(-1, 1), torch.ones(3, 1))
            table.gather(ids[:0], offsets=torch.zeros(3, dtype=torch.int64))
        assert table.cache is not None
        assert table.cache.hits == table.cache.misses == 0
        for _ in range(2):
            padded = table.gather(torch.tensor([[3], [0], [60]]), padding_idx=0)
            assert torch.equal(padded, torch.stack([fake.values[3], torch.zeros(12), fake.values[60]]).float())
        assert table.cache.hits == 1


@pytest.mark.parametrize("cache_bytes", [-1, 1.5, True, "1 MiB", 8 * (4 * 12 + 9) - 1])
def test_a_bound_that_is_none_changes_nothing(opened, cache_bytes: object) -> None:  # type: ignore[no-untyped-def]
    _, table, other = opened()
    with pytest.raises(InvalidRequest, match="cache_bytes"):
        table.cache_bytes = cache_bytes
    assert table.cache_bytes == BYTES
    assert other.cache is None
    assert other.cache_bytes == 0
    table.cache_bytes = 0
    assert table.cache is None


class Scripted:
    """Answers rows of its own version, stamped as it is told."""

    def __init__(self, fake: FaultyPool) -> None:
        self.plan = make_plan(fake.view)
        self.rows = HotRows(num_bytes=BYTES, num_slots=64, value_dim=12, table="facts")
        self.stamps: list[tuple[int, int]] = [(1, 1)]
        self.version = 1
        self.asked: list[int] = []

    def ask(self, bags: Bags) -> tuple[Tensor, LookupRecord]:
        self.asked.append(bags.num_pairs)
        stamps = tuple(
            Stamp(shard=0, incarnation=1, epoch=1, table_version=version, writes=writes)
            for version, writes in self.stamps
        )
        record = LookupRecord(
            table_id=1,
            lookup_id=1,
            lookups=1,
            bags=bags,
            seen=Seen(epoch=1, oldest_version=self.version, newest_version=self.version),
            remembered_by=frozenset(),
            stamps=stamps,
        )
        return bags.ids[:, None].repeat(1, 12) + 100.0 * self.version, record

    def gather(self, *ids: int, known_version: int = 0) -> Tensor:
        bags = Bags(ids=torch.tensor(ids), weights=None, offsets=torch.arange(len(ids) + 1))
        answer = self.rows.gather(
            bags, plan=self.plan, known_version=known_version, reply_dtype="float32", ask=self.ask
        )
        assert answer is not None
        assert answer[1].bags is bags
        return (answer[0][:, 0] - torch.tensor(ids)) / 100


@pytest.fixture
def scripted() -> Scripted:
    return Scripted(FaultyPool(LAYOUTS["one"]))


def test_what_a_shard_does_not_confirm_is_asked_for_anew_at_once(scripted: Scripted) -> None:
    assert scripted.gather(1, 2, 3).tolist() == [1, 1, 1]
    scripted.stamps, scripted.version = [(2, 1)], 2
    assert scripted.gather(1, 2, 3, 4).tolist() == [2, 2, 2, 2]
    assert scripted.asked == [3, 1, 4]
    assert scripted.gather(1, 2, 5).tolist() == [2, 2, 2]
    assert scripted.asked == [3, 1, 4, 1]
    assert scripted.rows.status.emptied == 1


def test_a_version_that_is_known_to_be_newer_costs_no_call(scripted: Scripted) -> None:
    scripted.gather(1, 2, 3)
    scripted.stamps, scripted.version = [(2, 1)], 2
    assert scripted.gather(1, 2, 3, known_version=2).tolist() == [2, 2, 2]
    assert scripted.asked == [3, 3]


@pytest.mark.parametrize("stamps", [[(1, 0)], [(1, 1), (2, 1)], [(1, 1), (1, 2)], []])
def test_of_answers_that_do_not_say_what_they_are_of_nothing_is_kept(scripted: Scripted, stamps: list[Any]) -> None:
    scripted.stamps = stamps
    for _ in range(2):
        scripted.gather(1, 2)
    assert scripted.asked == [2, 2]
    scripted.stamps = [(1, 1)]
    scripted.gather(1, 2)
    scripted.stamps = stamps
    scripted.gather(1, 2)
    assert scripted.asked == [2, 2, 2, 1, 2]


def test_an_answer_that_a_newer_one_has_overtaken_is_not_kept(scripted: Scripted) -> None:
    ask = scripted.ask

    def overtaken(bags: Bags) -> tuple[Tensor, LookupRecord]:
        answer = ask(bags)
        scripted.ask = ask  # type: ignore[method-assign]
        scripted.stamps, scripted.version = [(1, 2)], 2
        scripted.gather(1)
        return answer

    scripted.ask = overtaken  # type: ignore[method-assign]
    assert scripted.gather(1, 2, 3).tolist() == [1, 1, 1]
    assert scripted.rows.status.rows == 1
    assert scripted.gather(1, 2, 3).tolist() == [2, 2, 2]


class Interrupted:
    """Memory of rows while a user presses Ctrl-C."""

    def __setitem__(self, *_: object) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_while_rows_are_placed_leaves_no_row_under_anothers_id(scripted: Scripted) -> None:
    rows = scripted.rows
    scripted.gather(*range(30))
    scripted.stamps, scripted.version = [(1, 2)], 2
    scripted.gather(*range(30))
    memory, rows._rows = rows._rows, Interrupted()  # type: ignore[assignment]
    index_select = torch.index_select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "index_select", lambda _, *arguments: index_select(memory, *arguments))
        with pytest.raises(KeyboardInterrupt):
            scripted.gather(*range(60))
    rows._rows = memory
    assert scripted.gather(*range(60)).tolist() == [2] * 60


def test_a_handler_that_has_interrupted_it_asks_the_shards(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, place, inside = scripted.rows, scripted.rows._place, []

    def interrupted(*arguments: Any) -> None:
        bags = Bags(ids=torch.tensor([1]), weights=None, offsets=torch.arange(2))
        inside.append(rows.gather(bags, plan=scripted.plan, known_version=0, reply_dtype="float32", ask=scripted.ask))
        place(*arguments)

    monkeypatch.setattr(rows, "_place", interrupted)
    assert scripted.gather(1, 2).tolist() == [1, 1]
    assert inside == [None]
    assert scripted.gather(1, 2).tolist() == [1, 1]
    assert scripted.asked == [2, 1]
