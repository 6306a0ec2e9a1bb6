"""Calls on the caller's own thread: the router's answers, or the router is asked; nothing that was begun is left."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mempool
from mempool import errors
from mempool.agreement.book import Book
from mempool.client.direct.asking import Asking
from mempool.client.direct.gathers import gather_directly
from mempool.client.routing.attempt import SortedPairs
from mempool.client.routing.router import Router
from mempool.types import AtOnceShard, ShardInfo
from mempool.types.bags import Bags
from mempool.wire.channels.loop import io_loop, run

IDS = torch.tensor([[1, 40, 2], [60, 3, 33]])
BAGS = Bags(ids=IDS.reshape(-1), weights=torch.rand(6), offsets=torch.tensor([0, 3, 6]))


class Shy:
    """A way to shards that some of them do not take.

    Attributes:
        silent: Shards that cannot be asked; mute: that do not answer.
        asked: Those that were, in order.
    """

    def __init__(self, dial: Callable[[ShardInfo], AtOnceShard | None]) -> None:
        self._dial = dial
        self.silent: set[int] = set()
        self.mute: set[int] = set()
        self.asked: list[int] = []

    def __call__(self, info: ShardInfo) -> Any:
        shard = self._dial(info)
        assert shard is not None
        return None if info.shard in self.silent else _Asked(self, info.shard, shard)


class _Asked:
    def __init__(self, shy: Shy, number: int, shard: AtOnceShard) -> None:
        self._shy, self._number, self._shard = shy, number, shard

    def begin_gather(self, request: Any, **options: Any) -> Any:
        self._shy.asked.append(self._number)
        wait = self._shard.begin_gather(request, **options)
        assert wait is not None

        def waited() -> Any:
            reply = wait()
            if self._number in self._shy.mute:
                raise errors.ShardUnavailable("it says nothing")
            return reply

        return waited

    def begin_update(self, request: Any, **options: Any) -> Any:
        return self._shard.begin_update(request, **options)


@pytest.fixture(params=["rows", "columns"])
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[mempool.Pool, mempool.Table, Shy]]:
    with mempool.local(shards=3) as pool:
        table = pool.create_table(
            mempool.TableConfig(
                name="facts", num_slots=64, value_dim=12, block_dim=4, page_slots=8, layout=request.param
            )
        )
        asking = table._session._direct
        assert asking is not None
        asking._dial = shy = Shy(asking._dial)
        yield pool, table, shy


def remembered(pool: mempool.Pool) -> dict[int, set[int]]:
    return pool.router.remembered.shards()


def test_answers_are_the_routers(opened: tuple[mempool.Pool, mempool.Table, Shy]) -> None:
    pool, table, shy = opened
    session = table._session
    assert session._direct is not None
    found = gather_directly(session._direct, session.table_id, BAGS, remember=False)
    assert found is not None
    expected, record = run(pool.router.gather(session.table_id, bags=BAGS))
    assert torch.equal(found[0], expected)
    assert (found[1].seen.epoch, found[1].seen.newest_version) == (record.seen.epoch, record.seen.newest_version)
    assert not found[1].remembered_by
    assert shy.asked == [0, 1, 2]


@pytest.mark.parametrize("kind", ["silent", "mute"])
def test_one_that_cannot_be_asked_leaves_it_to_the_router_and_nothing_behind(
    opened: tuple[mempool.Pool, mempool.Table, Shy], kind: str
) -> None:
    pool, table, shy = opened
    session = table._session
    assert session._direct is not None
    getattr(shy, kind).add(1)
    assert gather_directly(session._direct, session.table_id, BAGS, remember=True) is None
    assert shy.asked == ([0] if kind == "silent" else [0, 1, 2])
    weights = torch.rand(2, 3, requires_grad=True)
    values = table.gather(IDS, weights)  # the router asks all of them
    del values
    shy.silent.clear()
    shy.mute.clear()
    table.gather(IDS)  # tells all shards what they may forget
    assert not remembered(pool)


def test_an_interrupt_while_one_is_waited_for_goes_on_after_all_have_answered(
    opened: tuple[mempool.Pool, mempool.Table, Shy], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, table, shy = opened
    begin_gather = _Asked.begin_gather

    def interrupted(self: _Asked, request: Any, **options: Any) -> Any:
        if self._number == 2:
            raise KeyboardInterrupt
        return begin_gather(self, request, **options)

    with monkeypatch.context() as patched:
        patched.setattr(_Asked, "begin_gather", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.gather(IDS)
    assert shy.asked == [0, 1]
    table.gather(IDS)


def test_an_interrupt_in_the_middle_of_waiting_keeps_no_answer_that_nobody_waits_for(
    opened: tuple[mempool.Pool, mempool.Table, Shy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does its traceback, which a notebook keeps: an answer that is still to come has a line."""
    _, table, _ = opened
    begun: list[weakref.ref[Any]] = []
    begin_gather = _Asked.begin_gather

    def noted(self: _Asked, request: Any, **options: Any) -> Any:
        def waited() -> Any:
            if self._number == 0:
                raise KeyboardInterrupt
            return wait()

        wait = begin_gather(self, request, **options)
        begun.append(weakref.ref(waited))
        return waited

    with monkeypatch.context() as patched:
        patched.setattr(_Asked, "begin_gather", noted)
        with pytest.raises(KeyboardInterrupt) as kept:
            table.gather(IDS)
    assert [number for number, wait in enumerate(begun) if wait() is not None] in ([], [0])
    assert len(begun) == 3
    assert kept.traceback
    table.gather(IDS)


def test_it_is_not_for_the_loop_nor_for_another_process(
    opened: tuple[mempool.Pool, mempool.Table, Shy], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, table, shy = opened
    session = table._session
    asking = session._direct
    assert asking is not None

    async def on_the_loop() -> bool:
        return asking.possible

    async def elsewhere() -> bool:
        return asking.possible

    assert not run(on_the_loop())
    assert asyncio.run(elsewhere()), "a loop of the caller's own is his to block"
    monkeypatch.setattr(asking, "_pid", -1)
    assert gather_directly(asking, session.table_id, BAGS, remember=False) is None
    assert not shy.asked


def test_an_update_whose_backward_pass_is_interrupted_is_no_part_of_the_step() -> None:
    """Whether or not the loop had begun it."""
    with mempool.local() as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=4))
        session = table._session
        _, record = run(session.gather(BAGS, remember=True))
        session._direct = None

        def interrupted(coroutine: Any) -> Any:
            coroutine.close()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            session.weight_grad(record, torch.ones(2, 4), hold=True, run=interrupted)
        assert session.pending == 0


def test_shards_that_are_silent_cost_a_call_half_of_its_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with mempool.local() as pool:
        asking = Asking(pool.router, lambda _: None, loop=io_loop(), patience_s=60.0)
        assert asking.patience_s == pool.router.timeout_s / 2
        assert asking.left_s(time.monotonic()) is None
        left_s = asking.left_s(time.monotonic() - 10.0)
        assert left_s is not None
        assert left_s <= pool.router.timeout_s - 10.0
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=4))
        session = table._session
        given: list[float | None] = []
        gather = session.gather

        async def noted(bags: Bags, *, timeout_s: float | None = None, **options: Any) -> Any:
            given.append(timeout_s)
            return await gather(bags, timeout_s=timeout_s, **options)

        monkeypatch.setattr(session, "gather", noted)
        monkeypatch.setattr(session, "gather_at_once", lambda *_, **__: None)
        monkeypatch.setattr(session, "left_s", lambda _: 7.0)
        table.gather(IDS)
        assert given == [7.0]


def test_training_by_it_is_training_by_the_router() -> None:
    def trained(*, direct: bool) -> torch.Tensor:
        with mempool.local(shards=3) as pool:
            table = pool.create_table(
                mempool.TableConfig(name="facts", num_slots=64, value_dim=12, block_dim=4, page_slots=8, layout="rows")
            )
            if not direct:
                table._session._direct = None
            generator = torch.Generator().manual_seed(7)
            grads = []
            for _ in range(3):
                ids = torch.randint(0, 64, (5, 4), generator=generator)
                weights = torch.rand(5, 4, generator=generator).requires_grad_()
                table.gather(ids, weights).square().sum().backward()
                grads.append(weights.grad)
                table.commit()
            assert table.counters.lookups == table.counters.updates_committed == 3
            return torch.cat([table.rows(torch.arange(64)).reshape(-1), *(grad.reshape(-1) for grad in grads)])

    assert torch.equal(trained(direct=True), trained(direct=False))


def test_what_shards_remember_is_kept_alive_by_heartbeats() -> None:
    with mempool.local() as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=4))
        heartbeats = table._session.coordinator.heartbeats
        assert heartbeats._task is None
        values = table.gather(IDS, torch.rand(2, 3, requires_grad=True))
        run(asyncio.sleep(0))
        assert heartbeats._task is not None
        del values


class Weight:
    num_bytes = 1


def test_an_update_that_a_thread_adds_is_part_of_one_step() -> None:
    book: Book[Weight] = Book(group="g")
    added: list[tuple[int, int]] = []
    stop = threading.Event()

    def adds() -> None:
        while not stop.is_set():
            step, sequence = book.add(Weight())
            added.append((id(step), sequence))

    threads = [threading.Thread(target=adds) for _ in range(3)]
    for thread in threads:
        thread.start()
    sealed: list[int] = []
    steps = []
    for _ in range(300):
        step = book.seal()
        if step is None:
            continue
        steps.append(step)
        assert step.sealed == tuple(sorted(step.updates))
        sealed += step.sealed
        book.acknowledged()
        book.applied()
    stop.set()
    for thread in threads:
        thread.join(20)
    rest = list(book.open.updates)
    assert sorted(sealed + rest) == sorted(sequence for _, sequence in added)
    assert all(step.sealed == tuple(sorted(step.updates)) for step in steps), "nothing came after it was sealed"


def test_pairs_are_kept_sorted_for_one_update_under_the_same_plan() -> None:
    with mempool.local(shards=2) as pool:
        table = pool.create_table(
            mempool.TableConfig(name="facts", num_slots=64, value_dim=4, page_slots=8, layout="rows")
        )
        router: Router = pool.router
        plan = router.plan_now(table._session.table_id)
        assert plan is not None
        _, record = run(router.gather(table._session.table_id, bags=BAGS, remember=True))
        assert record.sorted._kept is not None
        first = record.sorted.take(plan, BAGS)
        second = record.sorted.take(plan, BAGS)
        for one, other in zip(first, second, strict=True):
            assert one.kept is not None
            assert other.kept is not None
            assert torch.equal(one.kept, other.kept)
            assert torch.equal(one.bags.ids, other.bags.ids)
        another = SortedPairs(plan, first)
        pool.rescale(3)
        newer = router.adopt(run(router.open("facts")))
        assert newer.placement.epoch != plan.epoch
        changed = router.plan_now(table._session.table_id)
        assert changed is not None
        assert len(another.take(changed, BAGS)) == 3


def test_a_way_is_needed() -> None:
    with mempool.local() as pool:
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=4))
        session = table._session
        asking = Asking(pool.router, lambda _: None, loop=io_loop())
        assert gather_directly(asking, session.table_id, BAGS, remember=True) is None
        assert gather_directly(asking, 12345, BAGS, remember=True) is None
