"""Steps of several tables under faults, in any order: every update that was committed is applied once, in one order."""

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.client.training.commitment import Commitment
from mempool.errors import Overloaded, ShardUnavailable, StalePlacement

from .scripted import THREE, Client, ScriptedPool

PLACES = {1: THREE, 2: (1, 2, 3), 3: (3, 3, 3)}
_ERRORS = st.sampled_from(
    [
        None,
        None,
        ShardUnavailable("the connection broke"),
        StalePlacement("so says the fault"),
        Overloaded("too much", retry_after_s=0.001),
    ]
)
_METHODS = ("update", "prepare", "commit", "apply", "discard")
_FAULTS = st.fixed_dictionaries({name: st.lists(_ERRORS, max_size=8) for name in _METHODS})
_SOME = st.sets(st.integers(0, 2), min_size=1).map(sorted)
_EVENTS = st.one_of(
    st.tuples(st.sampled_from(["push", "push", "push with d_weights", "commit", "commit", "cut", "prepare"]), _SOME),
    st.tuples(st.sampled_from(["discard"]), _SOME),
    st.tuples(st.sampled_from(["move", "hold off", "thaw"]), st.just([0])),
    st.tuples(st.sampled_from(["forget"]), st.integers(0, 3).map(lambda shard: [shard])),
)


@given(before=_FAULTS, after=_FAULTS, events=st.lists(_EVENTS, max_size=20))
@settings(deadline=None, max_examples=80)
def test_any_history_applies_what_was_committed_once(before: Any, after: Any, events: Any) -> None:
    pool = ScriptedPool(PLACES)
    client = Client(pool)
    for faults, hooks in ((before, "before"), (after, "after")):
        for name, errors in faults.items():
            for number, error in enumerate(errors):
                getattr(pool.shards[number % 4], hooks)[name].append(error)

    def thaw() -> None:
        if any(shard.frozen for shard in pool.shards):
            frozen = [event for shard in pool.shards for event in shard.frozen.values()]
            for shard in pool.shards:
                shard.frozen = {}
            pool.move()
            for event in frozen:
                event.set()

    async def commit(numbers: list[int]) -> None:
        asyncio.get_running_loop().call_later(0.005, thaw)
        await client.coordinator.commit([Commitment(client.sessions[number], lr=0.1) for number in numbers])

    async def cut_off(numbers: list[int]) -> None:
        task = asyncio.create_task(commit(numbers))
        for _ in range(3 * len(events)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def main() -> None:
        for what, which in events:
            sessions = [client.sessions[number] for number in which] if what not in ("forget",) else []
            if what == "push":
                await client.push(*sessions)
            elif what == "push with d_weights":
                await client.push(*sessions, want_weight_grad=True)
            elif what == "commit":
                await commit(which)
            elif what == "cut":
                await cut_off(which)
            elif what == "prepare":
                asyncio.get_running_loop().call_later(0.005, thaw)
                await client.coordinator.prepare(sessions)
            elif what == "discard":
                await client.coordinator.discard(sessions)
            elif what == "move":
                if not any(shard.prepared for shard in pool.shards):
                    pool.move()
            elif what == "hold off" and not any(shard.prepared for shard in pool.shards):
                event = asyncio.Event()
                pool.shards[1].frozen, pool.shards[2].frozen = {1: event}, {1: event, 2: event}
            elif what == "thaw":
                thaw()
            elif what == "forget":
                pool.shards[which[0]].forget()
        await commit([0, 1, 2])
        await client.coordinator.applied(client.sessions)
        await client.coordinator.close(timeout_s=5.0)
        assert len(asyncio.all_tasks()) == 2  # this one, and whoever waits for it

    asyncio.run(asyncio.wait_for(main(), 30.0))
    client.assert_agreed()
    for session in client.sessions:
        history = pool.shards[pool.owners[session.table_id][0]].applied[session.table_id]
        done = [sequence for step in history for sequence in step[1]]
        counters = session.counters
        assert len(done) == len(set(done)) == counters.updates_committed
        assert counters.updates_committed + counters.updates_discarded == counters.updates_pushed
        assert (session.pending, session.pending_bytes) == (0, 0)
    assert not any(shard.prepared or shard.held for shard in pool.shards)


def test_what_a_move_has_dropped_is_sent_again_without_being_asked_for(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE, 2: THREE}))
    pool = client.pool

    async def main() -> None:
        await client.push()
        await client.arrived()
        pool.move()
        pool.clear()
        assert await client.coordinator.commit([Commitment(session, lr=0.5) for session in client.sessions]) == [1, 1]
        await client.coordinator.applied(client.sessions)

    wait(main())
    client.assert_agreed()
    for shard in pool.shards[:3]:  # the first Prepare is refused as late; then all is there when it is asked for
        assert shard.names()[:4] == ["prepare", "update", "update", "prepare"]
        assert shard.names().count("prepare") == 2
    assert client.coordinator.notices() == []
