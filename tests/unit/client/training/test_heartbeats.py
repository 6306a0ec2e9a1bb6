"""Heartbeats: to whom, how often, and when not."""

import asyncio
from types import SimpleNamespace

import pytest

from mempool.client.training import heartbeats as training_heartbeats

from .scripted import THREE, Client, ScriptedPool


async def until(true: object, *, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():  # type: ignore[operator]
            await asyncio.sleep(0.005)


def test_shards_that_hold_anything_hear_of_it_and_nobody_else_does(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: (0, 1, 1), 2: (1, 2, 2), 3: (3, 3, 3)}))
    for shard in client.pool.shards:
        shard.lease_s = 0.15

    async def main() -> None:
        client.coordinator.heartbeats.lease_s = 0.15
        await client.push(client.sessions[0])
        await until(lambda: len(client.pool.shards[1].requests("heartbeat")) >= 2)
        assert [bool(shard.requests("heartbeat")) for shard in client.pool.shards] == [True, True, False, False]
        beat = client.pool.shards[0].requests("heartbeat")[0]
        assert (beat.group, beat.rank, beat.incarnation) == ("g", 0, 1)
        # One task and one message a shard, however many tables are trained.
        await client.push(client.sessions[1])
        count = len(client.pool.shards[1].requests("heartbeat"))
        await until(lambda: client.pool.shards[2].requests("heartbeat"))
        assert len(client.pool.shards[1].requests("heartbeat")) - count <= 2
        await client.sessions[0].commit(lr=0.1)
        await client.sessions[1].commit(lr=0.1)
        await client.coordinator.applied(client.sessions)
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        client.pool.clear()
        await asyncio.sleep(0.12)
        assert not any(shard.calls for shard in client.pool.shards)
        await client.push(client.sessions[0])
        await until(lambda: client.pool.shards[0].requests("heartbeat"))
        await client.coordinator.close(timeout_s=1.0)
        await client.push(client.sessions[0])
        await client.arrived()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    wait(main())


def test_the_lease_is_learnt_and_silence_is_known(wait) -> None:  # type: ignore[no-untyped-def]
    client = Client(ScriptedPool({1: THREE}))
    heartbeats = client.coordinator.heartbeats
    for shard in client.pool.shards:
        shard.lease_s = 0.3

    async def main() -> None:
        heartbeats.lease_s = 0.15
        await client.push()
        await until(lambda: heartbeats.lease_s == 0.3)
        await until(lambda: len(client.pool.shards[0].requests("heartbeat")) >= 3)
        assert 0.05 < heartbeats.silence_s(0) < 1.0
        assert heartbeats.silence_s(0) < 0.2
        await client.coordinator.close(timeout_s=1.0)

    wait(main())


def test_a_shard_that_hangs_delays_nobodys_beat_and_the_first_comes_soon(  # type: ignore[no-untyped-def]
    wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(ScriptedPool({1: THREE}))
    heartbeats = client.coordinator.heartbeats
    pauses_s: list[float] = []
    sleep = asyncio.sleep

    async def slept(pause_s: float) -> None:
        pauses_s.append(pause_s)
        await sleep(min(pause_s, 0.2))

    async def never(_: object) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        monkeypatch.setattr(training_heartbeats, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": slept}))
        client.pool.shards[1].heartbeat = never
        await client.push()
        await until(lambda: heartbeats.lease_s == 0.6)
        assert pauses_s[0] < 0.4  # not a third of ten seconds: how long the lease is is not known yet
        del pauses_s[:]
        await until(lambda: len(pauses_s) >= 4)
        assert max(pauses_s[1:]) < 0.1  # the beat itself took its 0.2 s: the next is due
        await client.coordinator.close(timeout_s=1.0)

    for shard in client.pool.shards:
        shard.lease_s = 0.6
    wait(main())
