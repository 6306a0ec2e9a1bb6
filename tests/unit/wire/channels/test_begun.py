"""What is begun on the IO loop: results as often as they are asked, errors of their own, no wait without a bound."""

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from mempool.errors import DeadlineExceeded, MempoolError, Overloaded
from mempool.wire.channels import loop
from mempool.wire.channels.loop import begin, run
from tests.support.interrupts import interruptible
from tests.support.waiting import until

ROOT = Path(__file__).parents[4]
BOUND_S = 20.0


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def fail() -> None:
    raise Overloaded("too much", shard=3, retry_after_s=1.5)


def test_a_result_may_be_asked_for_again_and_by_any_thread() -> None:
    begun = begin(double(4), BOUND_S)
    found = [begun.result(), begun.result()]
    threads = [threading.Thread(target=lambda: found.append(begun.result())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert begun.done()
    assert found == [8] * 6


def test_what_a_thread_begins_starts_in_its_order() -> None:
    started: list[int] = []

    async def note(number: int) -> None:
        started.append(number)

    for begun in [begin(note(number), BOUND_S) for number in range(50)]:
        begun.result()
    assert started == list(range(50))


def test_each_who_asks_gets_an_error_of_its_own_and_nothing_keeps_frames() -> None:
    begun = begin(fail(), BOUND_S)
    errors = []
    for _ in range(2):
        with pytest.raises(Overloaded, match="too much") as caught:
            begun.result()
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert [(error.shard, error.retry_after_s) for error in errors] == [(3, 1.5)] * 2
    assert begun._error is not None
    assert begun._error.__traceback__ is None


def test_it_goes_on_where_a_wait_is_over() -> None:
    let_go = threading.Event()

    async def wait() -> str:
        while not let_go.is_set():
            await asyncio.sleep(0.002)
        return "at last"

    begun = begin(wait(), timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 s"):
        begun.result()
    assert not begun.done()
    let_go.set()
    until(begun.done)
    assert begun.result() == "at last"


def test_who_is_interrupted_may_ask_again() -> None:
    let_go = threading.Event()

    async def wait() -> str:
        while not let_go.is_set():
            await asyncio.sleep(0.002)
        return "at last"

    begun = begin(wait(), BOUND_S)
    with interruptible():
        threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            begun.result()
    assert not begun.done()
    let_go.set()
    assert begun.result() == "at last"
    assert begun.done()


def test_it_runs_to_its_end_though_nobody_holds_it() -> None:
    ended = threading.Event()

    async def work() -> None:
        await asyncio.sleep(0.01)
        ended.set()

    gone = weakref.ref(begin(work(), BOUND_S))
    gc.collect()
    assert ended.wait(BOUND_S)
    run(double(1))
    gc.collect()
    assert gone() is None
    assert not loop._begun


def test_the_loops_own_thread_may_begin_and_not_wait() -> None:
    async def nested() -> None:
        begun = begin(double(1), BOUND_S)
        with pytest.raises(MempoolError, match="on its own IO loop"):
            begun.result()
        while not begun.done():
            await asyncio.sleep(0.002)
        assert begun.result() == 2

    run(nested(), BOUND_S)


def test_a_fork_waits_for_nothing_of_its_parent() -> None:
    script = (
        "import asyncio, os, sys\n"
        "from mempool.errors import MempoolError\n"
        "from mempool.wire.channels.loop import begin\n"
        "async def slow():\n    await asyncio.sleep(60)\n"
        "begun = begin(slow(), 60)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: begun.result()\n"
        "    except MempoolError as error: print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "was forked from process" in done.stdout
