"""Prefetched gathers: taken once by a gather of the same ids, bitwise what shards would answer then; never stale."""

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.client import Pool, Table
from mempool.client.gathers.prefetched import Prefetched
from mempool.errors import InvalidRequest
from mempool.types.bags import Bags
from tests.support.faulty import LAYOUTS, Fault, FaultyPool
from tests.support.waiting import HeldBack, until

LR = 0.5


@pytest.fixture
def open_table(open_pool: Callable[..., Pool]) -> Callable[..., tuple[FaultyPool, Table]]:
    def make(layout: str = "one") -> tuple[FaultyPool, Table]:
        fake = FaultyPool(LAYOUTS[layout])
        return fake, open_pool(fake).table("facts")

    return make


def make_ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (5, 3), generator=torch.Generator().manual_seed(seed))


def asked(fake: FaultyPool) -> int:
    return len(fake.shards[0].requests("gather"))


def test_a_gather_takes_what_was_fetched_for_the_same_ids_once(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    expected = table.gather(make_ids())
    assert table.prefetch(make_ids())
    until(lambda: asked(fake) == 2)
    pooled = table.gather(make_ids())
    assert torch.equal(pooled, expected)
    assert asked(fake) == 2
    table.gather(make_ids())
    table.gather(make_ids(1))
    assert asked(fake) == 4
    assert table.link.prefetched.num_bytes == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_micro_batches_is_that_without_prefetching(open_table, layout: str) -> None:  # type: ignore[no-untyped-def]
    found = []
    for ahead in (True, False):
        fake, table = open_table(layout)
        pooled = []
        for step in range(2):
            batches = [make_ids(10 * step + number) for number in range(4)]
            if ahead:
                assert all(table.prefetch(ids) for ids in batches)
            for ids in batches:
                pooled.append(table.gather(ids))
                pooled[-1].sin().sum().backward()
            assert table.pending == 4
            table.commit(lr=LR)
        if ahead:
            assert all(request.ids is None for request in fake.shards[0].requests("update")), "it remembers them"
            assert asked(fake) == 8
        found.append([*pooled, fake.values])
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


CHANGES: dict[str, Callable[[Table], Any]] = {
    "a commit": lambda table: (table.gather(make_ids(7)).sum().backward(), table.commit(lr=LR)),
    "rows": lambda table: table.write([3], torch.ones(1, 12)),
    "the step": lambda table: table.set_step(5),
    "the wire's dtype": lambda table: setattr(table, "wire_dtype", "bfloat16"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("answered", [True, False])
def test_what_was_read_before_a_change_is_not_used(open_table, change: str, answered: bool) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    table.gather(make_ids())
    if answered:
        table.prefetch(make_ids())
        until(lambda: all(fetch.pending.done() for fetch in table.link.prefetched._fetches))
        CHANGES[change](table)
    else:
        host, held = fake.shards[0].host, HeldBack(fake.shards[0], "gather")
        table.prefetch(make_ids())
        until(lambda: held.arrived == 1)
        fake.shards[0].host = host
        CHANGES[change](table)
        held.let_go()
    before = asked(fake)
    pooled = table.gather(make_ids())
    assert torch.equal(pooled, table.gather(make_ids()))
    assert asked(fake) - before in ((2,) if answered else (1, 2))  # read after the change, it counts


def test_another_clients_commit_counts_as_soon_as_it_is_known(open_pool: Callable[..., Pool]) -> None:
    fake = FaultyPool(LAYOUTS["one"])
    table, other = (open_pool(fake).table("facts") for _ in range(2))
    assert isinstance(table, Table)
    table.prefetch(make_ids())
    other.gather(make_ids()).sum().backward()
    other.commit(lr=LR)
    table.gather(make_ids(1))  # tells of the newer version
    assert torch.equal(table.gather(make_ids()), other.gather(make_ids()))


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(("prefetch", "gather", "train", "commit", "write", "other")), st.integers(0, 3)),
        max_size=20,
    )
)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_gather_is_ever_older_than_what_its_client_knows(open_pool, moves: list[tuple[str, int]]) -> None:  # type: ignore[no-untyped-def]
    fake = FaultyPool(LAYOUTS["columns"])
    table, other = (open_pool(fake).table("facts") for _ in range(2))
    versions = {table._session.known_version or 0: fake.values}
    for move, number in moves:
        ids = make_ids(number)
        if move == "prefetch":
            table.prefetch(ids)
        elif move in ("gather", "train"):
            pooled = table.gather(ids)
            newest = versions[table._session.known_version or 0]
            torch.testing.assert_close(pooled.double(), newest[ids].sum(1), rtol=1e-5, atol=1e-5)
            if move == "train":
                pooled.sum().backward()
        elif move == "write":
            table.write([number], torch.full((1, 12), float(number)))
            versions[max(versions)] = fake.values
        else:
            committer = table if move == "commit" else other
            committer.gather(ids).sum().backward()
            committer.commit(lr=LR)
            versions[committer._session.known_version] = fake.values
        versions[max(versions)] = fake.values


def test_what_is_kept_is_bounded(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    table.link.prefetched = Prefetched(max_bytes=900)  # each is 60 of ids, 48 of offsets, 240 of values
    assert [table.prefetch(make_ids(number)) for number in range(4)] == [True, True, False, False]
    assert table.link.prefetched.num_bytes == 696
    table.gather(make_ids(0))
    assert table.prefetch(make_ids(2))
    table.gather(make_ids(8)).sum().backward()
    table.commit(lr=LR)
    until(lambda: all(fetch.pending.done() for fetch in table.link.prefetched._fetches))
    assert table.prefetch(make_ids(3))  # what counts no more makes room
    assert table.link.prefetched.num_bytes == 348
    assert torch.equal(table.gather(make_ids(1)), table.gather(make_ids(1)))
    assert fake.shards[0].table.version == 1


@pytest.mark.parametrize("how", ["changed", "taken", "taken without gradients", "table gone"])
def test_nothing_is_remembered_of_what_is_gone(open_table, how: str) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    table.prefetch(make_ids())
    until(lambda: fake.shards[0].context_bytes > 0)
    if how == "changed":
        table.write([1], torch.ones(1, 12))
    elif how == "table gone":
        table.link.prefetched.drop()
    elif how == "taken":
        pooled = table.gather(make_ids())
        table.gather(make_ids(1), remember=False)
        assert fake.shards[0].context_bytes > 0
        pooled.sum().backward()
        del pooled
    else:
        with torch.no_grad():
            table.gather(make_ids())
    gc.collect()
    table.gather(make_ids(1), remember=False)
    assert fake.shards[0].context_bytes == 0


def test_a_fetch_that_fails_is_asked_for_anew_and_tells_in_its_own_words(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    fake.shards[0].faults["gather"] = [Fault.DATA_LOSS]
    assert table.prefetch(make_ids())
    until(lambda: all(fetch.pending.done() for fetch in table.link.prefetched._fetches))
    assert table.gather(make_ids()).shape == (5, 12)


def test_sums_with_weights_are_the_shards(open_table) -> None:  # type: ignore[no-untyped-def]
    """The order and rounding of a weighted sum are the shard's kernel's."""
    fake, table = open_table()
    table.prefetch(make_ids())
    table.gather(make_ids(), torch.ones(5, 3))
    assert asked(fake) == 2
    table.gather(make_ids())
    assert asked(fake) == 2


def test_offsets_and_padding_are_part_of_what_is_asked(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    ids = torch.tensor([1, 2, 3, 0])
    first, second = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 4])
    table.prefetch(ids, offsets=first)
    table.prefetch(ids, offsets=first, padding_idx=0)
    other = table.gather(ids, offsets=second)
    assert asked(fake) == 3
    whole, less = table.gather(ids, offsets=first), table.gather(ids, offsets=first, padding_idx=0)
    assert asked(fake) == 3
    rows = table.rows([0, 1, 2, 3])
    for pooled, expected in (
        (other, [rows[1], rows[2] + rows[3] + rows[0]]),
        (whole, [rows[1] + rows[2], rows[3] + rows[0]]),
        (less, [rows[1] + rows[2], rows[3]]),
    ):
        torch.testing.assert_close(pooled, torch.stack(expected))


def test_mistakes_are_told_at_once(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    with pytest.raises(InvalidRequest, match="is outside table 'facts'"):
        table.prefetch(torch.full((2, 2), 64))
    assert table.prefetch(torch.zeros(0, 3, dtype=torch.int64))
    assert not fake.shards[0].calls


def test_a_closed_pool_is_told_of(open_pool: Callable[..., Pool]) -> None:
    pool = open_pool(FaultyPool(LAYOUTS["one"]))
    table = pool.table("facts")
    pool.close()
    with pytest.raises(InvalidRequest, match="is closed"):
        table.prefetch(make_ids())
    assert table.link.prefetched.num_bytes == 0


def test_the_version_is_asked_of_the_shards(open_table) -> None:  # type: ignore[no-untyped-def]
    fake, table = open_table()
    first = torch.zeros(1, 1, dtype=torch.int64)
    table.prefetch(first)
    assert table.link.version() == 0
    assert asked(fake) == 2


class Scripted:
    """A gather that was begun, during whose wait something happens; read at version 0."""

    lease = None

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._meanwhile = meanwhile

    def done(self) -> bool:
        return False

    def result(self) -> tuple[Tensor, Any]:
        self._meanwhile()
        return torch.ones(5, 12), SimpleNamespace(seen=SimpleNamespace(oldest_version=0, newest_version=0))

    answered = result

    def hand_over(self) -> None:
        pass


@pytest.mark.parametrize("written", ["never", "while it is asked for", "while it is waited for"])
def test_rows_that_are_written_meanwhile_by_another_thread(written: str) -> None:
    fetched = Prefetched()
    flat = make_ids().flatten()
    bags = Bags(ids=flat, weights=None, offsets=torch.arange(6) * 3)

    def write() -> None:
        with fetched.writing():
            assert not fetched.start([(bags, 1)], version=0, commits=0, reply_dtype="float32", ask=lambda: [Scripted()])

    def ask() -> Scripted:
        if written == "while it is asked for":
            write()
        return Scripted(write if written == "while it is waited for" else lambda: None)

    assert fetched.start([(bags, 1)], version=0, commits=0, reply_dtype="float32", ask=lambda: [ask()])
    found = fetched.take(bags, known_version=lambda: 0, commits=0, reply_dtype="float32")
    assert (found is not None) == (written == "never")
    assert fetched.num_bytes == 0


@pytest.mark.parametrize("commits", [0, 1])
def test_what_was_read_before_a_step_counts_no_more_though_its_version_is_not_known_yet(commits: int) -> None:
    """Where another shard numbers the table's steps than decides them, the trainer hears of the version later."""
    fetched = Prefetched()
    bags = Bags(ids=make_ids().flatten(), weights=None, offsets=torch.arange(6) * 3)
    assert fetched.start([(bags, 1)], version=0, commits=0, reply_dtype="float32", ask=lambda: [Scripted()])
    found = fetched.take(bags, known_version=lambda: 0, commits=commits, reply_dtype="float32")
    assert (found is not None) == (commits == 0)
    assert fetched.num_bytes == 0
