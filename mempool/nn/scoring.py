"""Product-key scoring in the trainer: ``mempool.kernels`` under autograd, and as operators for ``torch.compile``.

The kernels are loaded at first use.

Shape legend: B bags (tokens), H heads, K top-k, D key dim, d half of it, N half-keys of a codebook (slots = N * N).
"""

from typing import Any

import torch
from torch import Tensor

from mempool.client.gathers.first_order import first_order_only

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
    if torch.compiler.is_compiling():
        scores, ids, _, _ = torch.ops.mempool.product_topk(queries_BHD, keys_H2Nd, topk, stride, deterministic)
        return scores, ids
    return _ProductTopk.apply(queries_BHD, keys_H2Nd, topk, stride, deterministic)  # type: ignore[no-untyped-call, no-any-return]


def _chosen(queries_BHD: Tensor, keys_H2Nd: Tensor, topk: int, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, H, K] float32 and half-keys of both codebooks [B, H, K] int64."""
    # Imported here so that importing mempool.nn does not load the kernels.
    from mempool.kernels import SCORING, make_ready, product_indices

    if queries_BHD.device.type == "cpu":
        make_ready(SCORING)  # once: with its gradient, on all cores where it has to be compiled
    with torch.autocast(queries_BHD.device.type, enabled=False):
        return product_indices(queries_BHD, _alias(keys_H2Nd), topk, deterministic=deterministic)


def _gradients(
    queries_BHD: Tensor, keys_H2Nd: Tensor, index1: Tensor, index2: Tensor, grads_BHK: Tensor
) -> tuple[Tensor, Tensor]:
    from mempool.kernels import product_gradient

    # A backward pass inside an autocast region would make products in bfloat16.
    with torch.autocast(grads_BHK.device.type, enabled=False):
        return product_gradient(queries_BHD, _alias(keys_H2Nd), index1, index2, grads_BHK)


def _alias(parameter: Tensor) -> Tensor:
    """The same memory as another tensor: torch never resizes a storage again that was seen by numpy, as FSDP must."""
    return torch.utils.dlpack.from_dlpack(parameter.detach()) if parameter.device.type == "cpu" else parameter


class _ProductTopk(torch.autograd.Function):
    """The graph keeps queries, keys and chosen half-keys; half scores, [H * B, N] twice, are never all there."""

    @staticmethod
    def forward(
        ctx: Any, queries_BHD: Tensor, keys_H2Nd: Tensor, topk: int, stride: int, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        scores, index1, index2 = _chosen(queries_BHD, keys_H2Nd, topk, deterministic)
        ctx.save_for_backward(queries_BHD, keys_H2Nd, index1, index2)
        ids = index1 * stride + index2
        ctx.mark_non_differentiable(ids)
        return scores, ids

    @staticmethod
    def backward(ctx: Any, grads_BHK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries_BHD, keys_H2Nd, index1, index2 = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(queries_BHD, keys_H2Nd, index1, index2, grads_BHK)
        depends_on = (grads_BHK, queries_BHD, keys_H2Nd)
        return *(first_order_only(gradient, *depends_on) for gradient in gradients), None, None, None


@torch.library.custom_op("mempool::product_topk", mutates_args=())
def _topk_op(
    queries: Tensor, keys: Tensor, topk: int, stride: int, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile keeps in its graph: scores, ids and half-keys of both codebooks, each [B, H, K]."""
    scores, index1, index2 = _chosen(queries, keys, topk, deterministic)
    # Copies: the two may lie in one tensor, and an operator's outputs must not share memory.
    return scores, index1 * stride + index2, index1.clone(), index2.clone()


@_topk_op.register_fake
def _(
    queries: Tensor,
    keys: Tensor,  # noqa: ARG001
    topk: int,
    stride: int,  # noqa: ARG001
    deterministic: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (queries.shape[0], queries.shape[1], topk)
    scores = queries.new_empty(shape, dtype=torch.float32)
    ids, index1, index2 = (queries.new_empty(shape, dtype=torch.int64) for _ in range(3))
    return scores, ids, index1, index2


@torch.library.custom_op("mempool::product_gradient", mutates_args=())
def _gradient_op(queries: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    return _gradients(queries, keys, index1, index2, grads)


@_gradient_op.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    index1: Tensor,  # noqa: ARG001
    index2: Tensor,  # noqa: ARG001
    grads: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape, dtype=torch.float32),
        keys.new_empty(keys.shape, dtype=torch.float32),
    )


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[2], output[3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grads: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    query_grads, key_grads = torch.ops.mempool.product_gradient(*ctx.saved_tensors, grads)
    return query_grads, key_grads, None, None, None


_topk_op.register_autograd(_backward, setup_context=_set_up)
