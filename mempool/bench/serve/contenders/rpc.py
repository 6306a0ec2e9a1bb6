"""torch.distributed.rpc (TensorPipe): a worker process that holds the table, on one thread, and is called from here."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mempool.bench.processes.child import Child, ChildError, Parent
from mempool.bench.serve.contenders.contender import LookUp
from mempool.bench.serve.contenders.here import embedding_bag, table_rows
from mempool.bench.serve.shapes import Pairs, TableSize

RPC = "torch.distributed.rpc"
_CLIENT, _WORKER = "client", "worker"
_SELF = "mempool.bench.serve.contenders.rpc"
_CALL_TIMEOUT_S = 120.0
_LEAVE_TIMEOUT_S = 5.0
#: The worker's table: what is called knows it by this module.
_rows: Tensor | None = None


def available() -> bool:
    """Whether this torch has it."""
    return bool(torch.distributed.is_available() and torch.distributed.rpc.is_available())


@contextmanager
def rpc(table: TableSize) -> Iterator[list[LookUp]]:
    """A worker until the block ends."""
    from mempool.rayhost.actors import kernel_variables  # not in the worker, which is no process of Ray's

    remote: Any = torch.distributed.rpc
    with tempfile.TemporaryDirectory(prefix="mempool-bench-") as folder:
        meeting = str(Path(folder) / "meeting")
        arguments = {"meeting": meeting, "num_slots": table.num_slots, "value_dim": table.value_dim, "seed": table.seed}
        with Child(f"{_SELF}:serve", arguments, variables=kernel_variables(1)) as child:
            child.hear()  # it has its table, and goes to the meeting
            _join(_CLIENT, 0, meeting)

            def run(pairs: Pairs) -> Tensor:
                arguments = (pairs.ids, pairs.weights)
                answer: Tensor = remote.rpc_sync(_WORKER, look_up, args=arguments, timeout=_CALL_TIMEOUT_S)
                return answer

            try:
                yield [LookUp(RPC, table, run, [child.pid])]
            finally:
                with suppress(ChildError):  # it may be gone
                    child.say("end")
                _leave()


def look_up(ids: Tensor, weights: Tensor) -> Tensor:
    """[WORKER] sums of ids and weights [B, K]."""
    assert _rows is not None, "this is the worker"
    return embedding_bag(_rows, ids, weights)


def serve(parent: Parent, *, meeting: str, **size: int) -> None:
    """[WORKER] hold the table."""
    global _rows
    torch.set_num_threads(1)
    _rows = table_rows(TableSize(**size))
    parent.say("ready")
    _join(_WORKER, 1, meeting)
    parent.hear()
    _leave()
    os._exit(0)  # where the other side is gone, its threads would wait for minutes


def _join(name: str, rank: int, meeting: str) -> None:
    remote: Any = torch.distributed.rpc
    options = remote.TensorPipeRpcBackendOptions(init_method=f"file://{meeting}", rpc_timeout=_CALL_TIMEOUT_S)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of how torch does it
        remote.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


def _leave() -> None:
    """Both together, or else each alone."""
    remote: Any = torch.distributed.rpc
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            remote.shutdown(graceful=True, timeout=_LEAVE_TIMEOUT_S)
        except RuntimeError:
            with suppress(RuntimeError):  # torch has no more to end
                remote.shutdown(graceful=False)
