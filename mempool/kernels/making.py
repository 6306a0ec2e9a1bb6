"""A table's CPU kernels made ready before it is used: those that the disk cache lacks are compiled in child processes,
on all cores, one process of a machine at a time; then they are loaded. What the children cannot do is done here."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from mempool.kernels.compiling import NotCompiledError, only_compiled
from mempool.kernels.implementation import implementation, implementation_for
from mempool.kernels.warming import Needs, call, calls_of

_LOG = logging.getLogger("mempool")
_LOCK_NAME = "mempool-compiling.lock"
_POLL_S = 0.1
_SAY_S = 5.0
_CHILD = "from mempool.kernels.making import _serve; _serve()"

_ready: set[Needs] = set()


def make_ready(
    needs: Needs, *, report: Callable[[int, int], None] | None = None, stop: threading.Event | None = None
) -> None:
    """Have every kernel of such a table compiled and loaded. Where they are it costs nothing, from disk milliseconds.

    Safe on any thread, and in several processes at once: one compiles, the others wait and load what it has kept. The
    calling process stays free meanwhile, as compilers run in others.

    Args:
        needs: Of the table.
        report: Told how many parts are compiled, and of how many, where any are to be; on the calling thread.
        stop: Ends it early when set; what is compiled by then is kept.
    """
    if needs in _ready:
        return
    if implementation_for(torch.device("cpu")) is implementation("torch"):
        _ready.add(needs)
        return
    stop = stop or threading.Event()
    missing = _load(needs, calls_of(needs))
    if missing:
        with _turn(stop):
            missing = _load(needs, missing)  # another process may have compiled them meanwhile
            if missing:
                _compile(needs, missing, report=report or _say_nothing, stop=stop)
        for name in _load(needs, missing):
            if stop.is_set():
                return
            call(name, needs)
    _ready.add(needs)


def _say_nothing(_done: int, _parts: int) -> None:
    pass


def _load(needs: Needs, names: Iterable[str]) -> list[str]:
    """Load what is kept on disk. Returns the names of the calls that need more."""
    missing = []
    for name in names:
        try:
            with only_compiled():
                call(name, needs)
        except NotCompiledError:
            missing.append(name)
    return missing


def _cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where no folder can be written."""
    from mempool.kernels.cpu.initial import _initial_values

    path = _initial_values.stats.cache_path  # type: ignore[attr-defined]
    return None if path is None else Path(path)


@contextmanager
def _turn(stop: threading.Event) -> Iterator[None]:
    """One process of this machine at a time: two that compile the same take twice as long."""
    folder = _cache_folder()
    try:
        if folder is None:
            raise OSError("nothing is kept")
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # then each does it for itself
        yield
        return
    try:
        while not stop.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop.wait(_POLL_S)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(lock)


def _compile(needs: Needs, names: list[str], *, report: Callable[[int, int], None], stop: threading.Event) -> None:
    """Have children make these calls, which keep on disk what they compile. What they fail at is left out."""
    if _cache_folder() is None or not sys.executable:
        return
    _LOG.warning("compiling CPU kernels, once per machine: 0 of %d", len(names))
    report(0, len(names))
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        left.put(name)
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    num_children = min(len(names), _num_cores())
    children = [_start_child() for _ in range(num_children)]
    threads = [
        threading.Thread(target=_feed, args=(child, needs, left, done), name=f"compiling-{number}", daemon=True)
        for number, child in enumerate(children)
    ]
    for thread in threads:
        thread.start()
    count, said_s = 0, time.monotonic()
    try:
        while not stop.is_set() and (not done.empty() or any(thread.is_alive() for thread in threads)):
            try:
                done.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            count += 1
            report(count, len(names))
            if time.monotonic() - said_s > _SAY_S:
                said_s = time.monotonic()
                _LOG.warning("compiling CPU kernels, once per machine: %d of %d", count, len(names))
    finally:
        for child in children:
            child.kill()
        for thread in threads:
            thread.join()
        for child in children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                with suppress(OSError):  # what a dead child was not told yet
                    pipe.close()
    if count == len(names):
        _LOG.info("compiled %d CPU kernels; they are kept in %s", count, _cache_folder())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_child() -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this process alone, which ends its children
    )


def _feed(
    child: subprocess.Popen[str], needs: Needs, left: queue.SimpleQueue[str], done: queue.SimpleQueue[None]
) -> None:
    """Give a child one call after the other, until none is left or it has died."""
    assert child.stdin is not None
    assert child.stdout is not None
    while True:
        try:
            name = left.get_nowait()
        except queue.Empty:
            return
        try:
            child.stdin.write(json.dumps([name, dataclasses.asdict(needs)]) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:
            return
        if not answer:
            return
        done.put(None)


def _serve() -> None:
    """What a child does: the calls that it is asked for, until nobody asks."""
    for line in sys.stdin:
        name, fields = json.loads(line)
        call(name, Needs(**fields))
        print(name, flush=True)
