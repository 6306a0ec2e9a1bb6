"""A table that is a tensor in this process: what MemoryLayer needs of one, on torch's own operations."""

import torch
from torch import Tensor

from mempool.types import OptimizerSpec, TableSchema


def schema(*, num_slots: int, value_dim: int, name: str = "facts") -> TableSchema:
    return TableSchema(
        table_id=1,
        name=name,
        num_slots=num_slots,
        value_dim=value_dim,
        block_dim=value_dim,
        page_slots=1,
        dtype="float32",
        seed=0,
        init_std=value_dim**-0.5,
        stride=int(num_slots**0.5),
        layout="auto",
        optimizer=OptimizerSpec(algorithm="sgd", lr=0.5),
    )


class LocalTable:
    """Values [num_slots, value_dim] as a leaf; ``remembered`` lists what each gather was told."""

    def __init__(self, *, num_slots: int, value_dim: int, name: str = "facts") -> None:
        self.schema = schema(num_slots=num_slots, value_dim=value_dim, name=name)
        generator = torch.Generator().manual_seed(3)
        self.values = torch.randn(num_slots, value_dim, generator=generator).requires_grad_(True)
        self.remembered: list[bool] = []

    def gather(self, ids: Tensor, weights: Tensor, *, remember: bool) -> Tensor:
        assert ids.dtype == torch.int64
        assert weights.dtype == torch.float32
        self.remembered.append(remember)
        return (weights.unsqueeze(-1) * self.values[ids]).sum(dim=1)
