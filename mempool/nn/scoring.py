"""Product-key scoring in the trainer: half scores, the top-k chosen from them, and what autograd needs of both.

Which pairs win is decided by ``mempool.kernels``, found at first use; this file adds the gradients.

Shape legend: B bags (tokens), H heads, K top-k, D key dim, N half-keys of a codebook (slots = N * N).
"""

import torch
from torch import Tensor

_NORM_EPS = 1e-6


def unit_rms(vectors: Tensor) -> Tensor:
    """Scale the last dimension to a root mean square of 1 (RMSNorm without a learned gain)."""
    return vectors * torch.rsqrt(vectors.square().mean(-1, keepdim=True) + _NORM_EPS)


def product_topk(queries_BHD: Tensor, keys_H2Nd: Tensor, *, topk: int, stride: int) -> tuple[Tensor, Tensor]:
    """The top-k slots of every query by (score descending, id ascending), with scores autograd can follow.

    The score of slot ``i1 * stride + i2`` is ``<q1, keys[h, 0, i1]> + <q2, keys[h, 1, i2]>``, where q1 and q2 are the
    halves of the query; the choice is the two-stage one of the paper (arXiv 2412.09764, section 2): top-k of each half,
    then of their sums. No gradient flows through the choice, only through the scores of what was chosen.

    The half scores, [H * B, N] float32 twice, live only until this function returns: the graph keeps queries, keys and
    the chosen positions, and the backward writes the chosen gradients into a fresh [H * B, N].

    Args:
        queries_BHD: [B, H, D] float32.
        keys_H2Nd: [H, 2, N, D / 2] float32.
        topk: K, at most N * N.
        stride: What i1 counts for in a slot id.

    Returns:
        Scores [B, H, K] float32 and slot ids [B, H, K] int64.
    """
    num_bags, num_heads, _ = queries_BHD.shape
    halves_HBd = queries_BHD.transpose(0, 1).chunk(2, dim=-1)
    # One product per half, each contiguous as [H * B, N]: what the selection reads without another copy.
    half_scores = [
        torch.bmm(query_HBd, keys_H2Nd[:, half].transpose(1, 2)).flatten(0, 1)
        for half, query_HBd in enumerate(halves_HBd)
    ]
    index1, index2 = _select(half_scores[0].detach(), half_scores[1].detach(), topk, stride)
    scores = half_scores[0].gather(1, index1) + half_scores[1].gather(1, index2)
    ids = index1 * stride + index2
    by_head = (num_heads, num_bags, topk)
    return scores.view(by_head).transpose(0, 1), ids.view(by_head).transpose(0, 1)


def _select(scores1: Tensor, scores2: Tensor, topk: int, stride: int) -> tuple[Tensor, Tensor]:
    # Imported here so that importing mempool.nn loads neither Triton nor Numba.
    from mempool.kernels import product_select

    return product_select(scores1, scores2, topk, stride)
