"""What a controller does about calls that did not arrive: no page is lost, no table stays frozen or half made."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mempool import errors
from mempool.agreement import rounds
from mempool.controller import mover, rescaling
from mempool.controller.pulls import pulls
from mempool.placement import Assignment, moves
from mempool.server.views import ShardViews
from mempool.types import ShardInfo
from mempool.wire.channels.loop import run

from .bench import CALL_S, Bench, config, fail, train

EVERYTHING = torch.arange(600)


def nth(*numbers: int) -> Callable[[], Awaitable[None]]:
    """A fault of these calls only, counted from 1."""
    calls = 0

    async def fault() -> None:
        nonlocal calls
        calls += 1
        if calls in numbers:
            raise errors.ShardUnavailable("a packet was lost")

    return fault


def faulty_from_the_start(bench: Bench, faults: dict[str, Callable[[], Awaitable[None]]]) -> None:
    """Shards that are started from now on have these faults."""
    start = bench.fleet.start

    async def start_faulty(shard: int, *, fresh: bool = False) -> ShardInfo:
        info = await start(shard, fresh=fresh)
        bench.fleet.hosts[shard].faults.update(faults)
        return info

    bench.fleet.start = start_faulty  # type: ignore[method-assign]


def test_a_view_that_arrives_late_keeps_what_was_staged_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The former owner has given the pages away by then: they are nowhere else."""
    monkeypatch.setattr(rounds, "_TELL_PAUSE_S", 0.01)
    with Bench(1, round_bytes=40_000) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        values = table.rows(EVERYTHING)
        # The first view is that of the new shard itself.
        faulty_from_the_start(bench, {"set_view": nth(*range(1, 9)), "pull_pages": nth(2)})
        with pytest.raises(errors.ShardUnavailable, match=r"shard 1 did not take epoch 2.*mempool status"):
            bench.pool.rescale(2)
        for host in bench.fleet.hosts.values():
            host.faults.clear()
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        assert torch.equal(table.rows(EVERYTHING), values)
        bench.pool.rescale(2)
        assert torch.equal(table.rows(EVERYTHING), values)
        train(table, 0)


def test_one_lost_packet_does_not_stop_a_rescale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_TELL_PAUSE_S", 0.01)
    with Bench(1, round_bytes=40_000) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        values = table.rows(EVERYTHING)
        faulty_from_the_start(bench, {"set_view": nth(1, 3)})
        bench.pool.rescale(2)
        assert torch.equal(table.rows(EVERYTHING), values)
        assert bench.view("facts").placement.shards == (0, 1)


def test_a_shard_that_missed_its_tables_gets_them_when_the_rescale_is_asked_for_again() -> None:
    with Bench(2, round_bytes=40_000) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        values = table.rows(EVERYTHING)
        faulty_from_the_start(bench, {"attach_table": nth(1)})
        with pytest.raises(errors.ShardUnavailable, match="a packet was lost"):
            bench.pool.rescale(3)
        bench.pool.rescale(3)
        assert bench.view("facts").placement.shards == (0, 1, 2)
        assert torch.equal(table.rows(EVERYTHING), values)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_thaw_that_was_lost_is_repeated(lost: int) -> None:
    with Bench(2) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        bench.fleet.hosts[1].faults["freeze"] = nth(1)
        # A rescale thaws before it begins, when it has failed, and once more at its end.
        bench.fleet.hosts[0].faults["thaw"] = nth(*range(2, 2 + lost))
        with pytest.raises(errors.ShardUnavailable, match="a packet was lost"):
            bench.pool.rescale(1)
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        assert not any(table.frozen for shard in bench.pool.status().shards for table in shard.tables)
        train(table, 1)


def test_a_shard_that_hangs_does_not_hold_up_a_rescale_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "_REST_S", -9.9)
    monkeypatch.setattr(mover, "_ANSWER_TIMEOUT_S", 0.1)
    with Bench(2) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        bench.fleet.hosts[1].faults["freeze"] = asyncio.Event().wait  # type: ignore[assignment]
        with pytest.raises(errors.ShardUnavailable, match=r"shard 1 of pool 'bench' did not answer within 0\.2 s"):
            bench.pool.rescale(1)
        train(table, 2)


@pytest.mark.parametrize("deaf", [0, 1])
def test_a_drop_that_a_shard_missed_stays_a_drop(deaf: int) -> None:
    with Bench(2) as bench:
        bench.pool.create_table(config())
        bench.fleet.hosts[deaf].faults["drop_table"] = nth(1)
        bench.pool.drop_table("facts")
        table = bench.pool.create_table(config(seed=5))
        values = table.rows(EVERYTHING)
        heir = bench.heir()
        run(heir.adopt(bench.controller.shards), timeout_s=CALL_S)
        (view,) = run(heir.tables(), timeout_s=CALL_S)
        assert view.schema.table_id == table.schema.table_id
        assert torch.equal(bench.pool_of(heir).table("facts").rows(EVERYTHING), values)
        run(heir.reconcile(), timeout_s=CALL_S)
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        for host in bench.fleet.hosts.values():
            assert [known.schema.table_id for known in run(host.views(), timeout_s=CALL_S)] == [table.schema.table_id]


def test_a_drop_that_a_shard_missed_is_made_good_though_its_server_tells_of_the_later_table_alone() -> None:
    """Simulation, seed 5959."""
    with Bench(2) as bench:
        bench.pool.create_table(config())
        bench.fleet.hosts[1].faults["drop_table"] = nth(1)
        bench.pool.drop_table("facts")
        table = bench.pool.create_table(config(seed=5))
        for host in bench.fleet.hosts.values():
            heard = SimpleNamespace(views=host.views)
            host.views = ShardViews("bench", shard=heard, dial=bench.fleet.dial, controller="").tables  # type: ignore
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        for host in bench.fleet.hosts.values():
            status = run(host.status(), timeout_s=CALL_S)
            assert [known.table_id for known in status.tables] == [table.schema.table_id]


def test_a_controller_that_hears_nobody_does_not_take_the_pool_for_empty() -> None:
    with Bench(2) as bench:
        bench.pool.create_table(config())
        for host in bench.fleet.hosts.values():
            host.faults["views"] = nth(1)
        heir = bench.heir()
        with pytest.raises(errors.ShardUnavailable, match=r"none of the 2 shards.*a packet was lost"):
            run(heir.adopt(bench.controller.shards), timeout_s=CALL_S)
        run(heir.adopt(bench.controller.shards), timeout_s=CALL_S)
        assert len(run(heir.tables(), timeout_s=CALL_S)) == 1


def test_a_disk_that_keeps_nothing_of_what_a_new_controller_says_is_named() -> None:
    """As when a pool on a disk is opened again."""
    with Bench(1) as bench:
        bench.fleet.hosts[0].faults["views"] = fail(errors.StorageFailed("the disk is full"))
        with pytest.raises(errors.StorageFailed, match="the disk is full"):
            run(bench.heir().adopt(bench.controller.shards), timeout_s=CALL_S)


def test_a_shard_that_is_away_does_not_keep_a_new_controller_from_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescaling, "_START_LOOKS", 1)
    with Bench(3) as bench:
        bench.pool.create_table(config(name="wide", layout="columns"))
        shards = [
            replace(info, address="", incarnation=0) if info.shard == 2 else info for info in bench.controller.shards
        ]
        for method in ("views", "status", "set_view", "thaw"):
            bench.fleet.hosts[2].faults[method] = fail(errors.ShardUnavailable("not there yet"))
        heir = bench.heir()
        run(heir.adopt(shards), timeout_s=CALL_S)
        assert [view.schema.name for view in run(heir.tables(), timeout_s=CALL_S)] == ["wide"]
        with pytest.raises(errors.ShardUnavailable, match="not there yet"):
            bench.pool_of(heir).rescale(4)
        bench.fleet.hosts[2].faults.clear()
        run(heir.shard_restarted(bench.controller.shards[2]), timeout_s=CALL_S)
        bench.pool_of(heir).rescale(1)


def test_a_table_that_only_a_silent_shard_knows_is_learned_when_it_is_heard() -> None:
    """The other one was restarted while there was no controller."""
    with Bench(2) as bench:
        bench.pool.create_table(config(layout="columns"))
        run(bench.fleet.hosts[0].close(), timeout_s=CALL_S)
        info = run(bench.fleet.start(0), timeout_s=CALL_S)
        bench.fleet.hosts[1].faults["views"] = nth(1)
        heir = bench.heir()
        run(heir.adopt([info, bench.controller.shards[1]]), timeout_s=CALL_S)
        assert run(heir.tables(), timeout_s=CALL_S) == ()
        run(heir.reconcile(), timeout_s=CALL_S)
        with pytest.raises(errors.DataLoss, match=r"shard 0 .* lost 19 pages of table 'facts'"):
            bench.pool_of(heir).table("facts").rows(EVERYTHING)


def test_tables_that_were_made_past_a_controller_are_left_alone() -> None:
    with Bench(2) as bench:
        stranger = bench.heir()
        run(stranger.adopt(bench.controller.shards), timeout_s=CALL_S)
        table = bench.pool_of(stranger).create_table(config())
        for host in bench.fleet.hosts.values():
            run(host.freeze(table.schema.table_id, 5.0, token="a", lease_s=0.0), timeout_s=CALL_S)
        bench.pool.create_table(config(seed=5))  # of the same name
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        for host in bench.fleet.hosts.values():
            assert [known.frozen for known in run(host.status(), timeout_s=CALL_S).tables] == [True, False]


def test_nothing_is_thawed_while_a_shard_is_silent_that_may_know_more() -> None:
    """The old controller died when only shard 1 had the new view: it took over a page and shard 0 still stages one."""
    with Bench(2) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        values = table.rows(EVERYTHING)
        present = bench.view("facts")
        owners = 1 - present.placement.owners  # everything changes hands
        target = replace(present, placement=replace(present.placement, epoch=2, owners=owners))
        before, after = (
            Assignment(owners=view.placement.owners, key_owners=view.placement.key_owners) for view in (present, target)
        )
        fetched = pulls(present, moves(before, after))
        for host in bench.fleet.hosts.values():
            run(host.freeze(table.schema.table_id, 5.0, token="a", lease_s=0.0), timeout_s=CALL_S)
        for dest, requests in fetched:
            for request in requests:
                run(bench.fleet.hosts[dest].pull_pages(request), timeout_s=CALL_S)
        run(bench.fleet.hosts[1].set_view(target), timeout_s=CALL_S)
        bench.fleet.hosts[1].faults["views"] = nth(1)
        heir = bench.heir()
        run(heir.adopt(bench.controller.shards), timeout_s=CALL_S)
        run(heir.reconcile(), timeout_s=CALL_S)
        inherited = bench.pool_of(heir, timeout_s=5.0).table("facts")
        assert torch.equal(inherited.rows(EVERYTHING), values)
        train(inherited, 3)


def test_a_dead_shard_that_owns_nothing_can_be_scaled_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_TELL_PAUSE_S", 0.01)
    with Bench(4, round_bytes=40_000) as bench:
        table = bench.pool.create_table(config(value_dim=192, layout="columns"))
        values = table.rows(EVERYTHING)
        owners = bench.view("facts").placement.shards
        assert 3 not in owners
        assert len(owners) > 1
        for method in ("views", "status", "set_view", "thaw"):
            bench.fleet.hosts[3].faults[method] = fail(errors.ShardUnavailable("dead"))
        bench.pool.rescale(1)
        assert sorted(bench.fleet.hosts) == [0]
        assert torch.equal(table.rows(EVERYTHING), values)


def test_a_shard_that_does_not_stop_is_stopped_when_asked_again() -> None:
    with Bench(3) as bench:
        stop, refusing = bench.fleet.stop, [1]

        async def stop_most(info: ShardInfo) -> None:
            if info.shard in refusing:
                refusing.remove(info.shard)
                raise errors.ShardUnavailable("it does not stop")
            await stop(info)

        bench.fleet.stop = stop_most  # type: ignore[method-assign]
        with pytest.raises(errors.ShardUnavailable, match="does not stop"):
            bench.pool.rescale(1)
        assert sorted(bench.fleet.hosts) == [0, 1]
        bench.pool.rescale(1)
        assert sorted(bench.fleet.hosts) == [0]


@pytest.mark.parametrize("deaf", [0, 1])
def test_a_drop_that_its_controller_did_not_live_to_finish_is_a_drop(deaf: int) -> None:
    """Seed 16: a new controller took the table from the shard that had it still, and gave it to the other as lost."""
    with Bench(2) as bench:
        bench.pool.create_table(config(layout="rows"))
        bench.fleet.hosts[deaf].faults["drop_table"] = nth(1)
        bench.pool.drop_table("facts")
        heir = bench.heir()  # and the first controller does nothing any more
        run(heir.adopt(bench.controller.shards), timeout_s=CALL_S)
        assert run(heir.tables(), timeout_s=CALL_S) == ()
        for host in bench.fleet.hosts.values():
            assert run(host.views(), timeout_s=CALL_S) == ()


def test_a_drop_that_no_shard_was_told_of_is_none() -> None:
    with Bench(2) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        for host in bench.fleet.hosts.values():
            host.faults["drop_table"] = nth(1)
        with pytest.raises(errors.ShardUnavailable, match="a packet was lost"):
            run(bench.controller.drop_table("facts"), timeout_s=CALL_S)
        train(table, 1)
        bench.pool.drop_table("facts")
        with pytest.raises(errors.NotFound):
            bench.pool.table("facts")


def test_what_a_settling_thaws_is_named() -> None:
    """A copy of its Thaw that comes late leaves a round that has begun since."""
    with Bench(2) as bench:
        bench.pool.create_table(config(layout="rows"))
        table_id = bench.view("facts").schema.table_id
        asked: list[tuple[Any, Any]] = []
        for host in bench.fleet.hosts.values():
            run(host.freeze(table_id, 5.0, token="of the dead", lease_s=60.0), timeout_s=CALL_S)
            engine, thaw = host._engine, host._engine.thaw

            def noted(*arguments: Any, _thaw: Any = thaw, **named: Any) -> Any:
                asked.append((arguments, named))
                return _thaw(*arguments, **named)

            engine.thaw = noted  # type: ignore[method-assign]
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        assert not any(table.frozen for shard in bench.pool.status().shards for table in shard.tables)
        for host in bench.fleet.hosts.values():
            run(host.freeze(table_id, 5.0, token="of the living", lease_s=60.0), timeout_s=CALL_S)
        for arguments, named in tuple(asked):
            for host in bench.fleet.hosts.values():
                run(host.thaw(*arguments, **named), timeout_s=CALL_S)
        assert all(table.frozen for shard in bench.pool.status().shards for table in shard.tables)
        assert asked
