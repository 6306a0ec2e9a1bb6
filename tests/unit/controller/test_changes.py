"""Creating a table is the controller's own task: joined, dropped, told, and never half there."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import torch

import mempool
from mempool import errors
from mempool.config import resolve
from mempool.controller import changes
from mempool.controller.changes import first_view
from mempool.controller.saving.alike import differences
from mempool.types import ForkTable, ShardInfo, TableView
from mempool.types.caller import Caller, calling, current_caller
from mempool.wire.channels.loop import run

from .bench import CALL_S, Bench, config, fail, train

SCHEMA = resolve(config())


class Gate:
    """A fault that holds a call up until it is opened, and says that it came."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.open.wait()


def on_loop(work: Callable[[], Awaitable[None]]) -> None:
    run(work(), timeout_s=CALL_S)  # type: ignore[arg-type]


def test_a_caller_that_goes_away_does_not_undo_it_and_a_repeat_joins_in() -> None:
    with Bench(2) as bench:

        async def work() -> None:
            gate = bench.fleet.hosts[1].faults["attach_table"] = Gate()
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await gate.reached.wait()
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making
            again = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await asyncio.sleep(0)
            (creation,) = (await bench.controller.status()).creating
            assert creation.table == "facts"
            assert [fill.shard for fill in creation.shards] == [0, 1]
            gate.open.set()
            view = await again
            assert view.schema.table_id == creation.table_id
            assert bench.fleet.hosts[1].calls.count("attach_table") == 2, "to attach it, and to confirm it"
            assert (await bench.controller.status()).creating == ()

        on_loop(work)
        bench.pool.table("facts").gather(torch.zeros(1, 1, dtype=torch.int64))


def test_another_schema_under_that_name_is_refused_with_the_difference() -> None:
    with Bench(1) as bench:

        async def work() -> None:
            gate = bench.fleet.hosts[0].faults["attach_table"] = Gate()
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await gate.reached.wait()
            other = replace(SCHEMA, seed=7, optimizer=replace(SCHEMA.optimizer, lr=0.5))
            with pytest.raises(
                errors.AlreadyExists, match=r"being made.* seed is 0, not 7; optimizer\.lr is 0\.1, not 0\.5"
            ):
                await bench.controller.create_table(other)
            gate.open.set()
            await making
            with pytest.raises(
                errors.AlreadyExists, match=r"exists already \(600 x 128 float32; it differs: seed is 0"
            ):
                await bench.controller.create_table(other)
            with pytest.raises(errors.AlreadyExists, match=r"exists already \(600 x 128 float32\); take it"):
                await bench.controller.create_table(SCHEMA)

        on_loop(work)


@pytest.mark.parametrize("begun", [True, False])
def test_dropping_a_table_that_is_being_made_ends_it(begun: bool) -> None:
    with Bench(2) as bench:

        async def work() -> None:
            gate = bench.fleet.hosts[1].faults["attach_table"] = Gate()
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await (gate.reached.wait() if begun else asyncio.sleep(0))
            await bench.controller.drop_table("facts")
            with pytest.raises(errors.NotFound, match="'facts' was dropped while it was being made"):
                await making
            with pytest.raises(errors.NotFound):
                await bench.controller.drop_table("facts")
            for host in bench.fleet.hosts.values():
                assert await host.views() == ()
            bench.fleet.hosts[1].faults.clear()
            await bench.controller.create_table(SCHEMA)

        on_loop(work)


def test_other_tables_come_and_go_while_one_is_filled() -> None:
    with Bench(2) as bench:
        bench.pool.create_table(config(name="old"))

        async def work() -> None:
            gate = bench.fleet.hosts[1].faults["attach_table"] = Gate()
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await gate.reached.wait()
            del bench.fleet.hosts[1].faults["attach_table"]
            await bench.controller.drop_table("old")
            await bench.controller.create_table(replace(SCHEMA, name="new"))
            await bench.controller.reconcile()
            gate.open.set()
            await making
            assert [view.schema.name for view in await bench.controller.tables()] == ["new", "facts"]

        on_loop(work)


def test_a_rescale_waits_for_what_is_being_filled_and_says_so() -> None:
    with Bench(1) as bench:

        async def work() -> None:
            gate = bench.fleet.hosts[0].faults["attach_table"] = Gate()
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await gate.reached.wait()
            reports = bench.controller.rescale(2)
            await anext(reports)
            async with asyncio.timeout(CALL_S):
                while "facts" not in (status := await bench.controller.status()).waiting_for:
                    await asyncio.sleep(0.01)
            assert (status.rescaling, status.wanted_shards, len(status.shards)) == (True, 2, 1)
            late = asyncio.create_task(bench.controller.create_table(replace(SCHEMA, name="late")))
            await asyncio.sleep(0)
            waiting = {creation.table: creation.waiting_for for creation in (await bench.controller.status()).creating}
            assert waiting == {"facts": "", "late": "the change of the pool that is under way"}
            gate.open.set()
            await making
            assert [report async for report in reports][-1].done
            assert (await late).placement.shards == (0, 1)

        on_loop(work)
        assert bench.view("facts").placement.shards == (0, 1)


def test_progress_is_told_by_shard() -> None:
    with Bench(2) as bench:
        large = config(num_slots=2**16, value_dim=256, layout="rows")
        seen: list[tuple[int, int]] = []

        async def work() -> None:
            making = asyncio.create_task(bench.controller.create_table(resolve(large)))
            while not making.done():
                creating = (await bench.controller.status()).creating
                seen.extend((creation.bytes_done, creation.bytes_total) for creation in creating)
                await asyncio.sleep(0)
            await making

        on_loop(work)
        placed = [(done, total) for done, total in seen if total]
        assert {total for _, total in placed} == {2**16 * 256 * 8}  # values and Adagrad's sums, float32
        assert [done for done, _ in placed] == sorted(done for done, _ in placed)
        assert any(0 < done < total for done, total in placed)


def test_a_shard_that_came_back_meanwhile_has_lost_what_it_had_filled() -> None:
    with Bench(2) as bench:

        async def work() -> None:
            gate = bench.fleet.hosts[1].faults["attach_table"] = Gate()
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await gate.reached.wait()
            async with asyncio.timeout(CALL_S):
                while [table.bytes_to_fill for table in (await bench.fleet.hosts[0].status()).tables] != [0]:
                    await asyncio.sleep(0.01)
            await bench.fleet.hosts[0].close()
            await bench.controller.shard_restarted(await bench.fleet.start(0))
            gate.open.set()
            with pytest.raises(errors.ShardUnavailable, match="shard 0 was started anew while table 'facts'"):
                await making
            assert await bench.controller.tables() == ()
            bench.fleet.hosts[1].faults.clear()
            await bench.controller.create_table(SCHEMA)

        on_loop(work)


def test_a_failure_tells_all_who_wait_and_leaves_nothing() -> None:
    with Bench(2) as bench:

        async def work() -> None:
            bench.fleet.hosts[1].faults["attach_table"] = fail(errors.InvalidRequest("no room"))
            results = await asyncio.gather(
                *(bench.controller.create_table(SCHEMA) for _ in range(3)), return_exceptions=True
            )
            assert [str(result) for result in results] == ["no room"] * 3
            for host in bench.fleet.hosts.values():
                assert await host.views() == ()
            assert (await bench.controller.status()).creating == ()

        on_loop(work)


def test_closing_ends_what_is_being_made() -> None:
    bench = Bench(1)

    async def work() -> None:
        gate = bench.fleet.hosts[0].faults["attach_table"] = Gate()
        making = asyncio.create_task(bench.controller.create_table(SCHEMA))
        await gate.reached.wait()
        await bench.controller.close()
        with pytest.raises(errors.ShardUnavailable, match="controller is closing"):
            await making

    with bench:
        on_loop(work)


def test_planning_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a thread: while it does, the controller answers."""
    planning, go_on = threading.Event(), threading.Event()

    def slow(*arguments: object) -> object:
        planning.set()
        assert go_on.wait(CALL_S)
        return first_view(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(changes, "first_view", slow)
    with Bench(1) as bench:

        async def work() -> None:
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            while not planning.is_set():
                await asyncio.sleep(0.01)
            assert len((await bench.controller.status()).creating) == 1
            dropping = asyncio.create_task(bench.controller.drop_table("facts"))
            await asyncio.sleep(0)
            go_on.set()
            await dropping
            with pytest.raises(errors.NotFound):
                await making

        on_loop(work)


def test_a_wrong_schema_is_refused_whoever_made_it() -> None:
    with Bench(1) as bench, pytest.raises(errors.InvalidRequest, match=r"page_slots = 1_000 is not a power of two"):
        run(bench.controller.create_table(replace(SCHEMA, page_slots=1000)), timeout_s=CALL_S)


def test_a_pool_has_so_many_tables_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_TABLES", 2)
    with Bench(1) as bench:
        bench.pool.create_table(config(name="a"))
        bench.pool.create_table(config(name="b"))
        with pytest.raises(errors.InvalidRequest, match=r"the pool has 2 tables, the most it may have"):
            bench.pool.create_table(config(name="c"))
        bench.pool.drop_table("a")
        monkeypatch.setattr(changes, "MAX_PLACED_PAGES", 70)
        with pytest.raises(errors.InvalidRequest, match=r"'c' has 38 pages and the pool's tables 38; together .* 70"):
            bench.pool.create_table(config(name="c"))


def test_differences_name_the_fields() -> None:
    keyed = resolve(config(num_slots=625, keys=mempool.FlatKeys(key_dim=4)))
    other = resolve(config(num_slots=625, keys=mempool.FlatKeys(key_dim=8), value_dim=64, init_std=1.0))
    assert differences(keyed, keyed) == []
    assert differences(keyed, replace(keyed, table_id=9)) == []
    found = differences(keyed, other)
    assert found[0] == "value_dim is 128, not 64"
    assert "keys.key_dim is 4, not 8" in found
    assert any(text.startswith("keys is FlatKeySpec(") for text in differences(keyed, resolve(config(num_slots=625))))


def test_a_first_view_says_what_each_owner_fills() -> None:
    infos = tuple(ShardInfo(shard=shard, address="", incarnation=1) for shard in (3, 5))
    view, bytes_of = first_view(replace(SCHEMA, table_id=7), infos)
    assert (view.placement.table_id, view.placement.epoch, view.placement.shards) == (7, 1, (3, 5))
    assert sum(bytes_of.values()) == 19 * 32 * 128 * 8


def test_neither_the_callers_deadline_nor_its_name_goes_along_to_the_shards() -> None:
    """It would cut a long fill off for all who joined in, and for a caller that left."""
    found: list[Caller] = []
    with Bench(2) as bench:

        async def note() -> None:
            found.append(current_caller())

        for host in bench.fleet.hosts.values():
            host.faults["attach_table"] = note

        async def work() -> None:
            with calling(Caller("a trainer", time.monotonic() + 5.0)):
                await bench.controller.create_table(SCHEMA)

        on_loop(work)
    assert found == [Caller()] * 4


def test_a_late_drop_leaves_the_next_table_of_that_name_alone() -> None:
    """Seeds 6 and 116: a call that came twice, the second time late, dropped what was made meanwhile."""
    with Bench(2) as bench:

        async def work() -> None:
            old = (await bench.controller.create_table(SCHEMA)).schema.table_id
            await bench.controller.drop_table("facts", table_id=old)
            gate = bench.fleet.hosts[1].faults["attach_table"] = Gate()
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await gate.reached.wait()
            with pytest.raises(errors.NotFound, match="no table 'facts'"):
                await bench.controller.drop_table("facts", table_id=old)
            gate.open.set()
            new = (await making).schema.table_id
            with pytest.raises(errors.NotFound, match=f"the id {old} is gone already; .* the id {new}, which stays"):
                await bench.controller.drop_table("facts", table_id=old)
            assert (await bench.controller.table("facts")).schema.table_id == new
            await bench.controller.drop_table("facts", table_id=new)

        on_loop(work)


def test_a_table_that_is_being_made_is_dropped_by_its_id() -> None:
    with Bench(2) as bench:

        async def work() -> None:
            gate = bench.fleet.hosts[1].faults["attach_table"] = Gate()
            making = asyncio.create_task(bench.controller.create_table(SCHEMA))
            await gate.reached.wait()
            (creation,) = (await bench.controller.status()).creating
            await bench.controller.drop_table("facts", table_id=creation.table_id)
            with pytest.raises(errors.NotFound, match="'facts' was dropped while it was being made"):
                await making

        on_loop(work)


def test_a_fork_that_a_shard_does_not_get_ready_for_holds_up_no_other_change() -> None:
    with Bench(2) as bench:
        table = bench.pool.create_table(config())
        bench.pool.create_table(config(name="other"))
        train(table, 0)

        async def begin() -> "tuple[Gate, asyncio.Task[TableView]]":
            gate = bench.fleet.hosts[1].faults["attach_table"] = Gate()
            forking = asyncio.create_task(bench.controller.fork(request))
            await gate.reached.wait()
            del bench.fleet.hosts[1].faults["attach_table"]
            return gate, forking

        async def end(gate: Gate, forking: "asyncio.Task[TableView]") -> TableView:
            gate.open.set()
            return await forking

        request = ForkTable(table="facts", table_id=table.schema.table_id, name="fork")
        gate, forking = run(begin(), timeout_s=CALL_S)
        bench.pool.drop_table("other")
        train(table, 1)
        then = table.rows(list(range(600)))
        run(end(gate, forking), timeout_s=CALL_S)
        assert torch.equal(bench.pool.table("fork").rows(list(range(600))), then), (
            "of the moment at which all are ready"
        )

        request = replace(request, name="late")
        gate, forking = run(begin(), timeout_s=CALL_S)
        bench.pool.rescale(3)
        with pytest.raises(errors.ShardUnavailable, match=r"'facts' have moved, or .* while table 'late' was prepared"):
            run(end(gate, forking), timeout_s=CALL_S)
        names = {"facts", "fork"}
        for host in bench.fleet.hosts.values():
            assert {each.name for each in run(host.status(), timeout_s=CALL_S).tables} == names
        assert torch.equal(table.fork("late").rows(list(range(600))), then)


def test_a_table_that_is_dropped_while_a_fork_of_it_is_prepared_leaves_nothing() -> None:
    with Bench(2) as bench:
        table = bench.pool.create_table(config())

        async def work() -> None:
            gate = bench.fleet.hosts[1].faults["attach_table"] = Gate()
            request = ForkTable(table="facts", table_id=table.schema.table_id, name="fork")
            forking = asyncio.create_task(bench.controller.fork(request))
            await gate.reached.wait()
            await bench.controller.drop_table("facts")
            gate.open.set()
            with pytest.raises(errors.NotFound):
                await forking
            for host in bench.fleet.hosts.values():
                assert (await host.status()).tables == ()

        on_loop(work)
