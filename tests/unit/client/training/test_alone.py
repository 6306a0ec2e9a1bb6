"""Who decides on which tables: one at a time, and on all that share a step."""

import asyncio
from types import SimpleNamespace
from typing import Any

from mempool.client.training.alone import Alone


def session(table_id: int) -> Any:
    return SimpleNamespace(table_id=table_id, deciding=asyncio.Lock(), joint=None, applying=None)


def test_who_comes_as_a_lock_is_handed_on_sees_what_its_next_holder_did(wait) -> None:  # type: ignore[no-untyped-def]
    """The lock is free for that moment, and yet another one comes before."""

    async def main() -> None:
        first, second = session(1), session(2)
        leave = asyncio.Event()

        async def hold() -> None:
            async with Alone([first]):
                await leave.wait()

        async def join() -> None:
            async with Alone([first]):
                first.joint = second.joint = SimpleNamespace(sessions={1: first, 2: second})

        async def last() -> bool:
            async with Alone([first]):
                return second.deciding.locked()

        holding = asyncio.create_task(hold())
        await asyncio.sleep(0)
        joining = asyncio.create_task(join())
        await asyncio.sleep(0)
        leave.set()
        last_one = asyncio.create_task(last())
        assert await asyncio.wait_for(last_one, 20.0)
        await asyncio.gather(holding, joining)
        assert not first.deciding.locked()
        assert not second.deciding.locked()

    wait(main())


def test_who_is_cancelled_as_it_waits_holds_nothing(wait) -> None:  # type: ignore[no-untyped-def]
    async def main() -> None:
        first, second = session(1), session(2)
        await second.deciding.acquire()

        async def both() -> None:
            async with Alone([first, second]):
                raise AssertionError("the second is held")

        waiting = asyncio.create_task(both())
        await asyncio.sleep(0)
        assert first.deciding.locked()
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=20.0)
        assert waiting.cancelled()
        assert not first.deciding.locked()

    wait(main())
