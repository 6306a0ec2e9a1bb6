"""Ids and offsets from outside on the CPU: looked at, narrowed and copied in one pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.cpu.runtime import Array, kernel, serial, view

NO_IDS: Array = np.empty(0, dtype=np.int32)
NO_OFFSETS: Array = np.empty(0, dtype=np.int64)


@serial
def ascends(offsets: Array, num_ids: int) -> bool:
    """Whether offsets run from 0 to the number of ids and never fall. There is at least one."""
    falls = False
    for bag in range(offsets.shape[0] - 1):
        falls |= offsets[bag + 1] < offsets[bag]
    return not falls and offsets[0] == 0 and offsets[offsets.shape[0] - 1] == num_ids


@kernel
def admit(ids: Array, num_slots: int, copied: Array, offsets: Array, own_offsets: Array) -> bool:
    """Whether ids lie below num_slots and offsets ascend from 0 to their number; both are copied on the way."""
    # Arrays that nothing is copied to are empty. No branch in the loops: they become vector code.
    bad = False
    if copied.shape[0] == ids.shape[0]:
        for pair in range(ids.shape[0]):
            slot = ids[pair]
            bad |= (slot < 0) | (slot >= num_slots)
            copied[pair] = slot
    else:
        for pair in range(ids.shape[0]):
            bad |= (ids[pair] < 0) | (ids[pair] >= num_slots)
    for place in range(own_offsets.shape[0]):
        own_offsets[place] = offsets[place]
    return not bad and ascends(offsets, ids.shape[0])


def admit_bags(
    ids: Tensor, offsets: Tensor, num_slots: int, dtype: torch.dtype, own: bool
) -> tuple[Tensor, Tensor] | None:
    """See mempool.kernels.admit_bags."""
    copied, own_offsets = ids, offsets
    to_ids, to_offsets = NO_IDS if dtype == torch.int32 else NO_OFFSETS, NO_OFFSETS
    if own or ids.dtype != dtype:
        copied = torch.empty(ids.shape[0], dtype=dtype, device="cpu")
        to_ids = copied.numpy()
    if own:
        own_offsets = torch.empty(offsets.shape[0], dtype=torch.int64, device="cpu")
        to_offsets = own_offsets.numpy()
    if not admit(view(ids), num_slots, to_ids, view(offsets), to_offsets):
        return None
    return _as_given(copied), _as_given(own_offsets)


def _as_given(tensor: Tensor) -> Tensor:
    """The tensor itself, where it is contiguous."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
