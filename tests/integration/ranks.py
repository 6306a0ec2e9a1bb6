"""A job of several ranks on a pool: data-parallel training by torchrun, whose ranks may be killed and come back.

Every rank takes its part of a step's batch; the dense part is a DistributedDataParallel model, what is looked up lies
in the pool. As a program it is one rank; ``Job`` runs it, and ``alone`` trains the same in one process on the whole
batch, with torch's own optimizers on a local tensor.

Before a step is committed rank 0 writes the dense part as it is behind it, so that whoever comes back finds the one
that goes with the pool.
"""

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mempool
from mempool.optim import SGD, Adagrad, Adam, AdamW, PoolOptimizer
from tests.integration.pools import RayPool, wait_for

NUM_SLOTS, VALUE_DIM, TOPK, FEATURES = 2_000, 64, 8, 6
BATCH = 48
TABLE = "facts"
DEADLINE_S = 180.0
_KEPT = 3
_ENDS_S = 120.0

OPTIMIZERS: Mapping[str, tuple[Any, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
    "sgd": (SGD(lr=20.0), lambda values: torch.optim.SGD(values, lr=20.0)),
    "adagrad": (Adagrad(lr=0.05), lambda values: torch.optim.Adagrad(values, lr=0.05)),
    "adam": (Adam(lr=0.01), lambda values: _SparseAdam(values, lr=0.01)),
    "adamw": (
        AdamW(lr=0.01, weight_decay=0.01, dense=True),
        lambda values: torch.optim.AdamW(values, lr=0.01, weight_decay=0.01),
    ),
}
"""By name: the table's, and torch's own of a local tensor."""


class _SparseAdam(torch.optim.SparseAdam):
    """On the gradient of a whole tensor, of which the rows that are not zero were touched."""

    def step(self, closure: Any = None) -> Any:
        (values,) = self.param_groups[0]["params"]
        values.grad = values.grad.to_sparse(1)
        return super().step(closure)


class Net(nn.Module):
    """Weights of what is looked up, and what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.score = nn.Linear(FEATURES, TOPK)
        self.head = nn.Linear(VALUE_DIM, 3)

    def forward(self, inputs: Tensor, ids: Tensor, gather: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        scores: Tensor = self.score(inputs)
        found: Tensor = self.head(gather(ids, scores.softmax(-1)))
        return found


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [B, F], slot ids [B, K] and targets [B, 3] of a step, numbered from 1."""
    dice = torch.Generator().manual_seed(1_000 + step)
    ids = torch.randint(NUM_SLOTS, (BATCH, TOPK), generator=dice)
    return torch.randn(BATCH, FEATURES, generator=dice), ids, torch.randn(BATCH, 3, generator=dice)


def loss_of(net: nn.Module, gather: Callable[[Tensor, Tensor], Tensor], step: int, rank: int, size: int) -> Tensor:
    """Of one rank's part of a step's batch."""
    inputs, ids, targets = (part.chunk(size)[rank] for part in batch_of(step))
    return (net(inputs, ids, gather) - targets).square().mean()


def make_table(pool: mempool.Pool, optimizer: str) -> mempool.Table:
    """The table of a job."""
    config = mempool.TableConfig(
        name=TABLE,
        num_slots=NUM_SLOTS,
        value_dim=VALUE_DIM,
        block_dim=32,
        page_slots=64,
        optimizer=OPTIMIZERS[optimizer][0],
    )
    return pool.create_table(config)


def alone(values: Tensor, optimizer: str, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What one process makes of the table's first values: its last ones, and the dense part's."""
    net, local = Net(), nn.Parameter(values.clone())
    dense, own = torch.optim.SGD(net.parameters(), lr=0.05), OPTIMIZERS[optimizer][1]([local])

    def gather(ids: Tensor, weights: Tensor) -> Tensor:
        return (local[ids] * weights.unsqueeze(-1)).sum(1)

    for step in range(1, steps + 1):
        dense.zero_grad()
        own.zero_grad()
        loss_of(net, gather, step, 0, 1).backward()
        dense.step()
        own.step()
    return local.detach(), net.state_dict()


class Job:
    """A job that torchrun runs, until ``wait``.

    Args:
        pool: It is up, and has the table.
        folder: Where ranks keep the dense part, and say where they are.
        ranks: How many.
        steps: The last step.
        pause_s: Between two steps, so that something can happen there.
        rescales: To how many shards, by the step behind which all ranks wait for it.
    """

    def __init__(
        self,
        pool: RayPool,
        folder: Path,
        *,
        ranks: int,
        steps: int,
        pause_s: float = 0.0,
        rescales: Mapping[int, int] | None = None,
    ) -> None:
        self._folder = folder
        folder.mkdir()
        self._process = pool.start(
            "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=5",
            "--monitor-interval=0.2", "-m", "tests.integration.ranks", pool.address, str(folder), f"--steps={steps}",
            f"--pause={pause_s}", *(f"--rescale={step}:{shards}" for step, shards in (rescales or {}).items()),
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Behind which the job is, as rank 0 says."""
        with suppress(FileNotFoundError, ValueError):
            return int((self._folder / "step").read_text())
        return 0

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self._process.poll() is None or self.step >= step, f"the job ended with {self._process.returncode}"
            return self.step >= step

        wait_for(f"step {step} of the job", reached)

    def kill(self, rank: int) -> None:
        """SIGKILL to one rank, which torchrun starts again with the others."""
        os.kill(int((self._folder / f"rank-{rank}").read_text()), signal.SIGKILL)

    def wait(self) -> str:
        """For its end; what it printed. Raises AssertionError where it failed."""
        said, _ = self._process.communicate(timeout=2 * DEADLINE_S)
        assert self._process.returncode == 0, said
        return said

    def dense(self, step: int) -> dict[str, Tensor]:
        """The dense part behind a step."""
        state: dict[str, Tensor] = torch.load(self._folder / f"dense-{step}.pt", weights_only=True)["net"]
        return state

    def close(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_S)
            self._process.kill()
        self._process.wait(_ENDS_S)
        if self._process.stdout is not None:
            self._process.stdout.close()


def _keep(folder: Path, step: int, net: nn.Module, dense: torch.optim.Optimizer) -> None:
    place = folder / f"dense-{step}.pt"
    torch.save({"net": net.state_dict(), "dense": dense.state_dict()}, place.with_suffix(".new"))
    place.with_suffix(".new").replace(place)
    (folder / f"dense-{step - _KEPT}.pt").unlink(missing_ok=True)


def _in_rank_order(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean, summed in the order of ranks."""
    parts = [torch.empty_like(bucket.buffer()) for _ in range(torch.distributed.get_world_size())]
    gathered = torch.distributed.all_gather(parts, bucket.buffer(), async_op=True)
    return gathered.get_future().then(lambda _: sum(parts[1:], parts[0]) / len(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--rescale", action="append", default=[], help="STEP:SHARDS")
    options = parser.parse_args()
    rescales = dict(map(int, each.split(":")) for each in options.rescale)
    rank, size, restart = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    # Of each start one of its own: gloo finds addresses of ranks that are gone in one that outlives them.
    store = torch.distributed.FileStore(str(options.folder / f"store-{restart}"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    (options.folder / f"rank-{rank}").write_text(str(os.getpid()))
    with mempool.connect(options.address, timeout_s=DEADLINE_S) as pool:
        table = pool.table(TABLE)
        net = Net()
        dense = torch.optim.SGD(net.parameters(), lr=0.05)
        memory = PoolOptimizer([table])
        group = pool.join("job", rank, size)
        torch.distributed.barrier()  # from here on nothing of an earlier start is decided
        begun = torch.tensor(group.versions[TABLE])
        torch.distributed.broadcast(begun, 0)
        step = int(begun)
        if step:
            state = torch.load(options.folder / f"dense-{step}.pt", weights_only=True)
            net.load_state_dict(state["net"])
            dense.load_state_dict(state["dense"])
        model = nn.parallel.DistributedDataParallel(net)
        # DDP lays its buckets out anew behind its first step, and the order in which three are summed depends on that:
        # a job that was started again has other bits in its dense part than one that was not.
        model.register_comm_hook(None, _in_rank_order)
        while step < options.steps:
            if step in rescales:  # again, where the job was killed in it
                torch.distributed.barrier()
                if rank == 0:
                    pool.rescale(rescales[step])
                torch.distributed.barrier()
            step += 1
            dense.zero_grad()
            loss_of(model, table.gather, step, rank, size).backward()
            dense.step()
            if rank == 0:
                _keep(options.folder, step, net, dense)
            memory.step()
            if rank == 0:
                (options.folder / "step").write_text(str(step))
            time.sleep(options.pause)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
