"""Pairs dealt to groups of pages in numpy's and torch's own operations."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import Dealt, few_bags
from mempool.kernels.checking import check_offsets


def deal_pairs(
    ids: Tensor, weights: Tensor | None, offsets: Tensor, group_of_page: Tensor, num_groups: int, page_shift: int
) -> Dealt:
    """See mempool.kernels.deal_pairs."""
    check_offsets(offsets, ids.shape[0])
    num_bags = offsets.shape[0] - 1
    groups = group_of_page.numpy()[ids.numpy() >> page_shift]
    order = np.argsort(groups, kind="stable")  # of 16-bit numbers that is a radix sort
    ends = np.cumsum(np.bincount(groups.astype(np.int64) + 1, minlength=num_groups + 1))
    order, starts = order[ends[0] :], (ends - ends[0]).tolist()
    bag_of_pair = np.repeat(np.arange(num_bags), np.diff(offsets.numpy()))[order]
    bags: list[np.ndarray] = [np.zeros(0, np.int64)]
    own_offsets: list[np.ndarray] = [np.zeros(0, np.int64)]
    for first, end in itertools.pairwise(starts):
        named, counts = np.unique(bag_of_pair[first:end], return_counts=True)
        if few_bags(named.shape[0], num_bags):
            bags.append(named)
        else:
            counts = np.bincount(bag_of_pair[first:end], minlength=num_bags)
            bags.append(bags[0])
        own_offsets.append(np.concatenate(([0], np.cumsum(counts))))
    positions = torch.from_numpy(order)
    return Dealt(
        ids=ids[positions],
        weights=None if weights is None else weights[positions],
        positions=positions,
        bags=torch.from_numpy(np.concatenate(bags)),
        offsets=torch.from_numpy(np.concatenate(own_offsets)),
        starts=starts,
        bag_starts=np.cumsum([part.shape[0] for part in bags]).tolist(),
        offset_starts=np.cumsum([part.shape[0] for part in own_offsets]).tolist(),
    )
