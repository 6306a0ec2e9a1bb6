"""Load that is evened: by what shards say of their pages, live, with the same answers all along."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from mempool import errors
from mempool.client import Table
from mempool.controller.moves import evening
from mempool.controller.moves.evening import heat_of, loads_of
from mempool.types import PageHeat, RescaleProgress
from mempool.wire.channels.loop import run

from .bench import CALL_S, Bench, config, fail

SLOTS, PAGE = 640, 16


@pytest.fixture(autouse=True)
def _little_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evening, "LEAST_SEEN", 500)


def facts(bench: Bench, **changes: Any) -> Table:
    return bench.pool.create_table(config(num_slots=SLOTS, page_slots=PAGE, value_dim=64, layout="rows", **changes))


def read(table: Table, ids: torch.Tensor, times: int) -> torch.Tensor:
    """The last of so many look-ups."""
    weights = torch.full(ids.shape, 1.0 / ids.shape[1])
    with torch.no_grad():
        for _ in range(times):
            sums = table.gather(ids, weights)
    return sums


def hot_ids(shards: int) -> torch.Tensor:
    """Pairs of the first shard's pages, the first of them hotter than the last, and a few of all others."""
    random = np.random.default_rng(0)
    hot = (random.beta(1, 2, size=(64, 28)) * SLOTS / shards).astype(np.int64)
    return torch.from_numpy(np.concatenate([hot, random.integers(0, SLOTS, (64, 4))], axis=1))


def shares(bench: Bench) -> list[float]:
    loads = [sum(table.load for table in shard.tables) for shard in bench.pool.status().shards]
    return [load / sum(loads) for load in loads]


def pages(bench: Bench) -> list[int]:
    return np.bincount(bench.view("facts").placement.owners[:, 0]).tolist()


def test_a_skewed_reader_is_evened_live_and_reads_the_same_all_along() -> None:
    with Bench(4, round_bytes=4 * PAGE * 256) as bench:
        table, ids = facts(bench), hot_ids(4)
        expected = read(table, ids, 200)
        assert shares(bench)[0] > 0.7
        planned = bench.pool.rebalance(dry_run=True)
        assert (planned.done, planned.pages_moved) == (True, 0)
        assert [load.before for load in planned.loads] == pytest.approx(shares(bench), abs=0.02)
        assert planned.pages_total > 0
        assert pages(bench) == [10] * 4
        assert bench.view("facts").placement.epoch == 1, "a dry run moves nothing"

        ended, wrong = threading.Event(), []

        def reads() -> None:
            while not ended.is_set():
                if not torch.allclose(read(table, ids, 1), expected, rtol=1e-6, atol=1e-6):
                    wrong.append("a look-up")

        reader = threading.Thread(target=reads)
        reader.start()
        reports: list[RescaleProgress] = []
        done = bench.pool.rebalance(progress=reports.append)
        ended.set()
        reader.join()
        assert not wrong
        assert 0 < done.pages_moved == done.pages_total <= 2 * 10
        assert len(reports) > 2, "in rounds"
        assert pages(bench) == [10] * 4, "as many pages each as before"
        assert max(load.after for load in done.loads) <= 0.25 * 1.15, "as near as ten pages each allow"
        torch.testing.assert_close(read(table, ids, 200), expected, rtol=1e-6, atol=1e-6)
        again = bench.pool.rebalance(dry_run=True)
        assert max(load.before for load in again.loads) <= 0.25 * 1.25
        assert again.pages_total < done.pages_total, "what is even stays, but for the sample's noise"
        assert bench.pool.status().unfinished == ""


def test_training_through_it_is_training_without_it() -> None:
    values = []
    for evened in (False, True):
        with Bench(3) as bench:
            table, ids = facts(bench), hot_ids(3)
            read(table, ids, 160)
            for step in range(6):
                if evened and step in (2, 4):
                    assert bench.pool.rebalance().pages_moved > 0 or step == 4
                loss = (table.gather(ids[:8], torch.ones(8, 32)) - 1.0).square().sum()
                loss.backward()
                table.commit(lr=0.01)
            values.append(table.rows(torch.arange(SLOTS)).clone())
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)


def test_a_rescale_evens_load_too_and_moves_no_page_more_than_without_heat() -> None:
    with Bench(1) as bench:
        table = facts(bench)
        read(table, hot_ids(4), 160)
        reports: list[RescaleProgress] = []
        bench.pool.rescale(4, progress=reports.append)
        assert reports[-1].pages_moved == 30, "three quarters of 40 pages go, whichever they are"
        assert max(load.after for load in reports[-1].loads) <= 0.25 * 1.15
        assert [load.before for load in reports[-1].loads] == [1.0, 0.0, 0.0, 0.0]


def test_a_rescale_by_pages_leads_to_the_same_places_whatever_was_read() -> None:
    places = []
    for reads in (0, 160):
        with Bench(2, rescale_by="pages") as bench:
            table = facts(bench)
            read(table, hot_ids(2), max(reads, 1))
            for shards in (4, 3):
                bench.pool.rescale(shards)
                read(table, hot_ids(4), max(reads, 1))
            places.append(bench.view("facts").placement.owners)
            if reads:
                assert bench.pool.rebalance(dry_run=True).pages_total, "who asks for it by name has load evened"
    np.testing.assert_array_equal(*places)


def test_where_little_was_read_nothing_moves_for_it() -> None:
    with Bench(2) as bench:
        table = facts(bench)
        read(table, hot_ids(2), 10)
        planned = bench.pool.rebalance()
        assert (planned.pages_total, planned.loads) == (0, ())


def test_a_shard_that_does_not_say_is_planned_for_without() -> None:
    with Bench(2) as bench:
        table = facts(bench)
        read(table, hot_ids(2), 160)
        for host in bench.fleet.hosts.values():
            host.faults["read_heat"] = fail(errors.ShardUnavailable("it hangs"))
        assert bench.pool.rebalance(dry_run=True).loads == ()
        bench.pool.rescale(3)
        assert sorted(pages(bench)) == [13, 13, 14]


def test_it_waits_for_what_a_rescale_has_left() -> None:
    with Bench(2, round_bytes=4 * PAGE * 256) as bench:
        facts(bench)
        bench.fleet.hosts[0].faults["pull_pages"] = fail(errors.ShardUnavailable("the wire is cut"))
        bench.fleet.hosts[1].faults["export_pages"] = fail(errors.ShardUnavailable("the wire is cut"))
        moved = 0

        async def later() -> None:
            nonlocal moved
            moved += 1
            if moved > 2:
                raise errors.ShardUnavailable("the wire is cut")

        bench.fleet.hosts[0].faults["pull_pages"] = later
        bench.fleet.hosts[1].faults.clear()
        with pytest.raises(errors.ShardUnavailable, match="half way"):
            bench.pool.rescale(1)
        with pytest.raises(errors.InvalidRequest, match="mempool scale --shards 1"):
            bench.pool.rebalance()
        bench.fleet.hosts[0].faults.clear()
        bench.pool.rescale(1)


def test_a_second_one_meanwhile_is_refused() -> None:
    with Bench(2) as bench:
        facts(bench)

        async def both() -> None:
            first, second = bench.controller.rebalance(), bench.controller.rescale(3)
            await anext(first)
            with pytest.raises(errors.InvalidRequest, match="under way"):
                await anext(second)
            async for _ in first:
                pass

        run(both(), timeout_s=CALL_S)


def told(*heat: float, seen: float = 1e6) -> PageHeat:
    return PageHeat(heat=np.array(heat, np.float32), seen=seen)


def test_a_pair_that_several_owners_counted_counts_once() -> None:
    with Bench(2) as bench:
        bench.pool.create_table(config(num_slots=64, page_slots=16, layout="rows"))
        rows = bench.view("facts")
        found = heat_of(rows, [told(8, 4, 1, 0), told(0, 2, 3, 4)])
        assert found is not None
        assert found.tolist() == [8, 6, 4, 4], "pages that have moved lately were counted at both"
        assert heat_of(rows, [told(8, 4, 1, 0, seen=500), told(0, 0, 0, 0, seen=1)]) is None, "too few"
        assert heat_of(rows, [told(1, 2)]) is None, "another table's"
        assert heat_of(rows, [told(1, 2, 3, float("nan"))]) is None
        bench.pool.drop_table("facts")
        bench.pool.create_table(config(num_slots=64, page_slots=16, layout="columns"))
        columns = bench.view("facts")
        both = heat_of(columns, [told(8, 6, 4, 4), told(8, 6, 4, 4)])
        assert both is not None
        assert both.tolist() == [8, 6, 4, 4]
        (one, other) = loads_of([(columns.schema, both, columns.placement.owners, columns.placement.owners * 0)])
        assert (one.before, one.after, other.before, other.after) == (0.5, 1.0, 0.5, 0.0)
