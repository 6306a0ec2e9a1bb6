"""Work that runs elsewhere, and whoever waits for it."""

import asyncio
import gc

import pytest

from mempool.types.running import to_its_end
from mempool.wire.channels.loop import run


@pytest.mark.parametrize("times", [1, 2])
def test_who_is_cancelled_waits_for_the_end_and_leaves_no_error_behind(times: int) -> None:
    async def cancelled() -> tuple[list[str], list[object]]:
        said, lost, go_on = list[str](), list[object](), asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))

        async def work() -> None:
            await go_on.wait()
            said.append("written")
            raise OSError("the disk is full")

        async def waits() -> None:
            try:
                await to_its_end(work())
            finally:
                said.append("given up")

        try:
            waiting = asyncio.create_task(waits())
            await asyncio.sleep(0)
            for _ in range(times):
                waiting.cancel()
                await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            del waiting
            gc.collect()
            await asyncio.sleep(0)
        finally:
            asyncio.get_running_loop().set_exception_handler(None)
        return said, lost

    assert run(cancelled(), timeout_s=20) == (["written", "given up"], [])


def test_what_it_answers_or_raises_is_the_works() -> None:
    async def answers(number: int) -> int:
        if not number:
            raise OSError("none")
        return number

    assert run(to_its_end(answers(3)), timeout_s=20) == 3
    with pytest.raises(OSError, match="none"):
        run(to_its_end(answers(0)), timeout_s=20)
