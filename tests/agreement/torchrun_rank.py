"""A rank as torchrun starts it: a plain DDP loop on a model with a memory layer; nothing is said of ranks to the pool.

    torchrun --nproc-per-node 2 --max-restarts 1 -m tests.agreement.torchrun_rank ADDRESS FOLDER

In its first life rank 1 ends itself between backward() and step() of one of its steps.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mempool

STEPS, DIES_AT, DIM, BATCH = 5, 2, 8, 12
CONFIG = mempool.TableConfig(name="facts", num_slots=64, value_dim=16, seed=3, optimizer=mempool.optim.Adam(lr=0.05))


def make_model(table: mempool.Table) -> nn.Module:
    torch.manual_seed(7)
    layer = mempool.nn.MemoryLayer(dim=DIM, table=table, heads=2, topk=3, key_dim=8)
    return nn.Sequential(nn.Linear(DIM, DIM), layer, nn.Linear(DIM, 1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The whole one: [BATCH, DIM], [BATCH, 1]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, DIM, generator=generator), torch.randn(BATCH, 1, generator=generator)


def train(table: mempool.Table, folder: Path, *, rank: int = 0, world_size: int = 1) -> nn.Module:
    """All steps that are left, by what lies in the folder."""
    model = make_model(table)
    wrapped = model if world_size == 1 else DistributedDataParallel(model)
    dense = torch.optim.AdamW(model.parameters(), lr=0.01)
    memory = mempool.optim.PoolOptimizer(model, max_norm=1.0)
    saved, first = folder / "state.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        dense.load_state_dict(state["dense"])
        first = state["step"]
    for step in range(first, STEPS):
        inputs, targets = (part.chunk(world_size)[rank] for part in batch(step))
        (wrapped(inputs) - targets).square().mean().backward()
        if world_size > 1 and rank == 1 and step == DIES_AT and not first:
            os.kill(os.getpid(), 9)
        memory.step()
        dense.step()
        dense.zero_grad()
        if rank == 0:
            torch.save({"model": model.state_dict(), "dense": dense.state_dict(), "step": step + 1}, saved)
    return model


def main() -> None:
    rank, world_size, life = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    store = f"file://{sys.argv[2]}/store-{life}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    with mempool.connect(sys.argv[1]) as pool:
        train(pool.create_table(CONFIG, exist_ok=True), Path(sys.argv[2]), rank=rank, world_size=world_size)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
