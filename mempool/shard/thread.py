"""The engine's one thread: jobs in the order they came, their results for asyncio.

All state of an engine is touched by this thread only, so nothing behind it needs a lock.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from mempool.errors import Internal, MempoolError, ShardUnavailable
from mempool.observe import Stages

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class EngineThread:
    """Runs jobs one after another. ``name`` is said in messages and names the thread."""

    def __init__(self, *, name: str, stages: Stages) -> None:
        self._name = name
        self._stages = stages
        self._jobs: queue.SimpleQueue[tuple[str, float, Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def run(self, stage: str, job: Callable[[], T]) -> T:
        """Run a job after all that came before it. Cancelling skips it if it has not begun, and harms no other.

        Raises:
            ShardUnavailable: The thread was closed.
            MempoolError: What the job raised; anything else it raised comes as Internal.
        """
        done: Future[T] = Future()
        # Under the lock, so that no job can come after the end mark and wait forever.
        with self._closing:
            if self._closed:
                raise ShardUnavailable(f"{self._name} is closed")
            self._jobs.put((stage, time.perf_counter(), job, done))
        return await asyncio.wrap_future(done)

    async def close(self) -> None:
        """Let the jobs that are waiting finish, then end the thread. Repeatable."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        await asyncio.shield(asyncio.wrap_future(self._ended))
        self._thread.join()

    def _run(self) -> None:
        with torch.no_grad():
            while (item := self._jobs.get()) is not None:
                self._run_one(*item)
                # A waiting thread must not keep the last job's tensors alive.
                del item
        self._ended.set_result(None)

    def _run_one(self, stage: str, put_s: float, job: Callable[[], Any], done: "Future[Any]") -> None:
        if not done.set_running_or_notify_cancel():
            return
        started_s = time.perf_counter()
        self._stages.record("queue", started_s - put_s)
        try:
            result = job()
        except MempoolError as error:
            done.set_exception(error)
        except Exception as error:
            _LOG.exception("%s: %s failed", self._name, stage)
            internal = Internal(f"{self._name}: {stage} failed with {type(error).__name__}: {error}. This is a bug.")
            internal.__cause__ = error
            done.set_exception(internal)
        else:
            done.set_result(result)
        finally:
            self._stages.record(stage, time.perf_counter() - started_s)
