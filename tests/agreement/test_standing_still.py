"""Ranks that stand still, or drop what they had come with, while others are replaced: nothing is committed that is not
meant, and nothing twice."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

import mempool
from mempool.agreement.groups.home import Groups
from mempool.client import Pool
from mempool.errors import MempoolError, RankLost
from mempool.wire.channels.loop import run
from tests.agreement.ranks import Ranks, push, together
from tests.agreement.test_lost_ranks import LEASE_S, SLOTS, check, commit, config, cut_off, step
from tests.unit.client.grpc_pool import GrpcPoolHere

# On a machine that stands still for most of their short lease too: all is sent again, and checked.
pytestmark = pytest.mark.filterwarnings("ignore:.*this process was silent")


@pytest.fixture
def here() -> Iterator[GrpcPoolHere]:
    pool = GrpcPoolHere(shards=2, lease_s=LEASE_S)
    yield pool
    pool.close()


def stands_still(ranks: Ranks, rank: int) -> None:
    """Its group's home hears nothing more of it by itself; shards do, so that they keep what it has prepared."""
    member = ranks.pools[rank].table("facts").link.session.coordinator.group.member

    async def stop() -> None:
        member._beating.cancel()

    run(stop(), 10.0)


def held(ranks: Ranks) -> int:
    status = ranks.pools[0].status()
    return sum(table.updates_held for shard in status.shards for table in shard.tables)


def test_a_leader_that_stood_still_between_its_prepare_and_its_commit_commits_nothing_of_before(
    here: GrpcPoolHere,
) -> None:
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        coordinator = ranks.pools[0].table("facts").link.session.coordinator
        commit_own, prepared, goes_on = coordinator.commit_own, asyncio.Event(), asyncio.Event()
        stands, has_tried, loop = threading.Event(), threading.Event(), []

        async def commit_later(commitments: Any, **how: Any) -> Any:
            if not prepared.is_set():
                prepared.set()
                sessions = [each.session for each in commitments]
                await coordinator.prepare_own(sessions, want_norm=False, norm_order=0.0, timeout_s=30.0)
                loop.append(asyncio.get_running_loop())
                stands.set()
                await goes_on.wait()
            try:
                return await commit_own(commitments, **how)
            finally:
                has_tried.set()

        coordinator.commit_own = commit_later
        stands_still(ranks, 0)
        for rank, pool in enumerate(ranks.pools):
            push(pool.table("facts"), 1, rank=rank, world_size=2)
        gone = threading.Thread(target=_fails, args=(ranks.pools[1],), daemon=True)

        def lead() -> int:
            return commit(ranks.pools[0])

        def come_back() -> int:
            gone.start()
            assert stands.wait(30.0)
            ranks.kill(1)
            ranks.come_back(1)
            loop[0].call_soon_threadsafe(goes_on.set)
            assert has_tried.wait(30.0)  # before any shard hears of the new generation by another message
            return step(ranks.pools[1], 1, rank=1, world_size=2)

        assert together([lead, come_back]) == [1, 1]
        check(ranks, 2)


def _fails(pool: Pool) -> None:
    """The commit of a process that dies in it."""
    with suppress(MempoolError, RuntimeError, asyncio.CancelledError):
        pool.table("facts").commit()


def test_ranks_that_all_come_back_are_told_of_a_step_that_none_of_them_has_lived_to_say(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        cut = cut_off(ranks, decided=True)
        for rank, pool in enumerate(ranks.pools):
            push(pool.table("facts"), 1, rank=rank, world_size=2)
            threading.Thread(target=_fails, args=(pool,), daemon=True).start()
        assert cut.wait(30.0)
        ranks.kill(0)
        ranks.kill(1)
        groups = together([lambda: ranks.come_back(0), lambda: ranks.come_back(1)])
        assert [group.step for group in groups] == [2, 2]
        ranks.each(lambda rank, pool: step(pool, 2, rank=rank, world_size=2))
        check(ranks, 3)


@pytest.mark.parametrize("dies", [False, True])
def test_what_is_dropped_after_an_error_is_not_committed(here: GrpcPoolHere, dies: bool) -> None:
    """zero_grad() after RankLost, where the other rank dies, or was only silent."""
    with Ranks(here, [config()], world_size=2, reduction="sum") as ranks:
        if dies:
            ranks.kill(0)
        else:
            stands_still(ranks, 0)
        second = ranks.pools[1].table("facts")
        push(second, 5, rank=1, world_size=2)
        with pytest.raises(RankLost):
            second.commit()
        assert second.pending == 1
        assert second.discard() == 1
        assert second.pending == 0

        def come_back() -> int:
            if dies:
                ranks.come_back(0, reduction="sum")
            return step(ranks.pools[0], 0, rank=0, world_size=2)

        def again() -> int:
            time.sleep(0.0 if dies else 0.3)  # where what it had come with stood there, that would be committed
            return step(ranks.pools[1], 0, rank=1, world_size=2)

        assert together([come_back, again]) == [1, 1]
        with mempool.local(shards=1) as alone:
            table = alone.create_table(config())
            push(table, 0, rank=0, world_size=1)
            table.commit()
            rows = table.rows(range(SLOTS))
        assert (second.rows(range(SLOTS)) - rows).norm() <= 1e-5 * rows.norm()


def test_a_leader_goes_past_all_steps_that_another_rank_has_dropped_meanwhile(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=2) as ranks:
        stands_still(ranks, 0)
        second = ranks.pools[1].table("facts")
        for _ in range(20):  # as a loop that goes on with other data after each RankLost
            push(second, 5, rank=1, world_size=2)
            with pytest.raises(RankLost):
                second.commit()
            assert second.discard() == 1
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        check(ranks, 1)


def test_a_step_that_a_dead_leader_had_given_another_number_is_given_back(here: GrpcPoolHere) -> None:
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        for rank, pool in enumerate(ranks.pools):
            push(pool.table("facts"), 1, rank=rank, world_size=2)
        session = ranks.pools[0].table("facts").link.session
        step_ids = {session.table_id: [session.book.open.step_id]}

        async def drop() -> None:  # as shards do where a lease has ended
            await session._router.together(list(step_ids), lambda together: together.discard(step_ids))

        run(drop(), 10.0)
        coordinator, dead = session.coordinator, threading.Event()

        async def prepare_and_die(commitments: Any, **_: Any) -> Any:
            sessions = [each.session for each in commitments]
            await coordinator.prepare_own(sessions, want_norm=False, norm_order=0.0, timeout_s=30.0)
            dead.set()
            await asyncio.Event().wait()

        coordinator.commit_own = prepare_and_die
        threading.Thread(target=_fails, args=(ranks.pools[0],), daemon=True).start()

        def survive() -> None:
            with pytest.raises(RankLost):
                ranks.pools[1].table("facts").commit()

        def die() -> None:
            assert dead.wait(30.0)
            assert held(ranks) > 0
            ranks.kill(0)

        together([survive, die])
        end_s = time.monotonic() + 10.0
        while held(ranks):
            assert time.monotonic() < end_s, "shards hold what nobody will commit"
            time.sleep(0.05)


@pytest.mark.parametrize("stands_in", ["commit_own", "prepare_own"])
def test_a_call_after_an_error_is_not_answered_with_what_came_of_another(here: GrpcPoolHere, stands_in: str) -> None:
    """The leader is silent for its lease in a commit, and the other rank asks for a norm first, as its loop does; or it
    is silent in a prepare, and the other rank commits at once."""
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        coordinator = ranks.pools[0].table("facts").link.session.coordinator
        carry_out, goes_on, loop = getattr(coordinator, stands_in), asyncio.Event(), []

        async def late(*args: Any, **how: Any) -> Any:
            answer = await carry_out(*args, **how)
            loop.append(asyncio.get_running_loop())
            async with asyncio.timeout(30.0):
                await goes_on.wait()
            return answer

        setattr(coordinator, stands_in, late)
        stands_still(ranks, 0)

        def lead() -> int:
            table = ranks.pools[0].table("facts")
            push(table, 1, rank=0, world_size=2)
            if stands_in == "prepare_own":
                table.prepare()
            return commit(ranks.pools[0])

        def follow() -> int:
            table = ranks.pools[1].table("facts")
            push(table, 1, rank=1, world_size=2)
            with pytest.raises(RankLost):
                table.prepare() if stands_in == "prepare_own" else table.commit()
            loop[0].call_soon_threadsafe(goes_on.set)
            if stands_in == "commit_own":
                _until_back(table.prepare)
            return commit(ranks.pools[1])

        assert together([lead, follow]) == [1, 1]
        setattr(coordinator, stands_in, carry_out)
        assert [pool.table("facts").pending for pool in ranks.pools] == [0, 0]
        ranks.each(lambda rank, pool: step(pool, 2, rank=rank, world_size=2))
        check(ranks, 3)


def test_a_rank_that_hears_late_of_a_generation_that_it_is_in_stays_where_it_is(here: GrpcPoolHere) -> None:
    """The answer to its heartbeat is under way while it arrives, is told the same, and steps with the others."""
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        member = ranks.pools[1].table("facts").link.session.coordinator.group.member
        ask, under_way, arrives, loop = member._ask, threading.Event(), asyncio.Event(), []

        async def late(kind: Any, offer: Any = None) -> Any:
            reply = await ask(kind, offer)
            if kind == "beat" and reply.answer == "changed" and not under_way.is_set():
                loop.append(asyncio.get_running_loop())
                under_way.set()
                async with asyncio.timeout(30.0):
                    await arrives.wait()
            return reply

        member._ask = late

        def come_back() -> int:
            ranks.kill(0)
            ranks.come_back(0)
            return step(ranks.pools[0], 1, rank=0, world_size=2)

        def go_on() -> int:
            assert under_way.wait(30.0)
            return step(ranks.pools[1], 1, rank=1, world_size=2)

        assert together([come_back, go_on]) == [1, 1]
        loop[0].call_soon_threadsafe(arrives.set)
        run(member.hear(), 10.0)  # behind what has come late
        ranks.each(lambda rank, pool: step(pool, 2, rank=rank, world_size=2))
        check(ranks, 3)


def test_what_may_be_committed_at_an_earlier_home_is_not_dropped(here: GrpcPoolHere) -> None:
    """All were there, the leader has committed, and the home forgot all of it before the other rank heard."""
    with Ranks(here, [config()], world_size=2) as ranks:
        ranks.each(lambda rank, pool: step(pool, 0, rank=rank, world_size=2))
        second = ranks.pools[1].table("facts")
        meetings: Any = here._engines[0].meet.__self__  # type: ignore[attr-defined]
        member = second.link.session.coordinator.group.member
        ask, lost = member._ask, []

        async def once_lost(kind: Any, offer: Any = None) -> Any:
            reply = await ask(kind, offer)
            if kind != "arrive" or reply.answer != "word" or lost:
                return reply
            lost.append(reply)
            meetings._groups, meetings._incarnation = Groups(lease_s=LEASE_S), meetings._incarnation + 1
            return await ask(kind, offer)

        member._ask = once_lost
        stands_still(ranks, 0)
        push(second, 1, rank=1, world_size=2)

        def miss() -> None:
            with pytest.raises(RankLost):
                second.commit()

        together([lambda: step(ranks.pools[0], 1, rank=0, world_size=2), miss])
        assert second.discard() == 0
        assert second.pending == 1

        def go_on() -> int:
            assert commit(ranks.pools[1]) == 1
            return step(ranks.pools[1], 2, rank=1, world_size=2)

        assert together([lambda: step(ranks.pools[0], 2, rank=0, world_size=2), go_on]) == [1, 1]
        check(ranks, 3)


def _until_back(call: Callable[[], Any]) -> None:
    end_s = time.monotonic() + 30.0
    while True:
        try:
            call()
            return
        except RankLost:
            assert time.monotonic() < end_s
            time.sleep(0.05)
