"""Ids and offsets from outside on the CPU: looked at, narrowed and copied in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.cpu.runtime import Array, kernel, serial, view


@serial
def ascends(offsets: Array, num_ids: int) -> bool:
    """Whether offsets run from 0 to the number of ids and never fall. There is at least one."""
    falls = False
    for bag in range(offsets.shape[0] - 1):
        falls |= offsets[bag + 1] < offsets[bag]
    return not falls and offsets[0] == 0 and offsets[offsets.shape[0] - 1] == num_ids


@kernel
def _admit(ids: Array, num_slots: int, copied: Array, offsets: Array, own_offsets: Array) -> bool:
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
    given, given_offsets = view(ids), view(offsets)
    copies = own or ids.dtype != dtype
    admitted = torch.empty(ids.shape[0] if copies else 0, dtype=dtype, device="cpu")
    own_offsets = torch.empty(offsets.shape[0] if own else 0, dtype=torch.int64, device="cpu")
    if not _admit(given, num_slots, admitted.numpy(), given_offsets, own_offsets.numpy()):
        return None
    return admitted if copies else ids.detach().contiguous(), own_offsets if own else offsets.detach().contiguous()
