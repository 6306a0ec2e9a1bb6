"""Pairs dealt to the groups of pages that they name, for whoever sends each group to another shard.

Legend: B bags, L pairs in all bags, L' those of any group, P pages, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mempool.kernels.arguments import Dealt
from mempool.kernels.checking import ID_DTYPES
from mempool.kernels.implementation import implementation_for


def deal_pairs(
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    group_of_page: Tensor,
    *,
    num_groups: int,
    page_shift: int,
) -> Dealt:
    """Split bags by the groups of pages that their pairs name: one counting sort for all groups. On the CPU.

    Args:
        ids: [L] int64 or int32 slot ids, each of a page below P.
        weights: [L] float32 or bfloat16, or None.
        offsets: [B + 1] int64, as in weighted_sum.
        group_of_page: [P] int16, below G; -1 for pages whose pairs nobody gets.
        num_groups: G, up to 2**15 - 1.
        page_shift: log2 of the slots of a page.

    Returns:
        The pairs of each group, in their order, with the bags that have any where those are few.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or offsets are not as above.
    """
    tensors = [ids, offsets, group_of_page, *([] if weights is None else [weights])]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        raise ValueError(f"pairs are dealt on the CPU, got {', '.join(str(tensor.device) for tensor in tensors)}")
    if ids.dim() != 1 or ids.dtype not in ID_DTYPES or ids.dtype == torch.uint32:
        raise ValueError(f"ids must be [L] int64 or int32, got {ids.dtype} {list(ids.shape)}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [B + 1] int64, got {offsets.dtype} {list(offsets.shape)}")
    if weights is not None and (weights.shape != ids.shape or weights.dtype not in (torch.float32, torch.bfloat16)):
        raise ValueError(
            f"weights must be [{ids.shape[0]}] float32 or bfloat16, got {weights.dtype} {list(weights.shape)}"
        )
    if group_of_page.dim() != 1 or group_of_page.dtype != torch.int16 or not 0 <= num_groups < 2**15:
        raise ValueError(
            f"group_of_page must be [P] int16, and num_groups below {2**15}; got {group_of_page.dtype} "
            f"{list(group_of_page.shape)} and {num_groups}"
        )
    return implementation_for(ids.device).deal_pairs(ids, weights, offsets, group_of_page, num_groups, page_shift)
