"""A training job on a pool: a model of two tables, saved and loaded as torch's tutorial does it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

import mempool
from mempool.nn import MemoryLayer, PoolOptimizer, PoolState
from mempool.optim import SGD, Adagrad

TABLES = (
    mempool.TableConfig(name="facts", num_slots=81, value_dim=8, optimizer=Adagrad(0.1)),
    mempool.TableConfig(name="words", num_slots=64, value_dim=8, dtype="bfloat16", optimizer=SGD(0.1, momentum=0.9)),
)


class Dense(Stateful):
    """The part that torch's own helpers save: as its tutorial does it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"model": get_model_state_dict(self.model), "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict["model"])
        # On a rank that does not train the table, the layer's `values` have no state.
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(self.model, self.optimizer, state_dict["optimizer"], options=options)


class Job:
    """A training job on a pool, from the start."""

    def __init__(self, pool: mempool.Pool, place: Path, *, seed: int = 5) -> None:
        self.pool = pool
        self.tables = [pool.create_table(config, exist_ok=True) for config in TABLES]
        torch.manual_seed(seed)
        layers = [MemoryLayer(8, table=table, heads=2, topk=3, key_dim=4) for table in self.tables]
        self.model = nn.Sequential(nn.Linear(8, 8), *layers)
        self.dense = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.memory = PoolOptimizer(self.model)
        self.state = PoolState(pool, place / "pool")
        self.parts = {"dense": Dense(self.model, self.dense), "memory": self.memory, "tables": self.state}

    def train(self, *steps: int, together: Callable[[], Any] = bool) -> None:
        for step in steps:
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
            self.dense.zero_grad()
            self.memory.zero_grad()
            self.model(x).square().mean().backward()
            together()
            self.dense.step()
            self.memory.step()
            together()

    def everything(self) -> dict[str, Tensor]:
        """All that training changed, by name."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, state in self.dense.state_dict()["state"].items():
            found |= {f"dense.{number}.{name}": tensor for name, tensor in state.items()}
        for table in self.tables:
            ids = torch.arange(table.num_slots)
            found |= {f"{table.name}.values": table.rows(ids), f"{table.name}.steps": torch.tensor(table.step_count())}
            found |= {f"{table.name}.{name}": tensor for name, tensor in table.state(ids).items()}
        return {name: tensor.clone() for name, tensor in found.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def undisturbed() -> dict[str, Tensor]:
    """What six steps without a stop come to."""
    with mempool.local(shards=2, device="cpu") as pool:
        job = Job(pool, Path("unused"))
        job.train(1, 2, 3, 4, 5, 6)
        return job.everything()
