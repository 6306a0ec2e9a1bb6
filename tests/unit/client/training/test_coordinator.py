"""Steps of several tables together: what is sent to whom, in how many rounds, and what is said of it when it fails."""

import asyncio

import pytest

from mempool.client.training import coordinator
from mempool.client.training.commitment import Commitment
from mempool.client.training.session import Session
from mempool.errors import DataLoss, ShardUnavailable, StalePlacement

from .scripted import THREE, Client, ScriptedPool

LR = 0.25


def commitments(sessions: list[Session]) -> list[Commitment]:
    return [Commitment(session, lr=LR * session.table_id) for session in sessions]


async def silence(_: object) -> None:
    await asyncio.Event().wait()


def test_three_tables_are_two_rounds_of_one_message_a_shard(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE, 3: THREE}))

    async def main() -> None:
        await client.push()
        await client.arrived()
        client.pool.clear()
        assert await client.coordinator.commit(commitments(client.sessions)) == [1, 1, 1]
        assert [names[:2] for names in client.pool.names()] == [["prepare", "commit"], ["prepare"], ["prepare"], []]
        await client.coordinator.applied(client.sessions)

    wait(main())
    assert client.pool.names() == [["prepare", "commit"], ["prepare", "apply"], ["prepare", "apply"], []]
    (commit,) = client.pool.shards[0].requests("commit")
    assert [part.lr for part in commit.parts] == [0.25, 0.5, 0.75]
    (apply,) = client.pool.shards[2].requests("apply")
    assert [part.version for part in apply.parts] == [1, 1, 1]
    client.assert_agreed()


def test_tables_of_other_gates_are_numbered_by_them_before_the_others_hear(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: (0, 1, 2), 2: (1, 2, 3), 3: (3, 3, 3)}))

    async def main() -> None:
        for _ in range(3):
            await client.push()
            assert await client.coordinator.commit(commitments(client.sessions)) == [1, 1, 1]
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert [session.counters.steps_committed for session in client.sessions] == [3, 3, 3]
    # Shard 3 is gate of table 3, and owns a part of table 2, whose version another shard gives.
    assert client.pool.shards[3].names()[-3:] == ["prepare", "apply", "apply"]


def test_one_shard_is_one_message_for_all_tables(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: (2, 2, 2), 2: (2, 2, 2)}))

    async def main() -> None:
        await client.push()
        await client.arrived()
        client.pool.clear()
        assert await client.coordinator.commit(commitments(client.sessions)) == [1, 1]

    wait(main())
    assert client.pool.shards[2].names() == ["commit"]
    assert all(session.applying is None for session in client.sessions)


def test_a_step_is_acknowledged_by_the_decider_and_the_next_waits_for_the_others(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE}))
    (session,) = client.sessions
    gate = asyncio.Event()

    async def main() -> None:
        async def hold(_: object) -> None:
            await gate.wait()

        client.pool.shards[2].before["apply"] = [hold]
        await client.push()
        assert await session.commit(lr=LR) == 1
        assert (session.pending, session.counters.updates_committed) == (0, 1)
        assert session.book.applying is not None
        await client.push()
        following = asyncio.create_task(session.prepare())
        await asyncio.sleep(0.02)
        assert client.pool.shards[0].names().count("prepare") == 1
        gate.set()
        assert await following is not None
        assert client.pool.shards[0].names().count("prepare") == 2
        assert session.book.applying is None
        assert await session.commit(lr=LR) == 1
        await client.coordinator.applied([session])

    wait(main())
    client.assert_agreed()
    # What was acknowledged goes with every later request.
    assert client.pool.shards[1].requests("update")[-1].envelope.table_version == 1


def test_what_the_others_did_not_hear_is_told_again_by_the_next_call_in_words(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE}), timeout_s=0.1)

    async def main() -> None:
        away = ShardUnavailable("the connection was refused")
        client.pool.shards[2].before["apply"] = [away] * 100_000
        await client.push()
        assert await client.coordinator.commit(commitments(client.sessions)) == [1, 1]
        await asyncio.sleep(0.15)
        with pytest.raises(ShardUnavailable, match=r"Step 1 of tables 'table-1', 'table-2' is decided, and applied in"):
            await client.sessions[1].prepare()
        client.pool.shards[2].before["apply"].clear()
        assert await client.sessions[1].prepare() is None

    wait(main())
    client.assert_agreed()


def test_closing_waits_for_what_is_decided(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE}))

    async def main() -> None:
        async def slow(_: object) -> None:
            await asyncio.sleep(0.05)

        client.pool.shards[1].before["apply"] = [slow]
        await client.push()
        await client.sessions[0].commit(lr=LR)
        await client.coordinator.close(timeout_s=5.0)
        client.assert_agreed()
        client.pool.shards[1].before["apply"] = [silence]
        await client.push()
        await client.sessions[0].commit(lr=LR)
        await client.coordinator.close(timeout_s=0.02)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    wait(main())


def test_an_unknown_outcome_is_asked_for_again_and_says_so(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: (1, 2, 3)}))

    async def main() -> None:
        client.pool.shards[0].after["commit"] = [silence]
        await client.push()
        with pytest.raises(ShardUnavailable, match=r"Whether step 1 of tables .* is decided is not known"):
            await client.coordinator.commit(commitments(client.sessions), timeout_s=0.1)
        assert [session.pending for session in client.sessions] == [1, 1]
        await client.push(client.sessions[1])
        # Whichever table comes next, the step of both is finished first.
        assert await client.sessions[1].commit(lr=9.0) == 2
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert [done[2] for done in client.pool.shards[1].applied[2]] == [0.5, 9.0]
    assert [done[2] for done in client.pool.shards[0].applied[1]] == [0.25]


@pytest.mark.parametrize("noted", [False, True])
def test_a_commit_cut_off_as_its_answer_came_is_neither_dropped_nor_done_again(wait, noted: bool) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE}))

    async def main() -> None:
        await client.push()
        step = asyncio.create_task(client.coordinator.commit(commitments(client.sessions)))

        async def cut_off(_: object) -> None:
            step.cancel()
            if not noted:
                await asyncio.sleep(0)

        client.pool.shards[0].after["commit"] = [cut_off]
        with pytest.raises(asyncio.CancelledError):
            await step
        assert await client.coordinator.discard(client.sessions) == [0, 0]
        await client.push(client.sessions[0])
        assert await client.sessions[0].commit(lr=LR) == (1 if noted else 2)  # with what that one had no time to tell
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert [session.counters.updates_committed for session in client.sessions] == [2, 1]
    assert [done[1] for done in client.pool.shards[0].applied[1]] == [(1,), (2,)]


def test_pages_that_move_hold_a_step_off_and_do_not_fail_it(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE}))
    pool = client.pool

    async def main() -> None:
        thaw = asyncio.Event()
        pool.shards[1].frozen = {2: thaw}
        await client.push()
        step = asyncio.create_task(client.coordinator.commit(commitments(client.sessions)))
        while pool.names()[1][-1:] != ["wait"]:
            await asyncio.sleep(0.01)
        assert not step.done()
        # Nothing is prepared anywhere meanwhile: a freeze elsewhere need not wait.
        assert not any(shard.prepared for shard in pool.shards)
        assert [shard.requests("discard")[0].keep_updates for shard in (pool.shards[0], pool.shards[2])] == [True, True]
        assert pool.names()[1][-1] == "wait"
        pool.shards[1].frozen = {}
        pool.move()
        thaw.set()
        assert await step == [1, 1]
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert client.coordinator.notices() == []


def test_tables_prepared_together_can_be_committed_apart(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE}))
    one, two = client.sessions

    async def main() -> None:
        await client.push()
        prepared = await client.coordinator.prepare(client.sessions)
        assert [each.squared_norm for each in prepared if each] == [3.0, 3.0]
        assert await one.commit(lr=LR) == 1
        assert two.pending == 1
        assert not any(2 in shard.prepared for shard in client.pool.shards)
        assert await two.commit(lr=LR) == 1
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()


def test_a_table_that_is_lost_does_not_hold_up_those_it_was_committed_with(wait) -> None:  # type: ignore[no-untyped-def]
    """Its shard dies when the step is decided and nobody else was told; others are told, and go on."""
    client = Client(ScriptedPool({1: THREE, 2: (2, 2, 3), 3: THREE}))
    pool, (one, two, three) = client.pool, client.sessions

    async def main() -> None:
        pool.shards[3].before["apply"] = [ShardUnavailable("away", shard=3)]
        await client.push()
        await client.coordinator.commit(commitments(client.sessions))
        pool.shards[3].lost = {2}
        await client.push(one, three)
        assert await client.coordinator.commit(commitments([one, three])) == [1, 1]
        await client.push()
        with pytest.raises(DataLoss):
            await client.coordinator.commit(commitments(client.sessions))
        assert await client.coordinator.commit(commitments([one, three])) == [1, 1]
        await client.coordinator.applied([one, three])
        with pytest.raises(DataLoss):
            await two.commit(lr=LR)
        assert await two.discard() == 1

    wait(main())
    del pool.owners[2]
    client.assert_agreed()
    assert len(pool.shards[0].applied[1]) == len(pool.shards[0].applied[3]) == 3


def test_a_decider_that_is_lost_does_not_hold_up_the_other_tables_of_its_step(wait) -> None:  # type: ignore[no-untyped-def]
    """Its shard dies with the answer to a Commit."""
    client = Client(ScriptedPool({1: (0, 1, 1), 2: (1, 2, 3)}))
    pool, (one, two) = client.pool, client.sessions

    async def dies(_: object) -> None:
        pool.shards[0].lost = {1}
        raise ShardUnavailable("away", shard=0)

    async def main() -> None:
        pool.shards[0].after["commit"] = [dies]
        await client.push()
        with pytest.raises(DataLoss, match="Whether step 1 of tables 'table-1', 'table-2' is decided is not known"):
            await client.coordinator.commit(commitments(client.sessions))
        assert await two.commit(lr=LR) == 1
        await client.push(two)
        assert await two.commit(lr=LR) == 1
        await client.coordinator.applied([two])
        with pytest.raises(DataLoss):
            await one.commit(lr=LR)
        assert await one.discard() == 1

    wait(main())
    del pool.owners[1]
    client.assert_agreed()
    assert len(pool.shards[1].applied[2]) == 2


def test_a_discard_waits_for_updates_on_their_way(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE}))

    async def main() -> None:
        async def slow(_: object) -> None:
            await asyncio.sleep(0.02)

        client.pool.shards[1].before["update"] = [slow]
        await client.push()
        assert await client.sessions[0].discard() == 1
        assert not any(shard.held for shard in client.pool.shards)
        assert await client.sessions[0].discard() == 0

    wait(main())
    assert [names.count("discard") for names in client.pool.names()] == [1, 1, 1, 0]


def test_an_update_that_did_not_arrive_is_no_error_and_is_sent_by_the_commit(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE}))

    async def main() -> None:
        client.pool.shards[1].before["update"] = [ShardUnavailable("away"), StalePlacement("old")]
        await client.push()
        await client.push()
        assert await client.sessions[0].commit(lr=LR) == 2
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert client.coordinator.notices() == []


@pytest.mark.parametrize("silent_s", [0.1, 8.0])
def test_updates_that_were_there_and_are_gone_are_told_of_once(wait, silent_s: float) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE}))
    client.coordinator.heartbeats.silence_s = lambda _: silent_s  # type: ignore[method-assign]

    async def main() -> None:
        await client.push()
        await client.push()
        await client.arrived()
        client.pool.shards[1].forget()
        assert await client.coordinator.commit(commitments(client.sessions)) == [2, 2]
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    notices = sorted(client.coordinator.notices())
    assert len(notices) == 2
    assert notices[0].startswith("updates of table 'table-1' were dropped by shards [1]: ")
    why = (
        "pages have moved"
        if silent_s < 5.0
        else "silent for up to 8.0 s, and a shard keeps what a trainer holds for 10 s"
    )
    assert why in notices[0]


def test_a_step_that_was_dropped_when_updates_are_sent_again_goes_under_the_next_number(wait) -> None:  # type: ignore[no-untyped-def]
    """Its trainer stood still between a Prepare that missed some and that."""
    client = Client(ScriptedPool({1: THREE, 2: THREE}))
    decider = client.pool.shards[0]

    async def silent(_: object) -> None:
        client.coordinator.heartbeats.lease_s = 0.01
        await asyncio.sleep(0.02)
        decider.over = {1: 1, 2: 1}

    async def main() -> None:
        await client.push()
        await client.arrived()
        decider.forget()
        decider.after["prepare"] = [silent]
        assert await client.coordinator.commit(commitments(client.sessions)) == [1, 1]
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert [done[0] for done in decider.applied[1]] == [3]
    assert any("a step of tables 'table-1', 'table-2' was dropped" in notice for notice in client.coordinator.notices())


def test_a_step_that_was_dropped_after_silence_goes_under_the_next_number_and_is_told_of(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE}))

    async def main() -> None:
        await client.push()
        await client.coordinator.prepare(client.sessions)
        client.coordinator.heartbeats.lease_s = 0.01
        await asyncio.sleep(0.02)
        for shard in client.pool.shards:
            shard.forget()
        assert await client.coordinator.commit(commitments(client.sessions)) == [1, 1]
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert [done[0] for done in client.pool.shards[0].applied[1]] == [3]
    assert any("a step of tables 'table-1', 'table-2' was dropped" in notice for notice in client.coordinator.notices())


def test_a_number_that_was_given_up_is_told_of_until_all_have_heard(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE}))

    async def main() -> None:
        await client.push()
        await client.sessions[0].prepare()
        client.pool.shards[0].forget()
        client.pool.shards[1].before["discard"] = [StalePlacement("old"), ShardUnavailable("away")]
        assert await client.sessions[0].commit(lr=LR) == 1
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    names = client.pool.shards[1].names()
    assert names.count("discard") == 3
    assert "prepare" not in names[names.index("discard") : -names[::-1].index("discard")]


def test_a_table_that_cannot_be_reached_does_not_hold_up_one_that_shared_a_step_with_it(
    wait,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Simulation, seed 7096: it was dropped, one of its shards is gone, and no controller is there to say so."""
    monkeypatch.setattr(coordinator, "_BACKGROUND_S", 0.2)
    client = Client(ScriptedPool({1: (0, 0, 1), 2: (1, 1, 2)}))
    one, two = client.sessions
    gone = client.pool.shards[0]

    async def main() -> None:
        await client.push()
        await client.coordinator.prepare([one, two])
        gone.before["discard"] = [ShardUnavailable("gone")] * 1000
        assert await two.commit(lr=LR) == 1
        await client.coordinator.applied([two])
        gone.before["discard"].clear()
        client.pool.clear()
        assert await one.commit(lr=LR) == 1
        await client.coordinator.applied([one])

    wait(main())
    assert [len(shard.applied[2]) for shard in client.pool.shards[:3]] == [0, 1, 1]
    assert [len(shard.applied[1]) for shard in client.pool.shards[:3]] == [1, 1, 0]
    assert gone.names()[:2] == ["discard", "prepare"], "what was given up is told before the next step"


def test_commits_of_many_tables_at_once_do_not_wait_for_each_other_in_a_circle(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool(dict.fromkeys(range(1, 5), THREE)))
    one, two, three, four = client.sessions

    async def main() -> None:
        for _ in range(5):
            await client.push()
            await asyncio.gather(
                client.coordinator.commit(commitments([one, two])),
                client.coordinator.commit(commitments([two, three])),
                client.coordinator.commit(commitments([four, one])),
                client.coordinator.prepare([three, four]),
                client.coordinator.commit(commitments([three, four, one])),
            )
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert [session.counters.updates_committed for session in client.sessions] == [5, 5, 5, 5]
