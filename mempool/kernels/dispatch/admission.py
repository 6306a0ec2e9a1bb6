"""Ids and offsets from outside, before other kernels read by them.

Legend: B bags, L pairs in all bags.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.checking import ID_DTYPES
from mempool.kernels.implementation import implementation_for


def admit_bags(
    ids: Tensor, offsets: Tensor, *, num_slots: int, dtype: torch.dtype, own: bool
) -> tuple[Tensor, Tensor] | None:
    """Look at ids and offsets, bring ids to the dtype in which they are kept, and copy both, in one pass over each.

    Args:
        ids: [L] int64, int32 or uint32.
        offsets: [B + 1] int64, B at least 0, on the same device.
        num_slots: Ids lie below.
        dtype: Of the ids that are returned, int64 or int32: wide enough for ``num_slots``.
        own: Whether what is returned is in memory that nobody else has, whatever was given.

    Returns:
        Contiguous ids [L] in ``dtype`` and offsets [B + 1] int64; None where an id is below 0 or not below
        ``num_slots``, or offsets do not ascend from 0 to L.

    Raises:
        ValueError: A tensor has another shape, dtype or device.
    """
    if ids.dim() != 1 or ids.dtype not in ID_DTYPES:
        raise ValueError(f"ids must be [L] int64, int32 or uint32, got {ids.dtype} {list(ids.shape)}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1 or offsets.device != ids.device:
        raise ValueError(
            f"offsets must be [B + 1] int64 on {ids.device}, got {offsets.dtype} {list(offsets.shape)} on"
            f" {offsets.device}"
        )
    if dtype not in (torch.int64, torch.int32) or num_slots - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"dtype must be int64 or int32, and hold ids below {num_slots}; got {dtype}")
    return implementation_for(ids.device).admit_bags(ids, offsets, num_slots, dtype, own)
