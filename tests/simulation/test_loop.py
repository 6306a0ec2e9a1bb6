"""Simulated loops are loops as asyncio knows them, on time that jumps, and one seed is one history."""

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.simulation.loop import InlineRunner, ProcessLoop, Scheduler, Stuck


def _run(body: Coroutine[Any, Any, Any], seed: int = 1) -> Any:
    scheduler = Scheduler(seed)
    try:
        return scheduler.run(body)
    finally:
        scheduler.close()


def test_sleeping_takes_no_time_and_passes_it() -> None:
    async def body() -> float:
        clock = asyncio.get_running_loop()
        begun_s = clock.time()
        await asyncio.sleep(3600.0)
        return clock.time() - begun_s

    assert _run(body()) == 3600.0


def test_timeouts_locks_events_and_queues_are_asyncios_own() -> None:
    async def body() -> list[object]:
        lock, event, queue = asyncio.Lock(), asyncio.Event(), asyncio.Queue[int]()
        found: list[object] = []

        async def give() -> None:
            async with lock:
                await asyncio.sleep(1.0)
                queue.put_nowait(7)
            event.set()

        task = asyncio.create_task(give())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await event.wait()
        found.append(await queue.get())
        async with lock:
            found.append(asyncio.get_running_loop().time())
        await event.wait()
        await task
        done, pending = await asyncio.wait({asyncio.create_task(asyncio.sleep(9.0))}, timeout=1.0)
        found.append((len(done), len(pending)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 1.0)
        return found

    assert _run(body()) == [7, 1.0, (0, 1)]


async def _letters() -> str:
    found: list[str] = []

    async def say(letter: str) -> None:
        for _ in range(3):
            found.append(letter)
            await asyncio.sleep(0)

    await asyncio.gather(*(say(letter) for letter in "abcd"))
    return "".join(found)


def test_a_seed_says_in_which_order_what_is_ready_runs() -> None:
    orders = {seed: _run(_letters(), seed) for seed in range(20)}
    assert len(set(orders.values())) > 10
    assert orders == {seed: _run(_letters(), seed) for seed in range(20)}


def test_processes_have_clocks_of_their_own() -> None:
    scheduler = Scheduler(1)
    fast = scheduler.loop("fast", begins_s=100.0, speed=2.0)

    async def sleep() -> None:
        await asyncio.sleep(10.0)

    scheduler.run(sleep(), loop=fast)
    assert scheduler.now_s == pytest.approx(5.0)
    assert fast.time() == pytest.approx(110.0)
    fast.set_speed(0.5)
    scheduler.run(sleep(), loop=fast)
    assert scheduler.now_s == pytest.approx(25.0)
    assert fast.time() == pytest.approx(120.0)
    scheduler.close()


def _ticking(loop: ProcessLoop, ticks: list[float]) -> None:
    async def tick() -> None:
        while True:
            await asyncio.sleep(1.0)
            ticks.append(loop.scheduler.now_s)

    loop.create_task(tick())


def test_a_process_that_stands_still_goes_on_late_and_a_dead_one_never() -> None:
    scheduler = Scheduler(1)
    stopped, killed = scheduler.loop("stopped"), scheduler.loop("killed")
    ticks: dict[str, list[float]] = {"stopped": [], "killed": []}
    _ticking(stopped, ticks["stopped"])
    _ticking(killed, ticks["killed"])
    for when_s, do in ((2.5, stopped.stop), (2.5, killed.kill), (7.25, stopped.resume)):
        scheduler.world.call_later(when_s, do)
    scheduler.run(asyncio.sleep(9.0))
    rounded = {name: [round(at_s, 3) for at_s in found] for name, found in ticks.items()}
    assert rounded == {"stopped": [1.0, 2.0, 7.25, 8.25], "killed": [1.0, 2.0]}
    scheduler.close()


def test_what_never_comes_is_said_at_once() -> None:
    async def body() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck):
        _run(body())


def test_a_worker_takes_a_turn_for_each_ring_and_when_its_time_has_come() -> None:
    scheduler = Scheduler(3)
    turns: list[float] = []

    def turn() -> float | None:
        turns.append(scheduler.now_s)
        return 5.0 if len(turns) < 5 else None

    async def body() -> None:
        worker = InlineRunner(scheduler.world, scheduler.random("runner")).worker(turn, name="shard")
        worker.ring()
        worker.ring()
        await worker.join()

    scheduler.run(body())
    assert len(turns) == 5
    assert turns[1] < 0.02
    assert [round(later - earlier) for earlier, later in itertools.pairwise(turns[1:])] == [5, 5, 5]
    scheduler.close()


def test_errors_that_nobody_looks_at_are_kept() -> None:
    scheduler = Scheduler(1)

    def fail() -> None:
        raise ValueError("so")

    scheduler.world.call_soon(fail)
    scheduler.run(asyncio.sleep(1.0))
    assert [str(context["exception"]) for _, context in scheduler.errors] == ["so"]
    scheduler.close()
