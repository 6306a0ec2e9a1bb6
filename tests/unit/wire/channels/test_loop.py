"""The IO loop: results, time-outs, interrupts, forks, and an interpreter that ends."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mempool.errors import DeadlineExceeded, MempoolError
from mempool.wire.channels.loop import io_loop, run
from tests.support.interrupts import interruptible

ROOT = Path(__file__).parents[3]


def script(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def test_results_and_exceptions_come_back() -> None:
    assert run(double(4)) == 8
    assert run(double(4), timeout_s=10) == 8

    async def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run(fail(), timeout_s=10)


def test_all_threads_get_the_same_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    threads = [threading.Thread(target=lambda: loops.append(io_loop())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(loops) == 8
    assert set(loops) == {io_loop()}


def test_the_time_is_bounded_and_the_coroutine_cancelled() -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 s"):
        run(wait(), timeout_s=0.05)
    assert cancelled.wait(10)


def test_the_coroutines_own_time_out_is_its_own() -> None:
    async def fail() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine") as caught:
        run(fail(), timeout_s=10)
    assert not isinstance(caught.value, DeadlineExceeded)


def test_blocking_the_loop_by_itself_is_refused() -> None:
    async def nested() -> int:
        return run(double(1))

    with pytest.raises(MempoolError, match="on its own IO loop"):
        run(nested(), timeout_s=10)


def test_an_interrupt_cancels_the_coroutine() -> None:
    cancelled = threading.Event()

    async def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with interruptible(), pytest.raises(KeyboardInterrupt):
        run(interrupted(), timeout_s=30)
    assert cancelled.wait(10)


def test_a_forked_process_is_told() -> None:
    done = script("""
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from mempool.errors import MempoolError
from mempool.wire.channels.loop import run
async def nothing(): return 1
run(nothing())
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    run(nothing())
except MempoolError as error:
    os._exit(0 if "was forked from process" in str(error) and "spawn" in str(error) else 2)
os._exit(3)
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_interpreter_ends_with_work_under_way() -> None:
    done = script("""
import asyncio, atexit
from mempool.errors import MempoolError
def late():
    try:
        run(nothing())
    except MempoolError as error:
        print("late:", error)
atexit.register(late)
from mempool.wire.channels.grpc_channel import GrpcChannel
from mempool.wire.channels.loop import io_loop, run
async def nothing(): pass
async def forever():
    try:
        await asyncio.sleep(600)
    finally:
        print("cancelled")
async def connect(): return GrpcChannel("127.0.0.1:1", shard=0)
channel = run(connect())
asyncio.run_coroutine_threadsafe(forever(), io_loop())
run(asyncio.sleep(0.05))
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "cancelled"
    assert "late: the interpreter is ending" in done.stdout


def test_a_call_that_another_thread_waits_for_ends_in_words_as_python_ends() -> None:
    done = script(
        """
import asyncio, atexit, threading
from mempool.wire.channels.loop import run
begun, said = threading.Event(), []
async def wait():
    begun.set()
    await asyncio.sleep(60)
def ask():
    try:
        run(wait())
    except BaseException as error:
        said.append(error)
def tell():  # after the loop was ended, which is registered later
    thread.join(20)
    print(repr(said))
atexit.register(tell)
thread = threading.Thread(target=ask, daemon=True)
thread.start()
assert begun.wait(20)
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "MempoolError" in done.stdout
    assert "this Python ends" in done.stdout


def test_importing_starts_nothing_and_loads_nothing_heavy() -> None:
    done = script("""
import sys, threading
import mempool.wire.channels.channel, mempool.wire.channels.loop, mempool.wire.methods
assert threading.active_count() == 1, threading.enumerate()
heavy = {"ray", "triton", "numba", "starlette", "fastapi", "aiohttp", "flask"} & set(sys.modules)
assert not heavy, heavy
""")
    assert (done.returncode, done.stderr) == (0, "")
