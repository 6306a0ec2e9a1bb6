"""Jobs whose turns are taken by who lined them up: none is forgotten between two threads, and none ends them both."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from mempool.errors import ShardUnavailable
from mempool.observe import Stages
from mempool.shard.work.thread import EngineThread

BOUND_S = 20.0


def go(body: Callable[[EngineThread], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def bounded() -> None:
        thread = EngineThread(name="shard 3", stages=Stages(), **options)
        try:
            async with asyncio.timeout(BOUND_S):
                await body(thread)
        finally:
            await thread.close()

    asyncio.run(bounded())


class Asked:
    """A job that was lined up quietly: ``told`` is set with what came of it."""

    def __init__(self, thread: EngineThread, run: Callable[[Any], Any], *, caller: str = "me") -> None:
        self.told = asyncio.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self.take_back = thread.line_up(
            "job", run, None, tell=self._tell, cost=1, timeout_s=1e6, caller=caller, quiet=True
        )

    def _tell(self, result: Any, error: BaseException | None) -> None:
        self.result, self.error = result, error
        self._loop.call_soon_threadsafe(self.told.set)


def in_pieces(number: int) -> Callable[[Any], Generator[None, None, int]]:
    def job(_: Any) -> Generator[None, None, int]:
        for _ in range(number):
            yield
        return number

    return job


def test_what_is_kept_is_looked_after_though_nobody_rings_for_it() -> None:
    looked = asyncio.Event()

    async def body(thread: EngineThread) -> None:
        loop = asyncio.get_running_loop()
        looks.append(lambda: loop.call_soon_threadsafe(looked.set))
        await thread.run("job", lambda _: None)
        await asyncio.wait_for(looked.wait(), BOUND_S)  # nothing is kept: the thread rests
        looked.clear()
        asked = Asked(thread, lambda _: 7)
        while not thread.take_turn():  # it is still at what it looked after
            await asyncio.sleep(0)
        await asked.told.wait()
        assert asked.result == 7
        await looked.wait()

    looks: list[Callable[[], Any]] = []

    def upkeep() -> bool:
        looks[0]()
        return False

    go(body, upkeep=upkeep, upkeep_s=0.05)


def test_a_job_that_is_handed_over_as_its_turn_begins_is_done_to_its_end() -> None:
    """Its first piece is the thread's, and whoever lined it up is told to see to it no more."""
    now_s = 0.0

    async def body(thread: EngineThread) -> None:
        nonlocal now_s
        await thread.run("job", lambda _: None)
        hands.append(thread.hand_over)
        asked = Asked(thread, in_pieces(5))
        now_s = 100.0
        await thread.run("job", lambda _: None)
        await asked.told.wait()
        assert asked.result == 5

    hands: list[Callable[[], None]] = []

    def upkeep() -> bool:
        while hands:
            handing = threading.Thread(target=hands.pop())
            handing.start()
            handing.join()
        return True

    go(body, upkeep=upkeep, upkeep_s=50.0, clock=lambda: now_s)


def test_a_job_whose_turn_begins_is_told_of_the_end(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0

    async def body(thread: EngineThread) -> None:
        nonlocal now_s
        await thread.run("job", lambda _: None)
        asked = Asked(thread, lambda _: None)
        now_s = 100.0
        thread.hand_over()
        await asked.told.wait()
        assert isinstance(asked.error, ShardUnavailable)

    def upkeep() -> bool:
        raise SystemError

    go(body, upkeep=upkeep, upkeep_s=50.0, clock=lambda: now_s)
    assert "cannot go on" in caplog.text


def test_what_is_kept_is_looked_after_by_the_thread_alone() -> None:
    """It may wait for a disk, and who takes turns here has others to answer."""
    now_s = 0.0
    by: list[str] = []

    async def body(thread: EngineThread) -> None:
        nonlocal now_s
        await thread.run("job", lambda _: None)
        for _ in range(3):
            now_s += 100.0
            asked = Asked(thread, in_pieces(2))
            while thread.take_turn():
                pass
            thread.hand_over()
            await asked.told.wait()
            await thread.run("job", lambda _: None)

    def upkeep() -> bool:
        by.append(threading.current_thread().name)
        return True

    go(body, upkeep=upkeep, upkeep_s=50.0, clock=lambda: now_s)
    assert set(by) == {"shard 3"}
    assert len(by) >= 3


def test_a_failure_that_nobody_survives_ends_it_once_wherever_the_turn_was(caplog: pytest.LogCaptureFixture) -> None:
    ends: list[BaseException] = []

    class Broken(BaseException):
        pass

    def breaks(_: Any) -> None:
        raise Broken("no more")

    async def body(thread: EngineThread) -> None:
        several = [Asked(thread, run) for run in (breaks, in_pieces(2), lambda _: 1)]
        assert not thread.take_turn()
        for asked in several:
            await asked.told.wait()
            assert isinstance(asked.error, ShardUnavailable)
        with pytest.raises(ShardUnavailable, match="no more"):
            Asked(thread, lambda _: 1)

    go(body, on_fatal=ends.append)
    assert len(ends) == 1
    assert "cannot go on" in caplog.text
