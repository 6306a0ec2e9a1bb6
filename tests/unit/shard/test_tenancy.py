"""Tables' lives beside busy clients: what never waits, what goes first, what ends by itself."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mempool.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, RequestTooLarge, ShardUnavailable
from mempool.shard import tenancy
from mempool.shard.forks import forked
from mempool.types import AttachTable, ExportPages, ForkPoint, GatherRequest, Ledger, LedgerEntry, UpdateRequest
from mempool.types.caller import Caller, calling
from tests.contract.bags import make_bags
from tests.contract.driver import Driver, make_schema, same

from .conftest import MakeDriver

GRADS = torch.linspace(-1, 1, 40).view(4, 10)


@contextmanager
def _busy(driver: Driver) -> Iterator[None]:
    """The engine's thread works for somebody all the while."""
    begun, end = threading.Event(), threading.Event()

    def work(_: Any) -> None:
        begun.set()
        assert end.wait(20)

    engine: Any = driver.host(0)
    working = driver.submit(engine._thread.run("work", work))
    assert begun.wait(20)
    try:
        yield
    finally:
        end.set()
        working.result(timeout=20)


def _wait_for(what: Callable[[], bool], bound_s: float = 20.0) -> None:
    end_s = time.monotonic() + bound_s
    while not what():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.005)


def test_status_and_views_do_not_wait_for_work(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    with _busy(driver):
        gathering = driver.submit(driver.host(0).gather(_gather(driver)))
        _wait_for(lambda: driver.call(driver.host(0).status()).queued_calls == 2)
        status = driver.call(driver.host(0).status())
        assert status.queued_bytes > 2 * 4096
        assert [table.pages for table in status.tables] == [21]
        (view,) = driver.call(driver.host(0).views())
        assert view.schema.name == "facts"
        assert not gathering.done()
    gathering.result(timeout=20)
    _wait_for(lambda: driver.call(driver.host(0).status()).queued_bytes == 0)


def _gather(driver: Driver) -> GatherRequest:
    bags = make_bags(1)
    return GatherRequest(
        envelope=driver.envelope(0),
        lookup_id=1,
        ids=bags.ids,
        weights=bags.weights,
        offsets=bags.offsets,
        remember=True,
    )


def test_the_controller_goes_before_clients(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    order: list[str] = []

    async def ask(name: str, call: Any) -> None:
        await call
        order.append(name)

    async def all_at_once() -> None:
        host = driver.host(0)
        async with asyncio.timeout(20):
            await asyncio.gather(
                *(ask("gather", host.gather(_gather(driver))) for _ in range(20)),
                ask("freeze", host.freeze(1, 5.0, token="round", lease_s=60.0)),
                ask("thaw", host.thaw(1)),
            )

    with _busy(driver):
        asking = driver.submit(all_at_once())
        _wait_for(lambda: driver.call(driver.host(0).status()).queued_calls == 23)
    asking.result(timeout=20)
    assert order[:2] == ["freeze", "thaw"]


def test_what_clients_hold_is_told_and_ends_with_them(make_driver: MakeDriver) -> None:
    """Though nobody says anything more: the lease of a dead trainer's step ends by itself."""
    make_driver().create(make_schema()).train(1, {0: (make_bags(1), GRADS)})  # compiles
    driver = make_driver(held_lease_s=1.0, context_lease_s=1.0).create(make_schema())
    driver.gather(make_bags(1))
    driver.update(1, 0, GRADS)
    driver.prepare(1, [0])
    status = driver.call(driver.host(0).status())
    assert status.held_bytes > 4 * 512
    assert status.context_bytes > 3 * 512
    assert status.kept_bytes > 0
    assert status.client_limit_bytes == 4 * 2**30
    _wait_for(lambda: driver.call(driver.host(0).status()).held_bytes == 0)
    _wait_for(lambda: driver.call(driver.host(0).status()).context_bytes == 0)
    status = driver.call(driver.host(0).status())
    assert (status.kept_bytes, status.tables[0].updates_held) == (0, 0)


def test_a_waiting_freeze_goes_on_soon_after_a_trainer_fell_silent(make_driver: MakeDriver) -> None:
    driver = make_driver(held_lease_s=1.0).create(make_schema())
    driver.update(1, 0, GRADS, bags=make_bags(1))
    driver.prepare(1, [0])
    assert driver.freeze(0, 20.0) == 0


def test_a_freeze_in_vain_says_when_it_will_not_be(make_driver: MakeDriver) -> None:
    driver = make_driver(held_lease_s=8.0).create(make_schema())
    driver.update(1, 0, GRADS, bags=make_bags(1))
    driver.prepare(1, [0])
    with pytest.raises(DeadlineExceeded, match=r"If that trainer died, it is given up 8 s after it was last heard of"):
        driver.freeze(0, 0.05)
    for timeout_s in (float("nan"), -0.0, float("inf")):
        with pytest.raises(InvalidRequest, match="timeout_s = "):
            driver.freeze(0, timeout_s)
    assert not driver.status(0).frozen


def test_one_trainer_that_never_commits_leaves_room_for_others(make_driver: MakeDriver) -> None:
    driver = make_driver(client_memory_bytes=2**20).create(make_schema())
    engine: Any = driver.host(0)

    async def update(request: UpdateRequest, caller: str) -> None:
        with calling(Caller(name=caller)):
            await engine.update(request)

    def request(number: int, group: str) -> UpdateRequest:
        asked = driver.update_request(0, 1, number, GRADS, bags=make_bags(1))
        return replace(asked, step_id=driver.step_id(1, group), want_weight_grad=False)

    refused = None
    for number in range(1000):
        try:
            driver.call(update(request(number, f"group {number}"), "ipv4:10.0.0.9:1"))
        except (RequestTooLarge, Overloaded) as error:
            refused = error
            break
    assert isinstance(refused, RequestTooLarge), "waiting would not help"
    assert "ipv4:10.0.0.9:1 holds" in str(refused)
    held = driver.call(engine.status()).held_bytes
    assert 0.6 * 2**20 < held < 2**20
    for number in range(10):
        driver.call(update(request(number, "other"), "ipv4:10.0.0.8:1"))
    driver.gather(make_bags(1))
    assert driver.call(engine.status()).held_bytes <= 2**20


def test_calls_that_pile_up_are_refused_and_counted(make_driver: MakeDriver) -> None:
    driver = make_driver(client_memory_bytes=2**20).create(make_schema())
    engine: Any = driver.host(0)
    bags = make_bags(1, lengths=(2000,))
    request = replace(_gather(driver), ids=bags.ids, weights=None, offsets=bags.offsets)
    with _busy(driver):
        asked = [driver.submit(engine.gather(request)) for _ in range(100)]
        _wait_for(lambda: sum(call.done() for call in asked) > 50)
        status = driver.call(engine.status())
        assert status.queued_bytes <= 3 * 2**18
        refused = [call.exception() for call in asked if call.done()]
        assert all(isinstance(error, Overloaded) and error.shard == 0 for error in refused)
    answers = [call.result(timeout=20) for call in asked if call.exception(timeout=20) is None]
    assert len(answers) == 100 - len(refused) > 5


def test_views_and_ledgers_that_do_not_fit_are_refused(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    before = driver.contents()
    other = driver.make_view(make_schema(value_dim=12), driver.placed.placement.owners, epoch=2)
    with pytest.raises(InvalidRequest, match="schema of table 'facts' is another one"):
        driver.call(driver.host(0).set_view(other))
    assert same(driver.contents(), before)
    ledger = Ledger(version=1, entries={("x" * 300, 0): LedgerEntry(step=1)})
    with pytest.raises(InvalidRequest, match="has 300 bytes"):
        driver.call(driver.host(0).attach_table(AttachTable(view=driver.placed, mode="empty", ledger=ledger)))


def test_a_table_with_the_id_of_another_is_refused(make_driver: MakeDriver) -> None:
    """Two controllers that gave one id: whoever comes second does not take the first one's table for its own."""
    driver = make_driver().create(make_schema())
    other = replace(driver.placed, schema=replace(driver.schema, name="other"))
    before = driver.contents()
    with pytest.raises(
        InvalidRequest, match=r"schema of table 'other' is another one than table 'facts' \(1\) was made"
    ):
        driver.call(driver.host(0).attach_table(AttachTable(view=other, mode="initialise", pending=True)))
    assert same(driver.contents(), before)


def test_pages_that_no_message_holds_are_not_exported(make_driver: MakeDriver) -> None:
    driver = make_driver(max_message_bytes=4096).create(make_schema())
    one = ExportPages(table_id=1, row_pages=np.array([0]), blocks=(0, 1, 2))
    assert driver.call(driver.host(0).export_pages(one)).arrays["values"].shape == (8, 10)
    every = ExportPages(table_id=1, row_pages=np.arange(7), blocks=(0, 1, 2))
    with pytest.raises(RequestTooLarge, match="7 row pages would be answered by 4,480 bytes"):
        driver.call(driver.host(0).export_pages(every))


class _Broken(BaseException):
    pass


def test_a_shard_that_cannot_go_on_tells_those_who_wait_for_a_table(make_driver: MakeDriver) -> None:
    told: list[BaseException] = []
    driver = make_driver(on_fatal=told.append).create(make_schema())
    engine: Any = driver.host(0)
    driver.freeze(0)
    driver.update(1, 0, GRADS, bags=make_bags(1))
    waiting = driver.submit(engine.prepare(driver.prepare_request(0, 1, [0], wait=True)))
    _wait_for(lambda: bool(engine._tenancy.table(1)._waiting_for_thaw))

    def fail(_: Any) -> None:
        raise _Broken("the context is gone")

    logging.disable(logging.CRITICAL)
    try:
        with pytest.raises(ShardUnavailable, match="has ended: _Broken: the context is gone"):
            driver.call(engine._thread.run("gather", fail))
        with pytest.raises(ShardUnavailable, match="has ended"):
            waiting.result(timeout=20)
    finally:
        logging.disable(logging.NOTSET)
    for asked in (engine.status, engine.views):
        with pytest.raises(ShardUnavailable, match="has ended"):
            driver.call(asked())
    assert [type(error) for error in told] == [_Broken]


def test_a_table_that_was_dropped_does_not_come_back_and_is_remembered(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenancy, "MOST_ENDED", 3)
    driver = make_driver().create(make_schema())
    driver.drop()
    for mode in ("initialise", "lost", "empty"):
        late = AttachTable(view=driver.view, mode=mode)  # type: ignore[arg-type]
        with pytest.raises(NotFound, match=r"was dropped on shard 0, and is not attached again: the request is late"):
            driver.call(driver.host(0).attach_table(late))
    for table_id in (1, 7, 8, 9):
        driver.call(driver.host(0).drop_table(table_id))
    assert driver.call(driver.host(0).status()).dropped == (7, 8, 9)


def test_tables_are_confirmed_together_or_not_at_all(make_driver: MakeDriver) -> None:
    driver = make_driver().create(make_schema())
    host, view = driver.host(0), driver.placed
    made = []
    for number in (7, 8):
        schema = replace(view.schema, table_id=number, name=f"table {number}")
        made.append(replace(view, schema=schema, placement=replace(view.placement, table_id=number)))
        driver.call(host.attach_table(AttachTable(view=made[-1], mode="initialise", pending=True)))

    def pending() -> set[int]:
        return {table.table_id for table in driver.call(host.status()).tables if table.pending}

    confirmed = AttachTable(view=made[0], mode="confirm", also=(8,))
    with pytest.raises(NotFound, match="no table 9"):
        driver.call(host.attach_table(replace(confirmed, also=(8, 9))))
    with pytest.raises(InvalidRequest, match=r'only "confirm" names others, at most 8'):
        driver.call(host.attach_table(replace(confirmed, mode="initialise")))
    with pytest.raises(InvalidRequest, match="9 tables are named beside table 'table 7'"):
        driver.call(host.attach_table(replace(confirmed, also=tuple(range(9)))))
    assert pending() == {7, 8}
    driver.call(host.attach_table(confirmed))
    assert pending() == set()


def test_a_fork_ends_where_its_table_is_dropped_before_it_is_ready(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver().create(make_schema())
    host, view = driver.host(0), driver.placed
    base_id = view.schema.table_id
    moved = []

    def share(*_: Any) -> int:  # of a table that is never ready
        moved.append(1)
        if len(moved) == 3:
            host._tenancy.drop(base_id)  # type: ignore[attr-defined]
        assert len(moved) <= 3, "nothing of a table that is gone is moved"
        return 1

    monkeypatch.setattr(forked, "share", share)
    schema = replace(view.schema, table_id=7, name="fork")
    fork = replace(view, schema=schema, placement=replace(view.placement, table_id=7))
    point = ForkPoint(table_id=base_id)
    with pytest.raises(NotFound, match=rf"table {base_id} was dropped while a fork of it, table 'fork', was made"):
        driver.call(host.attach_table(AttachTable(view=fork, mode="fork", pending=True, fork=point)))
    assert driver.call(host.status()).tables == ()


def test_what_a_fork_has_still_to_share_at_its_moment_is_moved_while_others_are_served(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that have come to the table since it was prepared, as many as a move brings."""
    driver = make_driver().create(make_schema())
    host, view = driver.host(0), driver.placed
    schema = replace(view.schema, table_id=7, name="fork")
    fork = replace(view, schema=schema, placement=replace(view.placement, table_id=7))
    point = ForkPoint(table_id=view.schema.table_id)
    driver.call(host.attach_table(AttachTable(view=fork, mode="fork", pending=True, fork=point)))
    version = driver.freeze(0, token="moment")
    share, pieces, served, in_take = forked.share, [0], threading.Event(), [0]
    gathering: list[Any] = []

    def some(*args: Any) -> int:
        pieces[0] += 1
        if pieces[0] == 1:
            gathering.append(driver.submit(host.gather(_gather(driver))))
            gathering[0].add_done_callback(lambda _: served.set())
        return 1 if not served.wait(0.02) and pieces[0] < 500 else share(*args)

    def take(self: forked.ForkedPages) -> None:
        assert served.is_set(), "nobody was served before the moment"
        before = pieces[0]
        forked_take(self)
        in_take[0] = pieces[0] - before

    forked_take = forked.ForkedPages.take
    monkeypatch.setattr(forked, "share", some)
    monkeypatch.setattr(forked.ForkedPages, "take", take)
    point = replace(point, token="moment", version=version)
    driver.call(host.attach_table(AttachTable(view=fork, mode="forked", pending=True, fork=point)))
    assert gathering[0].result(20).values.shape == (4, 10)
    assert in_take == [1], "only a look whether anything is left"
