"""Pairs dealt to groups of pages in numpy's and torch's own operations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import Dealt
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
    bag_of_pair = np.repeat(np.arange(num_bags), np.diff(offsets.numpy()))
    cells = (groups.astype(np.int64) + 1) * num_bags + bag_of_pair
    own_offsets = np.zeros((num_groups, num_bags + 1), np.int64)
    np.cumsum(
        np.bincount(cells, minlength=(num_groups + 1) * num_bags).reshape(num_groups + 1, num_bags)[1:],
        axis=1,
        out=own_offsets[:, 1:],
    )
    positions = torch.from_numpy(order[ends[0] :])
    return Dealt(
        ids=ids[positions],
        weights=None if weights is None else weights[positions],
        positions=positions,
        offsets=torch.from_numpy(own_offsets),
        starts=(ends - ends[0]).tolist(),
    )
