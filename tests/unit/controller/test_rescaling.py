"""What is checked before a rescale begins, what it says while it waits, and what is left where it stops half way."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mempool import errors
from mempool.controller.rescaling import check_shards, shards_after
from mempool.types import RescaleProgress, ShardInfo
from mempool.types.caller import Caller, calling, current_caller
from mempool.wire.channels.loop import run

from .bench import CALL_S, Bench, config, fail, train

EVERYTHING = torch.arange(600)
TABLE_BYTES = 19 * 32 * 128 * 8
"""Of config(): 19 row pages of 32 slots, 128 float32 values and as many sums of Adagrad."""


@given(before=st.sets(st.integers(0, 40), min_size=1, max_size=9), shards=st.integers(1, 12))
def test_the_lowest_shards_stay_and_free_numbers_are_filled_from_below(before: set[int], shards: int) -> None:
    after = shards_after(sorted(before), shards)
    assert len(after) == shards == len(set(after))
    kept = sorted(before)[:shards]
    assert set(kept) <= set(after)
    added = sorted(set(after) - before)
    assert added == [shard for shard in range(100) if shard not in kept][: len(added)]


@pytest.mark.parametrize("shards", [0, -1, True, 1.5, "2", 4097, 2**32 - 1])
def test_what_is_no_number_of_shards_is_refused_at_once(shards: object) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"at least 1 shard and at most 4,096"):
        check_shards(shards)  # type: ignore[arg-type]


def test_room_is_checked_before_the_first_page_moves() -> None:
    with Bench(2, memory_bytes=TABLE_BYTES // 2 + 40_000) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        values = table.rows(EVERYTHING)
        calls = len(bench.fleet.hosts[0].calls)
        with pytest.raises(
            errors.InvalidRequest, match=r"shard 0 would need 0\.3 MiB more and has 0\.0 MiB free of 0\.3"
        ):
            bench.pool.rescale(1)
        assert not {"freeze", "pull_pages"}.intersection(bench.fleet.hosts[0].calls[calls:])
        status = bench.pool.status()
        assert (status.wanted_shards, status.unfinished, len(status.shards)) == (2, "", 2)
        assert bench.view("facts").placement.epoch == 1
        assert torch.equal(table.rows(EVERYTHING), values)


def test_new_shards_that_are_too_small_are_stopped_again() -> None:
    with Bench(1) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        bench.fleet.memory_bytes = TABLE_BYTES // 4
        with pytest.raises(errors.InvalidRequest, match=r"shard 1 would need"):
            bench.pool.rescale(2)
        assert sorted(bench.fleet.hosts) == [0]
        assert [info.shard for info in bench.controller.shards] == [0]
        assert bench.view("facts").placement.epoch == 1
        train(table, 0)


def test_resources_are_asked_for_before_a_shard_is_started() -> None:
    with Bench(1) as bench:
        bench.pool.create_table(config())
        bench.fleet.room = 1
        with pytest.raises(errors.ShardUnavailable, match="2 shards more do not fit: there is room for 1"):
            bench.pool.rescale(3)
        assert bench.fleet.incarnation == 1, "none was started"
        bench.pool.rescale(2)


def test_a_rescale_that_moved_nothing_leaves_no_shard_behind() -> None:
    with Bench(1, round_bytes=30_000) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        bench.fleet.hosts[0].faults["freeze"] = fail(errors.DeadlineExceeded("a step is not decided"))
        with pytest.raises(errors.DeadlineExceeded, match=r"a step is not decided$"):
            bench.pool.rescale(3)
        assert sorted(bench.fleet.hosts) == [0]
        status = bench.pool.status()
        assert (status.wanted_shards, status.unfinished) == (1, "")
        bench.fleet.hosts[0].faults.clear()
        train(table, 1)
        bench.pool.rescale(3)


def after(number: int, error: Exception) -> Callable[[], Awaitable[None]]:
    calls = 0

    async def fault() -> None:
        nonlocal calls
        calls += 1
        if calls > number:
            raise error

    return fault


def test_one_that_stops_half_way_says_what_has_moved_and_what_to_run() -> None:
    with Bench(2, round_bytes=70_000) as bench:
        table = bench.pool.create_table(config(layout="rows"))
        other = bench.pool.create_table(config(name="other", layout="rows"))
        values = table.rows(EVERYTHING)
        bench.fleet.hosts[0].faults["pull_pages"] = after(2, errors.ShardUnavailable("the wire is cut"))
        with pytest.raises(errors.ShardUnavailable) as caught:
            bench.pool.rescale(1)
        message = str(caught.value)
        assert message.startswith("the wire is cut. The rescale to 1 shards stopped half way: 8 of 36 pages have moved")
        assert "(8 of 18 of table 'facts', 0 of 18 of table 'other')" in message
        assert "mempool scale --shards 1" in message
        status = bench.pool.status()
        assert (status.rescaling, status.wanted_shards, len(status.shards)) == (False, 1, 2)
        assert "the rescale to 1 shards stopped (the wire is cut): 8 of 36 pages have moved" in status.unfinished
        assert torch.equal(table.rows(EVERYTHING), values)
        train(other, 2)
        bench.fleet.hosts[0].faults.clear()
        bench.pool.rescale(1)
        status = bench.pool.status()
        assert (status.wanted_shards, status.unfinished, len(status.shards)) == (1, "", 1)
        assert torch.equal(table.rows(EVERYTHING), values)


def test_the_same_number_of_shards_finishes_what_was_left() -> None:
    with Bench(1, round_bytes=70_000) as bench:
        bench.pool.create_table(config(layout="rows"))
        start = bench.fleet.start

        async def start_faulty(shard: int, *, fresh: bool = False) -> ShardInfo:
            info = await start(shard, fresh=fresh)
            bench.fleet.hosts[shard].faults["pull_pages"] = after(1, errors.ShardUnavailable("the wire is cut"))
            return info

        bench.fleet.start = start_faulty  # type: ignore[method-assign]
        with pytest.raises(errors.ShardUnavailable, match="half way"):
            bench.pool.rescale(2)
        assert sorted(bench.fleet.hosts) == [0, 1], "it owns pages: it stays"
        bench.fleet.hosts[1].faults.clear()
        bench.pool.rescale(2)
        owners, pages = torch.tensor(bench.view("facts").placement.owners).unique(return_counts=True)
        assert owners.tolist() == [0, 1]
        assert int(pages.max() - pages.min()) <= 2


def test_status_says_what_a_start_waits_for_and_goes_on_saying_it_without_its_watcher() -> None:
    with Bench(1) as bench:
        bench.pool.create_table(config())
        start, go_on = bench.fleet.start, asyncio.Event()

        async def placed_late(shard: int, *, fresh: bool = False) -> ShardInfo:
            await go_on.wait()
            return await start(shard, fresh=fresh)

        bench.fleet.start = placed_late  # type: ignore[method-assign]
        bench.fleet.waits_for = "Ray to place shard 1: needs CPU 1, free 0"

        async def watch_and_leave() -> None:
            reports = bench.controller.rescale(2)
            await anext(reports)
            await reports.aclose()  # type: ignore[attr-defined]
            async with asyncio.timeout(CALL_S):
                while not (status := await bench.controller.status()).waiting_for:
                    await asyncio.sleep(0.01)
                assert status.waiting_for == bench.fleet.waits_for
                assert (status.rescaling, status.wanted_shards, len(status.shards)) == (True, 2, 1)
                go_on.set()
                while (status := await bench.controller.status()).rescaling:
                    await asyncio.sleep(0.01)
                assert (status.waiting_for, status.wanted_shards, len(status.shards)) == ("", 2, 2)

        run(watch_and_leave(), timeout_s=CALL_S)


def test_the_watchers_deadline_does_not_end_a_move() -> None:
    found: list[Caller] = []
    with Bench(1) as bench:
        bench.pool.create_table(config(layout="rows"))

        async def note() -> None:
            found.append(current_caller())

        bench.fleet.hosts[0].faults["freeze"] = note

        async def work() -> None:
            with calling(Caller("a command", time.monotonic() + 30.0)):
                async for _ in bench.controller.rescale(2):
                    pass

        run(work(), timeout_s=CALL_S)
    assert found
    assert set(found) == {Caller()}


def test_closing_while_shards_start_stops_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(1) as bench:
        fleet, begun = bench.fleet, asyncio.Event()
        start = fleet.start

        async def slow(shard: int, *, fresh: bool = False) -> ShardInfo:
            if shard == 2:
                begun.set()
                await asyncio.sleep(CALL_S)
            return await start(shard, fresh=fresh)

        monkeypatch.setattr(fleet, "start", slow)

        async def work() -> None:
            async def watch() -> None:
                async for _ in bench.controller.rescale(3):
                    pass

            watching = asyncio.create_task(watch())
            await begun.wait()
            assert 1 in fleet.hosts
            await bench.controller.close()
            with pytest.raises(errors.ShardUnavailable, match="its controller is closing"):
                await watching
            assert fleet.hosts == {}

        run(work(), timeout_s=CALL_S)


def test_shards_that_the_last_controller_began_to_start_are_waited_for() -> None:
    """Its successor knows them by name alone, until they can be admitted."""
    with Bench(1) as bench:
        bench.pool.create_table(config(layout="rows"))
        info = run(bench.fleet.start(1), timeout_s=CALL_S)
        heir = bench.heir()
        unknown = ShardInfo(shard=1, address="", incarnation=0)
        bench.fleet.hosts[1].faults["views"] = fail(errors.ShardUnavailable("it has no address yet"))
        run(heir.adopt([*bench.controller.shards, unknown], wanted=2), timeout_s=CALL_S)

        async def work() -> None:
            rest = asyncio.ensure_future(_last(heir.rescale(2)))
            async with asyncio.timeout(CALL_S):
                while (await heir.status()).waiting_for != "shard 1 to start":
                    await asyncio.sleep(0.01)
                bench.fleet.hosts[1].faults.clear()
                await heir.shard_restarted(info)
                assert (await rest).done

        run(work(), timeout_s=CALL_S)
        assert run(heir.table("facts"), timeout_s=CALL_S).placement.shards == (0, 1)


def test_a_step_that_is_not_decided_is_waited_for_and_status_says_so() -> None:
    with Bench(2) as bench:
        bench.pool.create_table(config(layout="rows"))
        go_on = asyncio.Event()
        bench.fleet.hosts[0].faults["freeze"] = go_on.wait  # type: ignore[assignment]

        async def work() -> None:
            rest = asyncio.ensure_future(_last(bench.controller.rescale(1)))
            async with asyncio.timeout(CALL_S):
                while "not decided" not in (status := await bench.controller.status()).waiting_for:
                    await asyncio.sleep(0.01)
            assert status.waiting_for.startswith("a step of table 'facts' that is prepared on shard 0 and not decided")
            assert "at most 15 s" in status.waiting_for
            go_on.set()
            assert (await rest).done

        run(work(), timeout_s=CALL_S)


def test_what_a_controller_before_was_asked_for_is_said_until_it_is_so() -> None:
    with Bench(2) as bench:
        bench.pool.create_table(config(layout="rows"))
        heir = bench.heir()
        run(heir.adopt(bench.controller.shards, wanted=3), timeout_s=CALL_S)
        status = run(heir.status(), timeout_s=CALL_S)
        assert status.wanted_shards == 3
        assert status.unfinished == (
            "the pool has 2 shards and was asked for 3: ask again with mempool scale --shards 3, or mempool apply"
        )
        bench.fleet.room = 0
        with pytest.raises(errors.ShardUnavailable):
            bench.pool_of(heir).rescale(4)
        status = run(heir.status(), timeout_s=CALL_S)
        assert (status.wanted_shards, bench.fleet.wanted) == (3, 3), "the one that did not begin changes nothing"
        assert "asked for 3" in status.unfinished
        bench.fleet.room = 9
        bench.pool_of(heir).rescale(3)
        status = run(heir.status(), timeout_s=CALL_S)
        assert (status.wanted_shards, status.unfinished, bench.fleet.wanted) == (3, "", 3)


async def _last(reports: AsyncIterator[RescaleProgress]) -> RescaleProgress:
    return [report async for report in reports][-1]
