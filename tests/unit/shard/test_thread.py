import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mempool.errors import Internal, InvalidRequest, ShardUnavailable
from mempool.observe import Stages
from mempool.shard.thread import EngineThread


def _run(body: Callable[[EngineThread], Coroutine[Any, Any, None]]) -> None:
    """Run ``body`` on a thread, within a bound, and close the thread."""

    async def bounded() -> None:
        thread = EngineThread(name="shard 3 of pool 'p'", stages=Stages())
        try:
            async with asyncio.timeout(30):
                await body(thread)
        finally:
            await thread.close()

    asyncio.run(bounded())


def _raise(error: Exception) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def test_jobs_run_in_order_on_one_other_thread() -> None:
    seen: list[tuple[int, int]] = []

    async def body(thread: EngineThread) -> None:
        def job(number: int) -> Callable[[], int]:
            return lambda: seen.append((number, threading.get_ident())) or number

        assert await asyncio.gather(*(thread.run("job", job(number)) for number in range(50))) == list(range(50))

    _run(body)
    assert [number for number, _ in seen] == list(range(50))
    assert len({ident for _, ident in seen}) == 1
    assert seen[0][1] != threading.get_ident()


def test_own_errors_pass_and_others_become_internal(caplog: pytest.LogCaptureFixture) -> None:
    async def body(thread: EngineThread) -> None:
        with pytest.raises(InvalidRequest, match=r"^wrong$"):
            await thread.run("job", _raise(InvalidRequest("wrong")))
        with (
            caplog.at_level(logging.CRITICAL),
            pytest.raises(Internal, match=r"shard 3.*gather failed with ValueError: x"),
        ):
            await thread.run("gather", _raise(ValueError("x")))
        assert await thread.run("job", lambda: 7) == 7

    _run(body)


def test_a_cancelled_caller_harms_nobody() -> None:
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def hold_up() -> None:
        begun.set()
        assert go_on.wait(20)
        seen.append("held up")

    async def body(thread: EngineThread) -> None:
        running = asyncio.create_task(thread.run("job", hold_up))
        waiting = asyncio.create_task(thread.run("job", lambda: seen.append("skipped")))
        after = asyncio.create_task(thread.run("job", lambda: seen.append("after")))
        await asyncio.to_thread(begun.wait, 20)
        for task in (running, waiting):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        go_on.set()
        await after

    _run(body)
    # What had begun takes effect; what had not is left out.
    assert seen == ["held up", "after"]


def test_closing_answers_what_waits_and_refuses_what_comes() -> None:
    async def body(thread: EngineThread) -> None:
        waiting = [asyncio.create_task(thread.run("job", lambda: 1)) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.gather(thread.close(), thread.close())
        assert [await task for task in waiting] == [1] * 10
        with pytest.raises(ShardUnavailable, match="shard 3 of pool 'p' is closed"):
            await thread.run("job", lambda: 1)

    before = threading.active_count()
    _run(body)
    assert threading.active_count() <= before


def test_a_thread_serves_several_loops() -> None:
    thread = EngineThread(name="shard", stages=Stages())

    async def ask() -> int:
        async with asyncio.timeout(20):
            return await thread.run("job", lambda: 1)

    assert [asyncio.run(ask()) for _ in range(3)] == [1, 1, 1]
    asyncio.run(thread.close())
