"""A table is dropped while a step of it and of others is under way: the others go on."""

import pytest

from mempool.client.training.commitment import Commitment
from mempool.client.training.session import Session
from mempool.errors import NotFound, ShardUnavailable

from .scripted import THREE, Client, ScriptedPool

LR = 0.25


def commitments(sessions: list[Session]) -> list[Commitment]:
    return [Commitment(session, lr=LR * session.table_id) for session in sessions]


def test_a_table_dropped_from_a_prepared_step_leaves_the_others(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE}))

    async def main() -> None:
        await client.push()
        await client.coordinator.prepare(client.sessions)
        assert await client.coordinator.discard([client.sessions[0]]) == [1]
        assert not any(shard.prepared for shard in client.pool.shards)
        assert await client.coordinator.commit(commitments(client.sessions)) == [0, 1]
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    assert client.pool.shards[0].applied[1] == []


def test_a_table_that_is_dropped_does_not_hold_up_those_it_was_committed_with(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE, 3: THREE}))
    pool = client.pool

    async def main() -> None:
        pool.shards[1].before["apply"] = [NotFound("no such table", shard=1)]
        await client.push()
        await client.coordinator.commit(commitments(client.sessions))
        del pool.owners[2]
        await client.push(client.sessions[0])
        assert await client.sessions[0].commit(lr=LR) == 1
        await client.push(client.sessions[0], client.sessions[2])
        await client.coordinator.prepare([client.sessions[0], client.sessions[2]])
        del pool.owners[3]
        client.router.forget(3)
        with pytest.raises(NotFound):
            await client.coordinator.commit(commitments([client.sessions[0], client.sessions[2]]))
        assert await client.sessions[0].commit(lr=LR) == 1
        await client.coordinator.applied([client.sessions[0]])

    wait(main())
    client.assert_agreed()


def test_a_table_of_which_nobody_says_that_it_is_dropped_is_no_word_of_those_it_was_committed_with(wait) -> None:  # type: ignore[no-untyped-def]
    """Simulation, seed 318: some of its shards have dropped it, and no controller is there to say so."""
    client = Client(ScriptedPool({1: THREE, 2: THREE}), timeout_s=0.3)
    one, _ = client.sessions

    async def main() -> None:
        client.pool.shards[1].before["apply"] = [NotFound("shard 1 has no table 2", shard=1)] * 1000
        await client.push()
        await client.coordinator.commit(commitments(client.sessions))
        await client.push(one)
        with pytest.raises(ShardUnavailable, match=r"shard 1 has no table 2: .* is decided"):
            await one.commit(lr=LR)
        client.pool.shards[1].before["apply"].clear()
        assert await one.commit(lr=LR) == 1
        await client.coordinator.applied([one])

    wait(main())
    client.assert_agreed()
