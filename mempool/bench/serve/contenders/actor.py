"""A Ray actor that holds the table, on one thread, in a Ray of its own that ends with the benchmark.

It is asked in two ways: with tensors, as they are; and with NumPy arrays of the same memory, which Ray moves with fewer
copies.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mempool.bench.serve.contenders.contender import LookUp
from mempool.bench.serve.contenders.here import embedding_bag, table_rows
from mempool.bench.serve.shapes import Pairs, TableSize
from mempool.rayhost.actors import kernel_variables

RAY = "Ray actor"
RAY_NUMPY = "Ray actor, NumPy"
_OBJECT_STORE_BYTES = 256 << 20
_TIMEOUT_S = 120.0


def available() -> bool:
    """Whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


class TableActor:
    """[ACTOR] the table and its look-ups."""

    def __init__(self, **size: int) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # torch's of arrays that nobody may write to: nobody does
        self._rows = table_rows(TableSize(**size))

    def pid(self) -> int:
        return os.getpid()

    def look_up(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Sums [B, W] of ids and weights [B, K]."""
        return embedding_bag(self._rows, ids, weights)

    def look_up_arrays(self, ids: Any, weights: Any) -> Any:
        """The same of arrays."""
        return self.look_up(torch.from_numpy(ids), torch.from_numpy(weights)).numpy()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts handlers of its own in the place of this process's, and would end it where it stands."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # one that Python did not set
                    signal.signal(number, handler)


@contextmanager
def ray_actor(table: TableSize) -> Iterator[list[LookUp]]:
    """A Ray with one actor until the block ends, asked in both ways."""
    ray: Any = importlib.import_module("ray")
    # Not in the folder where Rays of this machine are found: nobody shall attach to this one.
    with tempfile.TemporaryDirectory(prefix="mempool-bench-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        try:
            with _own_signals():
                ray.init(
                    address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR, object_store_memory=_OBJECT_STORE_BYTES, _temp_dir=folder,
                )  # fmt: skip
            options = {"num_cpus": 1, "runtime_env": {"env_vars": kernel_variables(1)}}
            actor = (
                ray.remote(TableActor)
                .options(**options)
                .remote(num_slots=table.num_slots, value_dim=table.value_dim, seed=table.seed)
            )
            pid = ray.get(actor.pid.remote(), timeout=_TIMEOUT_S)

            def run(pairs: Pairs) -> Tensor:
                answer: Tensor = ray.get(actor.look_up.remote(pairs.ids, pairs.weights), timeout=_TIMEOUT_S)
                return answer

            def run_arrays(pairs: Pairs) -> Tensor:
                answer = actor.look_up_arrays.remote(pairs.ids.numpy(), pairs.weights.numpy())
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of an array that nobody may write to
                    return torch.from_numpy(ray.get(answer, timeout=_TIMEOUT_S))

            yield [LookUp(RAY, table, run, [pid]), LookUp(RAY_NUMPY, table, run_arrays, [pid])]
        finally:
            ray.shutdown()
