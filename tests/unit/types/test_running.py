"""Work that runs elsewhere, and whoever waits for it."""

import asyncio
import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mempool.types.running import Latch, to_its_end
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


def test_an_interpreter_that_ends_waits_for_the_turn_that_is_under_way_and_for_no_other() -> None:
    script = (
        "import time\n"
        "from mempool.types.running import THREADS, ONLY_WHEN_RUNG\n"
        "def turn():\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(0.3)\n"
        "    print('done', flush=True)\n"
        "    return ONLY_WHEN_RUNG\n"
        "idle = THREADS.worker(turn, name='idle')\n"
        "busy = THREADS.worker(turn, name='busy')\n"
        "for _ in range(50): busy.ring()\n"
        "time.sleep(0.1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["begun", "done"]
    assert not done.stderr


def test_all_who_wait_for_a_latch_hear_of_it_and_who_gives_up_is_forgotten() -> None:
    latch = Latch()
    assert not latch.wait(0.01)
    assert not latch._waiting
    heard: list[bool] = []
    threads = [threading.Thread(target=lambda: heard.append(latch.wait(20.0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    latch.set()
    for thread in threads:
        thread.join(20.0)
    assert heard == [True] * 4
    assert latch.is_set
    assert latch.wait(0.0)
    latch.set()
