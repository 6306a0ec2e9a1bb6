"""The controller over real engines: tables, rescales, and what happens when a shard fails in the middle."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

import mempool
from mempool import errors
from mempool.config import resolve
from mempool.wire.channels.loop import run

from .bench import CALL_S, Bench, config, fail, train


def test_a_table_that_one_shard_cannot_take_is_on_none() -> None:
    with Bench(3) as bench:
        bench.fleet.hosts[2].faults["attach_table"] = fail(errors.ShardUnavailable("shard 2 is full"))
        with pytest.raises(errors.ShardUnavailable, match="full"):
            run(bench.controller.create_table(resolve(config())), timeout_s=CALL_S)
        assert bench.pool.tables() == ()
        for host in bench.fleet.hosts.values():
            assert run(host.views(), timeout_s=CALL_S) == ()
        bench.fleet.hosts[2].faults.clear()
        assert bench.pool.create_table(config()).gather(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, 128)


def test_names_are_unique_and_ids_never_return() -> None:
    with Bench(1) as bench:
        first = bench.pool.create_table(config()).schema.table_id
        with pytest.raises(errors.AlreadyExists, match="600 x 128 float32"):
            bench.pool.create_table(config())
        bench.pool.drop_table("facts")
        with pytest.raises(errors.NotFound, match="its tables: none"):
            bench.pool.table("facts")
        assert bench.pool.create_table(config()).schema.table_id > first


@pytest.mark.parametrize("layout", ["columns", "rows", "grid", "auto"])
def test_values_and_state_survive_rescales_in_small_rounds(layout: str) -> None:
    with Bench(1, round_bytes=30_000) as bench:
        table = bench.pool.create_table(config(layout=layout, optimizer=mempool.optim.Adagrad(lr=0.1)))
        train(table, 0)
        everything = torch.arange(600)
        values, state = table.rows(everything), table.state(everything)["values.sum"]
        for shards in (4, 3, 1, 2):
            reports: list[Any] = []
            bench.pool.rescale(shards, progress=reports.append)
            assert torch.equal(table.rows(everything), values)
            assert torch.equal(table.state(everything)["values.sum"], state)
            assert sorted(bench.fleet.hosts) == list(range(shards))
            assert reports[-1].done
            assert reports[-1].pages_moved == reports[-1].pages_total
            assert [report.pages_moved for report in reports] == sorted(report.pages_moved for report in reports)
            applied = {
                shard_table.updates_applied for shard in bench.pool.status().shards for shard_table in shard.tables
            }
            assert applied == {1} or shards > 2  # a shard that owns nothing of the table has no history of it


@pytest.mark.parametrize("method", ["freeze", "pull_pages", "export_pages"])
def test_a_failed_round_changes_nothing_and_can_be_asked_again(method: str) -> None:
    with Bench(2, round_bytes=40_000) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        train(table, 1)
        values = table.rows(torch.arange(600))
        epoch = bench.view("facts").placement.epoch
        bench.fleet.hosts[0].faults[method] = fail(errors.ShardUnavailable("the wire is cut"))
        shrinking = method != "export_pages"  # only then does shard 0 pull
        with pytest.raises(errors.ShardUnavailable, match="the wire is cut"):
            bench.pool.rescale(1 if shrinking else 3)
        assert bench.view("facts").placement.epoch == epoch
        assert not bench.pool.status().rescaling
        train(table, 2)  # nobody is left frozen
        assert not torch.equal(table.rows(torch.arange(600)), values)
        after = table.rows(torch.arange(600))
        bench.fleet.hosts[0].faults.clear()
        bench.pool.rescale(1 if shrinking else 3)
        assert torch.equal(table.rows(torch.arange(600)), after)


def test_a_shard_that_does_not_start_stops_the_rescale_before_any_move() -> None:
    with Bench(1) as bench:
        table = bench.pool.create_table(config())
        bench.fleet.refuse = {2}
        with pytest.raises(errors.ShardUnavailable, match="does not fit"):
            bench.pool.rescale(3)
        assert sorted(bench.fleet.hosts) == [0]
        assert bench.view("facts").placement.epoch == 1
        train(table, 3)


def test_a_second_rescale_is_refused_and_a_watcher_may_leave() -> None:
    with Bench(1, round_bytes=30_000) as bench:
        bench.pool.create_table(config(layout="rows"))

        async def leave_after_first() -> None:
            reports = bench.controller.rescale(2)
            async for _ in reports:
                break
            await reports.aclose()  # type: ignore[attr-defined]
            with pytest.raises(errors.InvalidRequest, match="under way"):
                await anext(bench.controller.rescale(3))
            async with asyncio.timeout(CALL_S):
                while (await bench.controller.status()).rescaling:
                    await asyncio.sleep(0.01)

        run(leave_after_first(), timeout_s=CALL_S)
        assert bench.view("facts").placement.shards == (0, 1)


def test_a_restarted_shard_loses_its_tables_and_only_those() -> None:
    with Bench(2) as bench:
        lost = bench.pool.create_table(config(name="lost", layout="columns"))
        whole = bench.pool.create_table(config(name="whole", value_dim=64, layout="columns"))
        (owner,) = bench.view("whole").placement.shards
        run(bench.fleet.hosts[1 - owner].close(), timeout_s=CALL_S)
        info = run(bench.fleet.start(1 - owner), timeout_s=CALL_S)
        run(bench.controller.shard_restarted(info), timeout_s=CALL_S)
        with pytest.raises(errors.DataLoss, match="lost") as caught:
            lost.gather(torch.zeros(1, 1, dtype=torch.int64))
        assert "drop" in str(caught.value)
        train(whole, 4)
        with pytest.raises(errors.DataLoss, match="drop the table"):
            bench.pool.rescale(3)
        bench.pool.drop_table("lost")
        bench.pool.rescale(3)
        train(bench.pool.create_table(config(name="lost")), 5)


def test_a_new_controller_adopts_what_the_shards_know() -> None:
    with Bench(2) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        train(table, 6)
        bench.pool.rescale(3)
        values = table.rows(torch.arange(600))
        heir = bench.heir()
        run(heir.adopt(bench.controller.shards), timeout_s=CALL_S)
        assert run(heir.table("facts"), timeout_s=CALL_S).placement.epoch == bench.view("facts").placement.epoch
        with_heir = bench.pool_of(heir)
        with_heir.rescale(1)
        assert torch.equal(with_heir.table("facts").rows(torch.arange(600)), values)
        fresh = with_heir.create_table(config(name="fresh"))
        assert fresh.schema.table_id > table.schema.table_id


def test_an_adopted_pool_finishes_what_was_half_way() -> None:
    """The old controller died after the first shard had the new view: everyone gets it, nothing is lost."""
    with Bench(2) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        train(table, 7)
        values = table.rows(torch.arange(600))
        for shard, host in bench.fleet.hosts.items():
            if shard != 1:
                host.faults["set_view"] = fail(errors.ShardUnavailable("died here"))
        bench.fleet.refuse = set()
        placement = bench.view("facts").placement
        moved = replace(placement, epoch=placement.epoch + 1)
        view = replace(bench.view("facts"), placement=moved)
        run(bench.fleet.hosts[0].freeze(table.schema.table_id, 5.0, token="a", lease_s=0.0), timeout_s=CALL_S)
        run(bench.fleet.hosts[1].freeze(table.schema.table_id, 5.0, token="a", lease_s=0.0), timeout_s=CALL_S)
        run(bench.fleet.hosts[1].set_view(view), timeout_s=CALL_S)
        bench.fleet.hosts[0].faults.clear()
        heir = bench.heir()
        run(heir.adopt(bench.controller.shards), timeout_s=CALL_S)
        client = bench.pool_of(heir)
        assert torch.equal(client.table("facts").rows(torch.arange(600)), values)
        train(client.table("facts"), 8)
