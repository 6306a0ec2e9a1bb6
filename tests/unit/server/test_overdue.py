"""Waits that take too long are ended, by one timer for all of them."""

import asyncio

import pytest

from mempool.errors import DeadlineExceeded
from mempool.server.overdue import Overdue

_SHORT_S = 0.05


async def wait(overdue: Overdue, event: asyncio.Event) -> str:
    waiting = overdue.begin()
    try:
        await event.wait()
    except asyncio.CancelledError:
        if not overdue.is_due(waiting):
            raise
        raise DeadlineExceeded("too long") from None
    finally:
        overdue.end(waiting)
    return "in time"


def test_who_waits_too_long_is_ended_and_may_go_on() -> None:
    async def late() -> str:
        with pytest.raises(DeadlineExceeded):
            await wait(overdue, asyncio.Event())
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        await asyncio.sleep(0)  # it is cancelled no more
        return await wait(overdue, there)

    async def main() -> None:
        early, *others = await asyncio.gather(wait(overdue, there), late(), late())
        assert [early, *others] == ["in time"] * 3

    there = asyncio.Event()
    there.set()
    overdue = Overdue(_SHORT_S)
    asyncio.run(main())


def test_who_is_cancelled_by_others_is_cancelled() -> None:
    async def main() -> None:
        before = asyncio.create_task(wait(overdue, asyncio.Event()))
        await asyncio.sleep(0)
        before.cancel()
        both = asyncio.create_task(wait(overdue, asyncio.Event()))
        await asyncio.sleep(0)
        overdue._look(_Later(asyncio.get_running_loop()))  # type: ignore[arg-type]
        both.cancel()
        for task in (before, both):
            with pytest.raises(asyncio.CancelledError):
                await task

    overdue = Overdue(60.0)
    asyncio.run(main())


def test_one_timer_serves_all_and_nothing_is_kept() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        timers: list[object] = []
        call_at = loop.call_at
        loop.call_at = lambda *given: timers.append(given) or call_at(*given)  # type: ignore[method-assign,func-returns-value]
        there = asyncio.Event()
        there.set()
        for _ in range(100):
            await asyncio.gather(wait(overdue, there), wait(overdue, there))
        assert len(timers) == 1
        assert not overdue._waiting
        assert not overdue._due

    overdue = Overdue(60.0)
    asyncio.run(main())


class _Later:
    """A loop whose clock is a minute ahead."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.call_at = loop.call_at

    def time(self) -> float:
        return self._loop.time() + 61.0
