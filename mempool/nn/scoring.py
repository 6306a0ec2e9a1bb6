"""Product-key scoring in the trainer: half scores, the top-k chosen from them, and its backward.

Which pairs win is decided by ``mempool.kernels``, found at first use; this file adds the gradients.

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


def product_topk(queries_BHD: Tensor, keys_H2Nd: Tensor, *, topk: int, stride: int) -> tuple[Tensor, Tensor]:
    """The top-k slots of every query by (score descending, id ascending), with scores autograd can follow.

    The score of slot ``i1 * stride + i2`` is ``<q1, keys[h, 0, i1]> + <q2, keys[h, 1, i2]>``, where q1 and q2 are the
    halves of the query; the choice is the two-stage one of the paper (arXiv 2412.09764, section 2): top-k of each half,
    then of their sums. No gradient flows through the choice, only through the scores of what was chosen.

    Args:
        queries_BHD: [B, H, D] float32.
        keys_H2Nd: [H, 2, N, D / 2] float32.
        topk: K, at most N * N.
        stride: What i1 counts for in a slot id.

    Returns:
        Scores [B, H, K] float32 and slot ids [B, H, K] int64.
    """
    scores_HBK, ids_HBK = _ProductTopk.apply(  # type: ignore[no-untyped-call]
        queries_BHD.transpose(0, 1), keys_H2Nd, topk, stride
    )
    return scores_HBK.transpose(0, 1), ids_HBK.transpose(0, 1)


class _ProductTopk(torch.autograd.Function):
    """The half scores, two of [H * B, N], live only in forward; the graph keeps queries, keys and chosen positions.

    Left to torch, the gradient of ``Tensor.gather`` would keep both until the backward pass: 16 times the queries in
    the paper's shape (N = 1024, d = 64).
    """

    @staticmethod
    def forward(ctx: Any, queries_HBD: Tensor, keys_H2Nd: Tensor, topk: int, stride: int) -> tuple[Tensor, Tensor]:
        # One product per half, each contiguous as [H * B, N]: what the selection reads without another copy.
        scores1, scores2 = (
            torch.bmm(query_HBd, keys_H2Nd[:, half].transpose(1, 2)).flatten(0, 1)
            for half, query_HBd in enumerate(queries_HBD.chunk(2, dim=-1))
        )
        index1, index2 = _select(scores1, scores2, topk, stride)
        ctx.save_for_backward(queries_HBD, keys_H2Nd, index1, index2)
        ids = index1 * stride + index2
        ctx.mark_non_differentiable(ids)
        shape = (*queries_HBD.shape[:2], topk)
        return (scores1.gather(1, index1) + scores2.gather(1, index2)).view(shape), ids.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads_HBK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # A backward pass inside an autocast region would make the products below in bfloat16.
        with torch.autocast(grads_HBK.device.type, enabled=False):
            return _backward(ctx, grads_HBK)


def _backward(ctx: Any, grads_HBK: Tensor) -> tuple[Tensor | None, ...]:
    queries_HBD, keys_H2Nd, *indices = ctx.saved_tensors
    num_heads, num_bags, topk = grads_HBK.shape
    grads = grads_HBK.reshape(-1, topk)
    query_grads: list[Tensor] = []
    key_grads: list[Tensor] = []
    for half, (query_HBd, index) in enumerate(zip(queries_HBD.chunk(2, dim=-1), indices, strict=True)):
        # Dense products of a mostly empty matrix: cheaper than fetching and adding K rows of keys per query.
        score_grads = grads.new_zeros(grads.shape[0], keys_H2Nd.shape[2]).scatter_add_(1, index, grads)
        score_grads_HBN = score_grads.view(num_heads, num_bags, keys_H2Nd.shape[2])
        if ctx.needs_input_grad[0]:
            query_grads.append(torch.bmm(score_grads_HBN, keys_H2Nd[:, half]))
        if ctx.needs_input_grad[1]:
            key_grads.append(torch.bmm(score_grads_HBN.transpose(1, 2), query_HBd))
    return (
        torch.cat(query_grads, dim=-1) if query_grads else None,
        torch.stack(key_grads, dim=1) if key_grads else None,
        None,
        None,
    )


def _select(scores1: Tensor, scores2: Tensor, topk: int, stride: int) -> tuple[Tensor, Tensor]:
    # Imported here so that importing mempool.nn loads neither Triton nor Numba.
    from mempool.kernels import product_select

    return product_select(scores1, scores2, topk, stride)
