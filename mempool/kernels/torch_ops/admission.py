"""Ids and offsets from outside in torch's own operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def admit_bags(
    ids: Tensor, offsets: Tensor, num_slots: int, dtype: torch.dtype, own: bool
) -> tuple[Tensor, Tensor] | None:
    """See mempool.kernels.admit_bags."""
    wide, bounds = ids.detach().to(torch.int64).contiguous(), offsets.detach().contiguous()
    # Compared in pairs: differences of numbers that far apart would wrap.
    if int(bounds[0]) != 0 or int(bounds[-1]) != wide.shape[0] or bool((bounds[1:] < bounds[:-1]).any()):
        return None
    if wide.numel():
        lowest, highest = wide.aminmax()
        if int(lowest) < 0 or int(highest) >= num_slots:
            return None
    admitted = wide.to(dtype)
    if own:
        bounds = bounds.clone()
        admitted = admitted.clone() if admitted.data_ptr() == ids.data_ptr() else admitted
    return admitted, bounds
