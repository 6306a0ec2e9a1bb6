"""Whether a shard is current, and the status while nothing goes on. Adoption and reconciling: test_settling.py."""

import asyncio
from dataclasses import replace

import pytest

from mempool import errors
from mempool.controller.watching import is_current
from mempool.types import ShardInfo, ShardStatus, TableStatus, TableView
from mempool.wire.channels.loop import run

from .bench import CALL_S, Bench, config, fail

INFO = ShardInfo(shard=0, address="", incarnation=1)


def seen(view: TableView, *, epoch: int = 1, frozen: bool = False) -> TableStatus:
    return TableStatus(
        table_id=view.schema.table_id,
        name=view.schema.name,
        epoch=epoch,
        version=0,
        pages=0,
        lost_pages=0,
        num_bytes=0,
        updates_held=0,
        updates_applied=0,
        lookups=0,
        frozen=frozen,
    )


def test_a_shard_is_current_with_every_table_at_its_epoch_and_thawed() -> None:
    with Bench(1) as bench:
        bench.pool.create_table(config())
        view = bench.view("facts")
    status = ShardStatus(info=INFO, state="ready", tables=(seen(view),))
    assert is_current(status, [view])
    assert is_current(status, [])
    assert not is_current(replace(status, tables=()), [view])
    assert not is_current(replace(status, tables=(seen(view, epoch=2),)), [view])
    assert not is_current(replace(status, tables=(seen(view, frozen=True),)), [view])
    assert is_current(ShardStatus(info=INFO, state="unreachable"), [view]), "it cannot be told anything now"


def test_a_quiet_pool_says_so() -> None:
    with Bench(2) as bench:
        bench.pool.create_table(config())
        bench.fleet.hosts[1].faults["status"] = fail(errors.ShardUnavailable("gone"))
        status = bench.pool.status()
        assert [shard.state for shard in status.shards] == ["ready", "unreachable"]
        assert (status.rescaling, status.wanted_shards, status.waiting_for, status.unfinished) == (False, 2, "", "")
        assert status.creating == ()


def test_why_a_shard_cannot_start_is_in_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(2) as bench:
        monkeypatch.setattr(bench.controller._watching, "_refusals", {0: "it could, meanwhile", 1: "file: damaged"})
        bench.fleet.hosts[1].faults["status"] = fail(errors.ShardUnavailable("gone"))
        assert [shard.storage_refuses for shard in bench.pool.status().shards] == ["", "file: damaged"]


def test_reconcile_waits_for_no_change_and_tells_nobody_who_knows() -> None:
    with Bench(1) as bench:
        bench.pool.create_table(config())
        calls = bench.fleet.hosts[0].calls
        calls.clear()
        run(bench.controller.reconcile(), timeout_s=CALL_S)
        assert calls == ["status"]

        async def busy() -> None:
            held = asyncio.Event()
            bench.fleet.hosts[0].faults["drop_table"] = held.wait  # type: ignore[assignment]
            dropping = asyncio.create_task(bench.controller.drop_table("facts"))
            await asyncio.sleep(0)
            calls.clear()
            await bench.controller.reconcile()
            assert "status" not in calls
            held.set()
            await dropping

        run(busy(), timeout_s=CALL_S)


def test_a_shard_that_was_removed_meanwhile_or_came_back_again_is_not_admitted() -> None:
    """Simulation, seed 3857: it stayed one of the pool's for good, and no rescale began, as it did not answer."""
    with Bench(3) as bench:
        bench.pool.create_table(config())
        removed = bench.controller.shards[2]

        async def came_back() -> None:
            rescaling = bench.controller.rescale(2)
            await anext(rescaling)
            admitted = asyncio.create_task(bench.controller.shard_restarted(replace(removed, incarnation=9)))
            assert not admitted.done()
            async for _ in rescaling:
                pass
            await admitted

        run(came_back(), timeout_s=CALL_S)
        kept = bench.controller.shards
        assert [info.shard for info in kept] == [0, 1]
        run(bench.controller.shard_restarted(replace(kept[1], incarnation=0)), timeout_s=CALL_S)
        assert bench.controller.shards == kept
        bench.pool.rescale(1)


def test_the_highest_incarnation_is_of_all_shards_that_were_ever_heard_of() -> None:
    with Bench(3) as bench:
        bench.pool.create_table(config())
        assert bench.controller.highest_incarnation == 3
        bench.pool.rescale(1)
        assert bench.controller.highest_incarnation == 3
        heir = bench.heir()
        with pytest.raises(errors.NotFound):
            run(heir.table("facts"), timeout_s=CALL_S)
        run(heir.adopt(bench.controller.shards), timeout_s=CALL_S)
        assert heir.highest_incarnation == 1, "nobody told it of those that were scaled away"
