"""Equal use of a memory as a loss.

Shape legend: H heads, K top-k, P parts, N half-keys of a codebook.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mempool.nn.choice import MemoryLookup


def balance_loss(lookup: MemoryLookup, parts: Sequence[Tensor], size: int) -> Tensor:
    """``size * sum over keys of (share of picks) * (share of weight)``: the load-balance loss of Switch Transformers
    (arXiv 2101.03961, equation 4), of each head and codebook, and their mean.

    1 where all keys are picked alike, ``size`` where one has everything; the gradient is that of the weights.

    Args:
        lookup: Of some tokens, [..., H, K].
        parts: Of each codebook the keys that were picked, [..., H, K] int64.
        size: Keys of a codebook.
    """
    heads, picks = lookup.weights.shape[-2:]
    weights_HK = lookup.weights.reshape(-1, heads, picks).transpose(0, 1).flatten(1)
    weights_HK = weights_HK / weights_HK.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_HK.dtype).tiny)
    losses = []
    for keys in parts:
        keys_HK = keys.reshape(-1, heads, picks).transpose(0, 1).flatten(1)
        nothing = weights_HK.new_zeros(heads, size)
        counted = nothing.scatter_add(1, keys_HK, torch.ones_like(weights_HK)) / max(1, keys_HK.shape[1])
        weighed = nothing.scatter_add(1, keys_HK, weights_HK)
        losses.append(size * (counted * weighed).sum(-1).mean())
    return torch.stack(losses).mean()
