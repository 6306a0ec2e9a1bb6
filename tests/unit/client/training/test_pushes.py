"""Updates on their way: bounded, awaited, and never an error."""

import asyncio

from mempool.client.training.pushes import Pushes


def test_so_many_bytes_at_once_and_one_alone_may_be_larger(wait) -> None:  # type: ignore[no-untyped-def]
    async def main() -> None:
        pushes, gates = Pushes(window_bytes=100), [asyncio.Event() for _ in range(3)]

        async def push(number: int) -> None:
            await gates[number].wait()

        for number, num_bytes in enumerate((60, 40)):
            await pushes.room(num_bytes)
            pushes.start(push(number), num_bytes)
        waiting = asyncio.create_task(pushes.room(50))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert pushes.num_bytes == 100
        gates[0].set()
        await waiting
        pushes.start(push(2), 500)
        settled = asyncio.create_task(pushes.settled())
        gates[1].set()
        await asyncio.sleep(0.01)
        assert not settled.done()
        gates[2].set()
        await settled
        assert pushes.num_bytes == 0
        await pushes.room(1_000)

    wait(main())
