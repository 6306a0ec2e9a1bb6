import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest
import torch

from mempool.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    MempoolError,
    Overloaded,
    RequestTooLarge,
    ShardUnavailable,
)
from mempool.observe import Stages
from mempool.shard.steps.budget import Budget
from mempool.shard.work.thread import EngineThread
from mempool.types.caller import Caller, calling


def _run(body: Callable[[EngineThread], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run ``body`` on a thread, within a bound, and close the thread."""

    async def bounded() -> None:
        thread = EngineThread(name="shard 3 of pool 'p'", stages=Stages(), **options)
        try:
            async with asyncio.timeout(30):
                await body(thread)
        finally:
            await thread.close()

    asyncio.run(bounded())


def _raise(error: BaseException) -> Callable[[Any], None]:
    def job(_: Any) -> None:
        raise error

    return job


class _Gate:
    """A job that holds the thread up until it is let go."""

    def __init__(self) -> None:
        self._begun, self._go_on = threading.Event(), threading.Event()

    def __call__(self, _: Any) -> str:
        self._begun.set()
        assert self._go_on.wait(20)
        return "held up"

    async def begun(self) -> None:
        await asyncio.to_thread(self._begun.wait, 20)

    def open(self) -> None:
        self._go_on.set()


def test_jobs_run_in_order_on_one_other_thread() -> None:
    seen: list[tuple[int, int]] = []

    async def body(thread: EngineThread) -> None:
        def job(number: int) -> int:
            seen.append((number, threading.get_ident()))
            return number

        assert await asyncio.gather(*(thread.run("job", job, number) for number in range(50))) == list(range(50))

    _run(body)
    assert [number for number, _ in seen] == list(range(50))
    assert len({ident for _, ident in seen}) == 1
    assert seen[0][1] != threading.get_ident()


def test_own_errors_pass_and_others_become_internal(caplog: pytest.LogCaptureFixture) -> None:
    async def body(thread: EngineThread) -> None:
        with pytest.raises(InvalidRequest, match=r"^wrong$"):
            await thread.run("job", _raise(InvalidRequest("wrong")))
        with caplog.at_level(logging.CRITICAL):
            with pytest.raises(Internal, match=r"shard 3.*gather failed with ValueError: x"):
                await thread.run("gather", _raise(ValueError("x")))
            for none in (
                MemoryError("x"),
                torch.OutOfMemoryError("x"),
                RuntimeError("[enforce] DefaultCPUAllocator: x"),
            ):
                with pytest.raises(Overloaded, match=r"shard 3.*no memory for gather just now") as raised:
                    await thread.run("gather", _raise(none))
                assert raised.value.retryable
                assert raised.value.retry_after_s > 0
        assert await thread.run("job", lambda _: 7) == 7

    _run(body)


def test_a_cancelled_caller_harms_nobody() -> None:
    gate, seen = _Gate(), []

    async def body(thread: EngineThread) -> None:
        running = asyncio.create_task(thread.run("job", gate))
        await gate.begun()
        waiting = asyncio.create_task(thread.run("job", lambda _: seen.append("skipped")))
        after = asyncio.create_task(thread.run("job", lambda _: seen.append("after")))
        await asyncio.sleep(0)
        for task in (running, waiting):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert thread.num_jobs == 1
        gate.open()
        await after

    _run(body)
    assert seen == ["after"]


def test_closing_answers_what_waits_and_refuses_what_comes() -> None:
    async def body(thread: EngineThread) -> None:
        waiting = [asyncio.create_task(thread.run("job", lambda _: 1)) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.gather(thread.close(), thread.close())
        assert [await task for task in waiting] == [1] * 10
        with pytest.raises(ShardUnavailable, match=r"shard 3 of pool 'p' is closed"):
            await thread.run("job", lambda _: 1)
        with pytest.raises(ShardUnavailable, match="is closed"):
            thread.check_open()

    before = threading.active_count()
    _run(body)
    assert threading.active_count() <= before


def test_a_thread_serves_several_loops() -> None:
    thread = EngineThread(name="shard", stages=Stages())

    async def ask() -> Any:
        async with asyncio.timeout(20):
            return await thread.run("job", lambda _: 1)

    assert [asyncio.run(ask()) for _ in range(3)] == [1, 1, 1]
    asyncio.run(thread.close())


def test_long_work_is_done_in_pieces_with_others_in_between() -> None:
    seen: list[str] = []
    budget = Budget(10**6)

    def long(_: Any) -> Generator[None, None, str]:
        yield
        for piece in range(5):
            seen.append(f"piece {piece}")
            yield
        return "done"

    async def body(thread: EngineThread) -> None:
        gate = _Gate()
        first = asyncio.create_task(thread.run("job", gate))
        await gate.begun()
        whole = asyncio.create_task(thread.run("long", long, caller=Caller(name="a")))
        others = [
            asyncio.create_task(thread.run("small", lambda _: seen.append("small"), caller=Caller(name="b")))
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        gate.open()
        assert await whole == "done"
        await asyncio.gather(first, *others)

    _run(body, budget=budget)
    assert [what for what in seen if what != "small"] == [f"piece {number}" for number in range(5)]
    assert seen[-1] == "piece 4", "the small ones came in between"
    assert budget.queued_bytes == 0


def test_an_answer_that_has_no_room_is_refused_before_it_is_made() -> None:
    seen = []
    budget = Budget(10**6)

    async def body(thread: EngineThread) -> None:
        def job(num_bytes: int) -> int:
            thread.reserve(num_bytes)
            seen.append(num_bytes)
            return budget.queued_bytes

        with pytest.raises(RequestTooLarge, match=r"the answer to long of 1,000,00.,... bytes does not fit"):
            await thread.run("long", job, 10**9)
        assert await thread.run("long", job, 10**5) >= 10**5
        assert budget.queued_bytes == 0

    _run(body, budget=budget)
    assert seen == [10**5]


def test_the_rest_of_cancelled_work_is_left_out() -> None:
    seen: list[int] = []
    begun = threading.Event()

    def long(_: Any) -> Generator[None, None, None]:
        for piece in range(100_000):
            seen.append(piece)
            begun.set()
            time.sleep(0.001)
            yield

    async def body(thread: EngineThread) -> None:
        task = asyncio.create_task(thread.run("long", long))
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await thread.run("job", lambda _: None)
        count = len(seen)
        await thread.run("job", lambda _: None)
        assert len(seen) == count < 100_000

    _run(body)


def test_a_job_whose_time_is_over_is_not_begun() -> None:
    seen: list[str] = []

    async def body(thread: EngineThread) -> None:
        with calling(Caller(name="a", deadline_s=time.monotonic() - 1.0)), pytest.raises(DeadlineExceeded):
            await thread.run("job", lambda _: seen.append("late"))
        gate = _Gate()
        first = asyncio.create_task(thread.run("job", gate))
        await gate.begun()
        with calling(Caller(name="a", deadline_s=time.monotonic() + 0.05)):
            late = asyncio.create_task(thread.run("gather", lambda _: seen.append("late")))
        await asyncio.sleep(0.1)
        gate.open()
        with pytest.raises(DeadlineExceeded, match="gather: the call's time was over before its turn came"):
            await late
        assert await first == "held up"

    _run(body)
    assert not seen


def test_waiting_for_something_keeps_the_job_counted() -> None:
    budget = Budget(10**6)
    rounds: list[int] = []

    async def body(thread: EngineThread) -> None:
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def again(result: Any) -> Any:
            return woken if result == "wait" else None

        def job(request: str) -> str:
            rounds.append(len(rounds))
            return "wait" if len(rounds) == 1 else request

        task = asyncio.create_task(thread.run("job", job, "answer", cost=5000, again=again))
        while not rounds:
            await asyncio.sleep(0.001)
        assert budget.queued_bytes == 5000
        woken.set_result(None)
        assert await task == "answer"

    _run(body, budget=budget)
    assert (len(rounds), budget.queued_bytes) == (2, 0)


@pytest.mark.parametrize("error", [InvalidRequest("wrong"), ValueError("x"), MemoryError("x"), None])
def test_nothing_of_a_call_that_ended_lives_on(error: Exception | None, caplog: pytest.LogCaptureFixture) -> None:
    """Without the cyclic collector: an error holds no frame that holds the request, whoever keeps the error."""
    kept: list[BaseException] = []

    async def body(thread: EngineThread) -> None:
        async def ask() -> weakref.ref[torch.Tensor]:
            request = torch.zeros(1000)
            alive = weakref.ref(request)

            def job(asked: torch.Tensor) -> float:
                local = asked.sum()
                if error is not None:
                    raise error
                return float(local)

            try:
                await thread.run("job", job, request)
            except MempoolError as raised:
                kept.append(raised.with_traceback(None))
            return alive

        alive = await ask()
        await thread.run("job", lambda _: None)
        assert alive() is None

    gc.disable()
    try:
        with caplog.at_level(logging.CRITICAL):
            _run(body)
    finally:
        gc.enable()
    assert len(kept) == (error is not None)


def test_a_call_cancelled_while_it_waits_is_freed_at_once() -> None:
    async def body(thread: EngineThread) -> None:
        gate = _Gate()
        first = asyncio.create_task(thread.run("job", gate))
        await gate.begun()
        request = torch.zeros(1000)
        alive = weakref.ref(request)
        task = asyncio.create_task(thread.run("job", lambda _: None, request))
        del request
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        del task
        assert alive() is None
        gate.open()
        await first

    gc.disable()
    try:
        _run(body)
    finally:
        gc.enable()


class _Broken(BaseException):
    pass


@pytest.mark.parametrize("how", ["base exception", "device"])
def test_a_thread_that_cannot_go_on_tells_everybody_and_ends(how: str, caplog: pytest.LogCaptureFixture) -> None:
    told: list[BaseException] = []
    failing = threading.Event()

    def probe() -> None:
        if failing.is_set():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def body(thread: EngineThread) -> None:
        gate = _Gate()
        first = asyncio.create_task(thread.run("job", gate))
        await gate.begun()
        error: BaseException = _Broken("no more") if how == "base exception" else RuntimeError("CUDA error")
        bad = asyncio.create_task(thread.run("gather", _raise(error)))
        others = [asyncio.create_task(thread.run("job", lambda _: 1)) for _ in range(3)]
        await asyncio.sleep(0)
        failing.set()
        gate.open()
        assert await first == "held up"
        for task in (bad, *others):
            with pytest.raises(ShardUnavailable, match=r"shard 3 of pool 'p' has ended: .*(no more|illegal memory)"):
                await task
        with pytest.raises(ShardUnavailable, match="has ended"):
            await thread.run("job", lambda _: 1)

    with caplog.at_level(logging.CRITICAL, logger="nobody"):
        logging.disable(logging.CRITICAL)
        try:
            _run(body, probe=probe, on_fatal=told.append)
        finally:
            logging.disable(logging.NOTSET)
    assert len(told) == 1


def test_a_failure_on_a_device_that_works_ends_nothing() -> None:
    async def body(thread: EngineThread) -> None:
        logging.disable(logging.CRITICAL)
        try:
            with pytest.raises(Internal):
                await thread.run("job", _raise(RuntimeError("CUDA error: invalid argument")))
        finally:
            logging.disable(logging.NOTSET)
        assert await thread.run("job", lambda _: 1) == 1

    _run(body)


def test_what_is_kept_is_looked_after_though_nothing_else_happens() -> None:
    looked: list[int] = []

    def upkeep() -> bool:
        looked.append(len(looked))
        return len(looked) < 3

    async def body(thread: EngineThread) -> None:
        await thread.run("job", lambda _: None)
        while len(looked) < 3:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)

    _run(body, upkeep=upkeep, upkeep_s=0.005)
    assert len(looked) == 3, "with nothing left to look after it sleeps"


def test_a_thread_that_is_closed_keeps_nothing_of_who_asks_it() -> None:
    async def body(thread: EngineThread) -> None:
        await thread.close()
        for _ in range(3):
            with pytest.raises(ShardUnavailable):
                thread.begin("update", str, torch.zeros(1), cost=1, timeout_s=1.0)
        assert thread.num_jobs == 0

    _run(body)
