"""[NURSERY] Starts clients by fork, so that a new one is there at once, and kills them.

It has loaded all that a client needs, and started no thread. Commands, a JSON list each: ["start", way] answers the
client's number; ["kill", number] ends it by SIGKILL, and ["stop", number] lets it end: both answer its exit code, null
where it did not end.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mempool.bench.processes.child import Parent
from mempool.bench.serve.contenders import Contender, pools
from mempool.bench.serve.shapes import Pairs, Shape, TableSize, drawn_pairs

_STOP_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 60.0
#: Of so many look-ups of a thread, one is compared with float64.
_CHECK_EVERY = 64
#: How soon a client that fails ends.
_LOOK_S = 0.1


def serve(
    parent: Parent, *, address: str, size: dict[str, int], shapes: Sequence[Sequence[int]], threads: int, pause_s: float
) -> None:
    """Do what the parent asks, until it wants no more; then end all that are left.

    Args:
        parent: Who asks.
        address: Of the pool.
        size: Of its table.
        shapes: What clients ask for, in turn.
        threads: Of each client, which all ask again and again.
        pause_s: Between two calls of a thread.
    """
    table = TableSize(**size)
    asked = [Shape(*shape) for shape in shapes]
    running: dict[int, tuple[int, int]] = {}
    started = 0
    parent.say("ready")
    try:
        while (command := parent.hear()) is not None:
            what, given = command
            if what == "start":
                started += 1
                asks = partial(_ask, address, given, table, asked, started, threads, pause_s)
                running[started] = _forked(asks, [stop for _, stop in running.values()])
                parent.say(started)
                continue
            pid, stop = running.pop(given)
            if what == "kill":
                os.kill(pid, signal.SIGKILL)
            os.close(stop)
            parent.say(_ended(pid))
    finally:
        for pid, stop in running.values():
            os.close(stop)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _forked(asks: Callable[[int], None], others: Sequence[int]) -> tuple[int, int]:
    """The pid of a client, and what to close for it to end. others: What is to be closed for others to."""
    stopped, stop = os.pipe()
    if pid := os.fork():
        os.close(stopped)
        return pid, stop
    code = 1
    try:
        for descriptor in (stop, *others):  # the nursery's alone
            os.close(descriptor)
        asks(stopped)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # nothing of the nursery's is this process's to end


def _ended(pid: int) -> int | None:
    """The exit code of a client that is to end; None: it did not, and was killed."""
    deadline_s = time.monotonic() + _END_TIMEOUT_S
    while time.monotonic() < deadline_s:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _ask(
    address: str,
    way: str,
    table: TableSize,
    shapes: Sequence[Shape],
    seed: int,
    threads: int,
    pause_s: float,
    stopped: int,
) -> None:
    """[CLIENT] until the nursery closes its end, or is gone."""
    torch.set_num_threads(1)
    ended = threading.Event()
    failed: list[BaseException] = []
    drawn = [pairs for shape in shapes for pairs in drawn_pairs(shape, table, seed, 1)]
    with pools.client(address, way) as pool:
        contender = pools.look_up(way, pool.table("facts"), table)

        def look_up(number: int) -> None:
            try:
                while not ended.is_set():
                    _answered(contender, drawn[number % len(drawn)], with_check=not number % _CHECK_EVERY)
                    number += 1
                    ended.wait(pause_s)
            except BaseException as error:
                failed.append(error)

        working = [threading.Thread(target=look_up, args=(number,), daemon=True) for number in range(threads)]
        for thread in working:
            thread.start()
        while not failed and not select.select([stopped], [], [], _LOOK_S)[0]:
            pass
        ended.set()
        for thread in working:
            thread.join(_STOP_TIMEOUT_S)
            if thread.is_alive():
                raise TimeoutError(f"a look-up did not end within {_STOP_TIMEOUT_S:g} s")
    if failed:
        raise failed[0]


def _answered(contender: Contender, pairs: Pairs, *, with_check: bool) -> None:
    if not with_check:
        contender.run(pairs)
        return
    check = contender.check(pairs)
    if not check.passed:
        raise RuntimeError(f"{contender.name}: an answer is off by {check.error:.1e}")
