"""Waits of tests of turns: bounded, and whether there is anything to wait for."""

import asyncio
from collections.abc import Coroutine

BOUND_S = 20.0


def wait(coroutine: Coroutine[object, object, None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(BOUND_S):
            await coroutine

    asyncio.run(main())


async def is_let_through(coroutine: Coroutine[object, object, object]) -> bool:
    """Whether it is done at once; where it is not, it is given up."""
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    if task.done():
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False
