"""A trainer that dies in the middle of a step: a process of its own that kills itself at a message of its choice.

    MEMPOOL_TOKEN=... python -m tests.integration.doomed ADDRESS --tables a b --cut 3 --side after

Messages of steps (Prepare, Commit) are counted from 1 in the order in which they are sent; it dies before message
``cut`` leaves, or after its answer has come. Exit 0 where the step was over before that.
"""

import argparse
import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

import mempool
from mempool.client import GrpcShard
from mempool.client.training.tables import TableCommit, commit_tables

LR = 0.5
OF_STEPS = ("Prepare", "Commit")


def loss_of(values: Tensor, seed: int) -> Tensor:
    """What the step minimizes, of looked-up values."""
    target = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed + 1))
    return (values - target).square().sum()


def bags(num_slots: int, seed: int) -> tuple[Tensor, Tensor]:
    """ids [16, 6] and weights [16, 6] of the step."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(num_slots, (16, 6), generator=random), torch.randn(16, 6, generator=random)


def stepped(values: Tensor, seed: int) -> Tensor:
    """[N, V]: what the step makes of values [N, V], by torch."""
    local = torch.nn.Parameter(values.clone())
    ids, weights = bags(len(values), seed)
    loss_of((local[ids] * weights.unsqueeze(-1)).sum(1), seed).backward()
    torch.optim.SGD([local], lr=LR).step()
    return local.detach()


def die_at(cut: int, side: str) -> None:
    """From now on this process dies at that message."""
    sent, call = 0, GrpcShard._call

    async def counted(self: GrpcShard, method: Any, request: Any, **options: Any) -> Any:
        nonlocal sent
        if not method.path.endswith(OF_STEPS):
            return await call(self, method, request, **options)
        sent += 1
        number = sent
        if number == cut and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        reply = await call(self, method, request, **options)
        if number == cut and side == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    GrpcShard._call = counted  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--tables", nargs="+", required=True)
    parser.add_argument("--cut", type=int, required=True)
    parser.add_argument("--side", choices=["before", "after"], default="after")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with mempool.connect(options.address) as pool:
        tables = [pool.table(name) for name in options.tables]
        for table in tables:
            loss_of(table.gather(*bags(table.num_slots, options.seed)), options.seed).backward()
        die_at(options.cut, options.side)
        print("begins", flush=True)
        commit_tables([TableCommit(table.link, lr=LR, grad_scale=1.0) for table in tables])
        time.sleep(1.0)  # what is said in the background


if __name__ == "__main__":
    main()
