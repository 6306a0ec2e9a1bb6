"""Initial values in torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.torch_ops.bags import chunks


def initial_values(
    seed: int, *, slots_start: int, num_slots: int, column_start: int, num_columns: int, std: float
) -> Tensor:
    """See mempool.kernels.initial_values."""
    from mempool.kernels import reference

    out = torch.empty(num_slots, num_columns, dtype=torch.float32)
    for first, end in chunks(num_slots, num_columns):
        out[first:end] = reference.initial_values(
            seed,
            slots_start=slots_start + first,
            num_slots=end - first,
            column_start=column_start,
            num_columns=num_columns,
            std=std,
        )
    return out
