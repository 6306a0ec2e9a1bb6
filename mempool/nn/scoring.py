"""Product-key scoring in the trainer: ``mempool.kernels`` under autograd, found at first use.

Shape legend: B bags (tokens), H heads, K top-k, D key dim, d half of it, N half-keys of a codebook (slots = N * N).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NORM_EPS = 1e-6


def unit_rms(vectors: Tensor) -> Tensor:
    """Scale the last dimension to a root mean square of 1 (RMSNorm without a learned gain)."""
    return vectors * torch.rsqrt(vectors.square().mean(-1, keepdim=True) + _NORM_EPS)


def product_topk(
    queries_BHD: Tensor, keys_H2Nd: Tensor, *, topk: int, stride: int, deterministic: bool = True
) -> tuple[Tensor, Tensor]:
    """The top-k slots of every query by (score descending, id ascending), with scores autograd can follow.

    The score of slot ``i1 * stride + i2`` is ``<q1, keys[h, 0, i1]> + <q2, keys[h, 1, i2]>``, where q1 and q2 are the
    halves of the query; the choice is the two-stage one of the paper (arXiv 2412.09764, section 2): top-k of each half,
    then of their sums. No gradient flows through the choice, only through the scores of what was chosen.

    Args:
        queries_BHD: [B, H, D] float32.
        keys_H2Nd: [H, 2, N, D / 2] float32.
        topk: K, at most N * N.
        stride: What i1 counts for in a slot id; at least N.
        deterministic: As in ``mempool.kernels.product_topk``.

    Returns:
        Scores [B, H, K] float32 and slot ids [B, H, K] int64.
    """
    return _ProductTopk.apply(queries_BHD, keys_H2Nd, topk, stride, deterministic)  # type: ignore[no-untyped-call, no-any-return]


class _ProductTopk(torch.autograd.Function):
    """The graph keeps queries, keys and chosen half-keys; half scores, [H * B, N] twice, are never all there."""

    @staticmethod
    def forward(
        ctx: Any, queries_BHD: Tensor, keys_H2Nd: Tensor, topk: int, stride: int, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        # Imported here so that importing mempool.nn does not load the kernels.
        from mempool.kernels import product_indices

        with torch.autocast(queries_BHD.device.type, enabled=False):
            scores, index1, index2 = product_indices(queries_BHD, keys_H2Nd, topk, deterministic=deterministic)
        ctx.save_for_backward(queries_BHD, keys_H2Nd, index1, index2)
        ids = index1 * stride + index2
        ctx.mark_non_differentiable(ids)
        return scores, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads_BHK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from mempool.kernels import product_gradient

        queries_BHD, keys_H2Nd, index1, index2 = ctx.saved_tensors
        # A backward pass inside an autocast region would make products in bfloat16.
        with torch.autocast(grads_BHK.device.type, enabled=False):
            query_grads, key_grads = product_gradient(queries_BHD, keys_H2Nd, index1, index2, grads_BHK)
        return query_grads, key_grads, None, None, None
