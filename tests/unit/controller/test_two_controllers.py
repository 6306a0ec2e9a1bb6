"""Two controllers at once: one makes a table, and the other, started meanwhile, takes it for one that nobody makes."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mempool
from mempool import errors
from mempool.config import resolve
from mempool.controller import Controller, telling
from mempool.optim import SGD
from mempool.types import AttachTable
from mempool.types.pool import WAITS_FOR_SHARDS
from mempool.wire.channels.loop import io_loop, run

from .bench import CALL_S, Bench, config, fail, train

EVERYTHING = torch.arange(600)


def submit(coro: Coroutine[Any, Any, Any]) -> "Future[Any]":
    return asyncio.run_coroutine_threadsafe(coro, io_loop())


class DiesHaving:
    """A controller that is killed once one shard has heard that something is made: nothing that it says then comes."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.is_dead = False
        for host in bench.fleet.hosts.values():
            attach = host._engine.attach_table
            host._engine.attach_table = partial(self._heard, attach)  # type: ignore[method-assign]
            for method in ("attach_table", "drop_table", "set_view"):
                host.faults[method] = self._lost

    async def _heard(self, attach: Callable[[AttachTable], Awaitable[None]], request: AttachTable) -> None:
        await attach(request)
        self.is_dead = self.is_dead or request.mode == "confirm"

    async def _lost(self) -> None:
        if self.is_dead:
            raise errors.ShardUnavailable("its controller is dead")

    def heir(self) -> Controller:
        """The one after it."""
        self.is_dead = False
        for host in self._bench.fleet.hosts.values():
            host.faults.clear()
        heir = self._bench.heir()
        run(heir.adopt([host.info for host in self._bench.fleet.hosts.values()]), timeout_s=CALL_S)
        return heir


def test_a_table_and_its_keys_are_reset_at_once_whenever_the_controller_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(telling, "_PUSH_PAUSE_S", 0.0)
    with Bench(2) as bench:
        keys = mempool.FlatKeys(key_dim=8, optimizer=SGD(lr=0.1))
        table = bench.pool.create_table(mempool.TableConfig(name="facts", num_slots=600, value_dim=8, keys=keys))
        table.fork("before")
        table.lookup(torch.randn(4, 8), 5).values.sum().backward()
        table.commit()
        dying = DiesHaving(bench)
        with suppress(errors.MempoolError):
            table.reset(to="before")
        heir = dying.heir()
        pool = bench.pool_of(heir)
        found, before = pool.table("facts"), pool.table("before")
        assert torch.equal(found.rows(EVERYTHING), before.rows(EVERYTHING))
        assert torch.equal(found.read_keys(), before.read_keys())
        assert (found.step_count(), found.keys.step_count()) == (0, 0)
        assert names_of(heir) == ["before", "before:keys", "facts", "facts:keys"]


def names_of(controller: Controller) -> list[str]:
    """Of all tables, those of keys too."""
    return sorted(view.schema.name for view in run(controller.tables(), timeout_s=CALL_S))


def test_a_table_and_its_keys_are_restored_at_once_whenever_the_controller_dies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(telling, "_PUSH_PAUSE_S", 0.0)
    with Bench(2) as bench:
        keys = mempool.FlatKeys(key_dim=8, optimizer=SGD(lr=0.1))
        table = bench.pool.create_table(mempool.TableConfig(name="facts", num_slots=600, value_dim=8, keys=keys))
        rows, own = table.rows(EVERYTHING), table.read_keys()
        bench.pool.checkpoint(tmp_path)
        table.lookup(torch.randn(4, 8), 5).values.sum().backward()
        table.commit()
        dying = DiesHaving(bench)
        with suppress(errors.MempoolError):
            bench.pool.restore(tmp_path, replace=True)
        heir = dying.heir()
        found = bench.pool_of(heir).table("facts")
        assert torch.equal(found.rows(EVERYTHING), rows)
        assert torch.equal(found.read_keys(), own)
        assert names_of(heir) == ["facts", "facts:keys"]


class Held:
    """A fault: holds the ``number``-th call and those after it, until it lets them go."""

    def __init__(self, number: int) -> None:
        self.came = threading.Event()
        self._number = number
        self.ended = False
        self._go = asyncio.Event()

    async def __call__(self) -> None:
        self._number -= 1
        if self._number <= 0:
            self.came.set()
            await self._go.wait()

    def let_go(self) -> None:
        self.ended = True
        io_loop().call_soon_threadsafe(self._go.set)


def adoption(bench: Bench) -> tuple[Controller, "Future[Any]"]:
    heir = bench.heir()
    return heir, submit(heir.adopt([host.info for host in bench.fleet.hosts.values()]))


def test_a_table_that_is_confirmed_while_another_controller_drops_it_stays() -> None:
    """It was used in between: what was committed is there."""
    with Bench(2) as bench:
        confirming, dropping = Held(2), Held(1)
        bench.fleet.hosts[0].faults["attach_table"] = confirming
        for host in bench.fleet.hosts.values():
            host.faults["drop_table"] = dropping
        made: list[Any] = []
        making = threading.Thread(target=lambda: made.append(bench.pool.create_table(config())))
        making.start()
        assert confirming.came.wait(CALL_S)
        heir, adopting = adoption(bench)
        assert dropping.came.wait(CALL_S)
        confirming.let_go()
        making.join(CALL_S)
        (table,) = made
        train(table, 0)
        before = table.rows(EVERYTHING)
        dropping.let_go()
        adopting.result(CALL_S)
        run(heir.reconcile(), timeout_s=CALL_S)
        assert torch.equal(table.rows(EVERYTHING), before)
        assert [view.schema.name for view in run(heir.tables(), timeout_s=CALL_S)] == ["facts"]


def test_a_table_that_another_controller_dropped_first_is_not_made() -> None:
    with Bench(2) as bench:
        confirming = Held(2)
        bench.fleet.hosts[0].faults["attach_table"] = confirming
        making = submit(bench.controller.create_table(resolve(config())))
        assert confirming.came.wait(CALL_S)
        heir, adopting = adoption(bench)
        adopting.result(CALL_S)
        confirming.let_go()
        assert isinstance(making.exception(CALL_S), errors.NotFound)
        assert all(not run(host.status(), timeout_s=CALL_S).tables for host in bench.fleet.hosts.values())
        assert run(heir.tables(), timeout_s=CALL_S) == ()


def confirmation_lost(bench: Bench) -> None:
    """The first shard confirms a table, and neither that nor a drop is heard of."""

    async def lost() -> None:
        raise errors.ShardUnavailable("a packet was lost")

    attach = bench.fleet.hosts[0]._engine.attach_table

    async def confirmed_and_lost(request: Any) -> None:
        await attach(request)
        if request.mode == "confirm":
            bench.fleet.hosts[0].faults["drop_table"] = lost
            await lost()

    bench.fleet.hosts[0]._engine.attach_table = confirmed_and_lost  # type: ignore[method-assign]
    submit(bench.controller.create_table(resolve(config()))).exception(CALL_S)
    assert run(bench.controller.tables(), timeout_s=CALL_S) == ()
    bench.fleet.hosts[0].faults.clear()


def test_a_confirmation_whose_answer_was_lost_is_heard_of_later() -> None:
    """Whether the table is made is not known then: nobody drops it, and its shards say so."""
    with Bench(2) as bench:
        confirmation_lost(bench)
        with pytest.raises(errors.ShardUnavailable, match="whether there is a table 'facts' is not known yet"):
            bench.view("facts")
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        assert [view.schema.name for view in run(bench.controller.tables(), timeout_s=CALL_S)] == ["facts"]
        train(bench.pool.table("facts"), 0)


@pytest.mark.parametrize("id_known", [False, True])
def test_while_it_is_not_known_whether_a_table_is_made_none_is_made_beside_it_and_it_can_be_dropped(
    id_known: bool,
) -> None:
    """Simulation, seed 2850: two tables of one name, of which clients were told in turn."""
    with Bench(2) as bench:
        confirmation_lost(bench)
        bench.fleet.hosts[0].faults["views"] = fail(errors.ShardUnavailable("a packet was lost"))
        for change in (bench.controller.create_table(resolve(config())), bench.controller.drop_table("facts")):
            with pytest.raises(errors.ShardUnavailable, match="is not known yet: shard 0 has not said so "):
                submit(change).result(CALL_S)
        bench.fleet.hosts[0].faults.clear()
        with pytest.raises(errors.AlreadyExists, match="exists already"):
            submit(bench.controller.create_table(resolve(config(seed=7)))).result(CALL_S)
        (view,) = run(bench.fleet.hosts[0].views(), timeout_s=CALL_S)
        bench.controller._roster.complete = False
        run(bench.controller.drop_table("facts", table_id=view.schema.table_id * id_known), timeout_s=CALL_S)
        assert all(not run(host.status(), timeout_s=CALL_S).tables for host in bench.fleet.hosts.values())


def test_a_table_that_was_dropped_is_in_no_ones_way_before_all_shards_were_heard() -> None:
    """The one that was told does not answer yet, and another one has the table still: found by the simulation."""
    with Bench(2) as bench:
        hosts = bench.fleet.hosts
        run(bench.controller.create_table(resolve(config())), timeout_s=CALL_S)
        hosts[1].faults["drop_table"] = fail(errors.ShardUnavailable("a packet was lost"))
        run(bench.controller.drop_table("facts"), timeout_s=CALL_S)
        hosts[0].faults["views"] = fail(errors.ShardUnavailable("it comes back"))
        heir, adopting = adoption(bench)
        adopting.result(CALL_S)
        with pytest.raises(errors.ShardUnavailable, match="is not known yet: shard 0 has not said so"):
            submit(heir.create_table(resolve(config(seed=7)))).result(CALL_S)
        for host in hosts.values():
            host.faults.clear()
        made = run(heir.create_table(resolve(config(seed=7))), timeout_s=CALL_S)
        assert run(heir.table("facts"), timeout_s=CALL_S).schema.table_id == made.schema.table_id


def test_a_settling_under_way_does_not_end_a_doubt_that_came_since_it_heard() -> None:
    """It has its answers already: the table that one of them does not name may be made by now."""
    with Bench(2) as bench:
        hosts, roster = bench.fleet.hosts, bench.controller._roster
        lost = fail(errors.ShardUnavailable("a packet was lost"))
        attaching, hearing = Held(1), Held(1)
        attach, status = hosts[0]._engine.attach_table, hosts[0]._engine.status
        attach_other = hosts[1]._engine.attach_table

        async def attached_later(request: Any) -> None:
            if request.mode == "initialise":
                await attaching()
            await attach_other(request)

        async def confirmed_and_lost(request: Any) -> None:
            if request.mode == "initialise":
                await attaching()
            await attach(request)
            if request.mode == "confirm" and not hearing.ended:
                hosts[0].faults["drop_table"] = lost
                await lost()

        async def late_status() -> Any:
            said = await status()
            await hearing()
            return said

        hosts[0]._engine.attach_table = confirmed_and_lost  # type: ignore[method-assign]
        hosts[1]._engine.attach_table = attached_later  # type: ignore[method-assign]
        making = submit(bench.controller.create_table(resolve(config())))
        assert attaching.came.wait(CALL_S)
        hosts[0]._engine.status = late_status  # type: ignore[method-assign]
        settling = submit(bench.controller._watching._telling.settle())
        assert hearing.came.wait(CALL_S)
        attaching.let_go()
        assert isinstance(making.exception(CALL_S), errors.ShardUnavailable)
        hearing.let_go()
        settling.result(CALL_S)
        assert not roster.complete
        assert bench.controller._watching._telling.missed
        with pytest.raises(errors.ShardUnavailable, match="is not known yet"):
            bench.view("facts")
        hosts[0].faults.clear()
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        (view,) = run(hosts[0].views(), timeout_s=CALL_S)
        assert bench.view("facts").schema.table_id == view.schema.table_id


@pytest.mark.parametrize("heard_late", [False, True])
def test_ids_ascend_where_the_next_controllers_clock_is_behind(heard_late: bool) -> None:
    """Also past tables that were dropped, and where shards are heard only once a table is asked for."""
    with Bench(2) as bench:
        infos = [host.info for host in bench.fleet.hosts.values()]
        ahead = Controller("bench", launcher=bench.fleet, dial=bench.fleet.dial, wall_clock=lambda: time.time() + 600)
        run(ahead.adopt(infos), timeout_s=CALL_S)
        old = run(ahead.create_table(resolve(config())), timeout_s=CALL_S)
        run(ahead.drop_table("facts"), timeout_s=CALL_S)
        behind = bench.heir()
        if heard_late:
            for host in bench.fleet.hosts.values():
                host.faults["views"] = fail(errors.ShardUnavailable("away"))
            with pytest.raises(errors.ShardUnavailable):
                run(behind.adopt(infos), timeout_s=CALL_S)
            for host in bench.fleet.hosts.values():
                host.faults.clear()
        else:
            run(behind.adopt(infos), timeout_s=CALL_S)
        new = run(behind.create_table(resolve(config())), timeout_s=CALL_S)
        assert new.schema.table_id > old.schema.table_id


def test_a_drop_that_ends_a_making_does_not_say_done_of_a_table_that_may_be_there() -> None:
    """Nobody was heard yet: the making waits to hear whether there is one of that name, and there is."""
    with Bench(2) as bench:
        bench.pool.create_table(config())
        hosts = bench.fleet.hosts.values()
        for host in hosts:
            host.faults["views"] = fail(errors.ShardUnavailable("away"))
        heir, adopting = adoption(bench)
        assert isinstance(adopting.exception(CALL_S), errors.ShardUnavailable)
        hearing = Held(1)
        for host in hosts:
            host.faults["views"] = hearing
        making = submit(heir.create_table(resolve(config())))
        assert hearing.came.wait(CALL_S)
        dropping = submit(heir.drop_table("facts"))
        assert isinstance(making.exception(CALL_S), errors.NotFound)
        hearing.let_go()
        dropping.result(CALL_S)
        assert all(not run(host.status(), timeout_s=CALL_S).tables for host in hosts)
        run(heir.reconcile(), timeout_s=CALL_S)
        assert run(heir.tables(), timeout_s=CALL_S) == ()


def test_a_making_that_waits_for_a_silent_shard_has_an_end_and_can_be_ended() -> None:
    """What a new controller cannot find out is no sign of life, and a try that ends so no outage of its own."""
    with Bench(2) as bench:
        infos = [host.info for host in bench.fleet.hosts.values()]
        heir = bench.heir()
        bench.fleet.hosts[1].faults["views"] = fail(errors.ShardUnavailable("away"))
        run(heir.adopt(infos), timeout_s=CALL_S)
        silent = Held(1)
        bench.fleet.hosts[1].faults["views"] = silent
        pool = bench.pool_of(heir, timeout_s=3.0)
        told: list[BaseException] = []

        def tell(change: Callable[[], object]) -> None:
            try:
                change()
            except errors.MempoolError as error:
                told.append(error)

        making = threading.Thread(target=tell, args=[lambda: pool.create_table(config())], daemon=True)
        making.start()
        assert silent.came.wait(CALL_S)
        making.join(CALL_S)
        assert isinstance(told.pop(), errors.DeadlineExceeded)
        (creation,) = run(heir.status(), timeout_s=CALL_S).creating
        assert creation.waiting_for == WAITS_FOR_SHARDS
        ending = threading.Thread(target=tell, args=[lambda: pool.drop_table("facts")], daemon=True)
        ending.start()
        for _ in range(100):
            if not run(heir.status(), timeout_s=CALL_S).creating:
                break
            ending.join(0.1)
        assert not run(heir.status(), timeout_s=CALL_S).creating
        silent.let_go()
        ending.join(CALL_S)
