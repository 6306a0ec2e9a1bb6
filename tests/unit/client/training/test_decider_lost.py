"""A decider is lost, or dropped, with the answer to a Commit: updates are applied once, and none is stuck."""

import pytest

from mempool.client.training.session import Session
from mempool.errors import DataLoss, MempoolError, NotFound, ShardUnavailable

from .scripted import Client, ScriptedPool
from .test_coordinator import LR, commitments

APART = {1: (0, 0, 0), 2: (1, 1, 1), 3: (2, 2, 2)}
ONE_GATE = {1: (0, 0, 0), 2: (1, 1, 1), 3: (1, 1, 1)}
OWNERS = {1: (0, 0, 0), 2: (1, 2, 3), 3: (1, 2, 3)}


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("heard", [(), (2,), (3,), (2, 3)])
@pytest.mark.parametrize("owners", [APART, ONE_GATE, OWNERS])
def test_what_some_gates_have_heard_of_is_applied_once(  # type: ignore[no-untyped-def]
    wait, owners: dict[int, tuple[int, int, int]], heard: tuple[int, ...], dropped: bool
) -> None:
    """Gates have asked the decider before it was gone; the others have dropped the step at its successor's word."""
    client = Client(ScriptedPool(owners))
    pool, (_, two, three) = client.pool, client.sessions

    async def dies(_: object) -> None:
        for shard in pool.shards:
            for table_id in (2, 3):
                if shard.info.shard not in pool.owners[table_id]:
                    continue
                shard.prepared.pop(table_id, None)
                if table_id in heard:
                    shard.applied[table_id].append((1, (1,), LR, 1))
                shard.held = {each for each in shard.held if each[0] != table_id}
        if dropped:
            del pool.owners[1]
        else:
            pool.shards[0].lost = {1}
        raise ShardUnavailable("away", shard=0)

    async def main() -> None:
        pool.shards[0].after["commit"] = [dies]
        await client.push()
        try:
            await client.coordinator.commit(commitments(client.sessions))
        except (DataLoss, NotFound):
            assert await client.coordinator.commit(commitments([two, three])) == [1, 1]
        await client.coordinator.applied([two, three])
        assert [session.counters.updates_committed for session in (two, three)] == [1, 1]
        assert not any(session.book.holds for session in (two, three))
        await client.push(two, three)
        assert await client.coordinator.commit(commitments([two, three])) == [1, 1]
        await client.coordinator.applied([two, three])

    wait(main())
    pool.owners.pop(1, None)
    client.assert_agreed()
    for table_id in (2, 3):
        assert len(pool.shards[pool.owners[table_id][0]].applied[table_id]) == 2


def test_a_gate_that_refuses_the_number_is_no_word_for_the_other_tables(wait) -> None:  # type: ignore[no-untyped-def]
    """One gate has given the number up, another one has applied it: that one's table keeps it."""
    client = Client(ScriptedPool(ONE_GATE))
    pool, (_, two, three) = client.pool, client.sessions

    async def dies(_: object) -> None:
        shard = pool.shards[1]
        shard.forget()
        shard.over[2] = 1
        shard.applied[3].append((1, (1,), LR, 1))
        pool.shards[0].lost = {1}
        raise ShardUnavailable("away", shard=0)

    async def main() -> None:
        pool.shards[0].after["commit"] = [dies]
        await client.push()
        with pytest.raises(DataLoss):
            await client.coordinator.commit(commitments(client.sessions))
        assert await client.coordinator.commit(commitments([two, three])) == [1, 1]
        await client.coordinator.applied([two, three])

    wait(main())
    assert [len(pool.shards[1].applied[table_id]) for table_id in (2, 3)] == [1, 1]
    assert pool.shards[1].applied[2][0][0] > 1


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("tables", [{1: (0, 0, 1)}, {1: (0, 0, 0), 2: (0, 0, 0)}])
def test_what_is_in_doubt_can_be_discarded_once_all_its_tables_are_gone(  # type: ignore[no-untyped-def]
    wait, tables: dict[int, tuple[int, int, int]], dropped: bool
) -> None:
    client = Client(ScriptedPool(tables))
    pool = client.pool

    async def dies(_: object) -> None:
        if dropped:
            pool.owners.clear()
        else:
            pool.shards[0].lost = set(tables)
        raise ShardUnavailable("away", shard=0)

    def gone(session: Session) -> tuple[int, bool]:
        return session.pending, session.book.holds

    async def main() -> None:
        pool.shards[0].after["commit"] = [dies]
        await client.push()
        with pytest.raises(MempoolError) as raised:
            await client.coordinator.commit(commitments(client.sessions))
        assert isinstance(raised.value, NotFound if dropped else DataLoss)
        assert await client.coordinator.discard(client.sessions) == [1] * len(tables)
        assert [gone(session) for session in client.sessions] == [(0, False)] * len(tables)

    wait(main())


@pytest.mark.parametrize("ends", ["committed", "discarded"])
def test_a_step_that_a_gate_says_nobody_decided_is_as_any_that_is_prepared(wait, ends: str) -> None:  # type: ignore[no-untyped-def]
    """Simulation, seed 4388: another owner is away then; what is pushed since is of the same step."""
    client = Client(ScriptedPool({1: (0, 0, 0), 2: (1, 2, 2)}), timeout_s=0.5)
    pool, (_, two) = client.pool, client.sessions

    async def dies(_: object) -> None:
        del pool.owners[1]
        pool.shards[2].before["prepare"] = [ShardUnavailable("away", shard=2)] * 1000
        raise ShardUnavailable("away", shard=0)

    async def main() -> None:
        pool.shards[0].before["commit"] = [dies]
        await client.push()
        with pytest.raises(MempoolError, match=r"'table-2' is not decided"):
            await client.coordinator.commit(commitments(client.sessions))
        pool.shards[2].before.clear()
        await client.push(two)
        if ends == "discarded":
            assert await two.discard() == 2
        else:
            assert await two.commit(lr=LR) == 2
            await client.coordinator.applied([two])
        assert two.pending == 0

    wait(main())
    pool.owners.pop(1, None)
    client.assert_agreed()
