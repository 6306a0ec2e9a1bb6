"""Carries out what ``agreement.rounds`` says: makes its calls, side by side, and tells it what became of them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from mempool.agreement.rounds import (
    Action,
    Answered,
    Call,
    Decided,
    Ended,
    Event,
    Failed,
    Freeze,
    Pull,
    Renew,
    Round,
    Thaw,
    Ticked,
)
from mempool.types.running import Clock

Make = Callable[[Call], Awaitable[object]]


async def carry_out(round_: Round, make: Make, *, on_decided: Callable[[], None], clock: Clock) -> Ended:
    """Carry a round to its end.

    Args:
        round_: It has not begun.
        make: Makes one call; its time is bounded.
        on_decided: Called at once when the round is decided.
        clock: Seconds.

    A cancellation undoes a round that is not decided.
    """
    carrier = _Carrier(make, on_decided)
    try:
        ended = carrier.do(round_.begin(clock()))
        while ended is None:
            ended = carrier.do(round_.handle(await carrier.next_event(round_.next_s, clock), clock()))
        return ended
    except BaseException as error:
        calls = [action for action in round_.abandon(error) if isinstance(action, Thaw)]
        await carrier.close()
        await asyncio.gather(*(make(call) for call in calls), return_exceptions=True)
        raise
    finally:
        await carrier.close()


class _Carrier:
    """The calls of one round that are under way."""

    def __init__(self, make: Make, on_decided: Callable[[], None]) -> None:
        self._make = make
        self._on_decided = on_decided
        self._under_way: dict[asyncio.Task[object], Call] = {}

    def do(self, actions: Iterable[Action]) -> Ended | None:
        """Begin what is to be done; answers how the round ended, where it has."""
        for action in actions:
            if isinstance(action, Ended):
                return action
            if isinstance(action, Decided):
                self._on_decided()
                continue
            if isinstance(action, Thaw):
                self._cancel_what_is_undone()
            self._under_way[asyncio.ensure_future(_made(self._make, action))] = action
        return None

    async def next_event(self, next_s: float | None, clock: Clock) -> Event:
        """What became of one call, or that the time has come."""
        timeout = None if next_s is None else max(0.0, next_s - clock())
        if not self._under_way:
            assert timeout is not None, "a round that waits for nothing has ended"
            await asyncio.sleep(timeout)
            return Ticked()
        done, _ = await asyncio.wait(self._under_way, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        task = next((task for task in self._under_way if task in done), None)
        if task is None:
            return Ticked()
        call = self._under_way.pop(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        return Answered(call) if error is None else Failed(call, error)

    async def close(self) -> None:
        """End what is under way: its answers would change nothing."""
        tasks = list(self._under_way)
        self._under_way.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cancel_what_is_undone(self) -> None:
        for task, call in self._under_way.items():
            if isinstance(call, Freeze | Renew | Pull):
                task.cancel()


async def _made(make: Make, call: Call) -> object:
    return await make(call)
