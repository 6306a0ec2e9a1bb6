"""Pairs dealt to groups of pages on the CPU: counted in one pass, written in another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import Dealt
from mempool.kernels.checking import check_offsets
from mempool.kernels.cpu.admission import ascends
from mempool.kernels.cpu.runtime import EMPTY_WEIGHTS, Array, kernel, view


@kernel
def _count(
    ids: Array, offsets: Array, group_of_page: Array, page_shift: int, groups: Array, own_offsets: Array, ends: Array
) -> bool:
    """The group of each pair, from 1; how many pairs each group has up to each bag, and where each group ends."""
    if not ascends(offsets, ids.shape[0]):
        return False
    num_groups, num_pages = own_offsets.shape[0], group_of_page.shape[0]
    counts = np.zeros(num_groups + 1, dtype=np.int64)
    for bag in range(offsets.shape[0] - 1):
        for pair in range(offsets[bag], offsets[bag + 1]):
            page = ids[pair] >> page_shift
            group = group_of_page[page] + 1 if 0 <= page < num_pages else 0
            groups[pair] = group
            counts[group] += 1
        for number in range(num_groups):
            own_offsets[number, bag + 1] = counts[number + 1]
    for number in range(num_groups):
        own_offsets[number, 0] = 0
        ends[number + 1] = ends[number] + counts[number + 1]
    return True


@kernel
def _deal(
    ids: Array, weights: Array, groups: Array, starts: Array, own_ids: Array, own_weights: Array, positions: Array
) -> None:
    places = np.zeros(starts.shape[0] + 1, dtype=np.int64)
    places[1:] = starts
    for pair in range(ids.shape[0]):
        group = groups[pair]
        if group > 0:
            place = places[group]
            places[group] = place + 1
            own_ids[place] = ids[pair]
            positions[place] = pair
            if weights.shape[0] > 0:
                own_weights[place] = weights[pair]


def deal_pairs(
    ids: Tensor, weights: Tensor | None, offsets: Tensor, group_of_page: Tensor, num_groups: int, page_shift: int
) -> Dealt:
    """See mempool.kernels.deal_pairs."""
    given = view(ids)
    groups, starts = np.empty(ids.shape[0], dtype=np.int16), np.zeros(num_groups + 1, dtype=np.int64)
    own_offsets = torch.empty((num_groups, offsets.shape[0]), dtype=torch.int64, device="cpu")
    if not _count(given, view(offsets), view(group_of_page), page_shift, groups, own_offsets.numpy(), starts):
        check_offsets(offsets, ids.shape[0])
    num_pairs = int(starts[num_groups])
    own_ids = torch.empty(num_pairs, dtype=ids.dtype, device="cpu")
    positions = torch.empty(num_pairs, dtype=torch.int64, device="cpu")
    # Those of 16 bits are taken by position: a rare choice, for which nothing is compiled.
    here = weights is not None and weights.dtype == torch.float32
    own_weights = torch.empty(num_pairs, dtype=torch.float32, device="cpu") if here else None
    _deal(
        given,
        view(weights) if weights is not None and here else EMPTY_WEIGHTS,
        groups,
        starts,
        own_ids.numpy(),
        EMPTY_WEIGHTS if own_weights is None else own_weights.numpy(),
        positions.numpy(),
    )
    if weights is not None and own_weights is None:
        own_weights = weights[positions]
    return Dealt(ids=own_ids, weights=own_weights, positions=positions, offsets=own_offsets, starts=starts.tolist())
