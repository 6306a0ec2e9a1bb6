"""Product-key scoring in the trainer: ``keys.product`` under autograd, and as operators for ``torch.compile``.

Shape legend: B bags (tokens), H heads, K top-k, P parts of a query (two halves, or more), D key dim, d = D / P,
N half-keys of a codebook (at most N ** P slots).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mempool.client.gathers.first_order import first_order_only
from mempool.client.keys.boxes import Range
from mempool.nn.keys.product import best_slots, gradients, slot_ids

_NORM_EPS = 1e-6


def unit_rms(vectors: Tensor) -> Tensor:
    """Scale the last dimension to a root mean square of 1 (RMSNorm without a learned gain)."""
    return vectors * torch.rsqrt(vectors.square().mean(-1, keepdim=True) + _NORM_EPS)


def product_topk(
    queries_BHD: Tensor,
    keys_HPNd: Tensor,
    *,
    topk: int,
    stride: int,
    deterministic: bool = True,
    num_slots: int | None = None,
    ranges: Sequence[Range] | None = None,
) -> tuple[Tensor, Tensor]:
    """The top-k slots of every query by (score descending, id ascending), with scores autograd can follow.

    The score of slot ``i1 * stride + i2`` is ``<q1, keys[h, 0, i1]> + <q2, keys[h, 1, i2]>``, where q1 and q2 are the
    halves of the query; the choice is the two-stage one of the paper (arXiv 2412.09764, section 2): top-k of each half,
    then of their sums. With P codebooks in place of two the same of P parts: slot ``(i1 * stride + i2) * stride + i3``.
    No gradient flows through the choice, only through the scores of what was chosen.

    Args:
        queries_BHD: [B, H, D] float32.
        keys_HPNd: [H, P, N, D / P] float32; P at least 2.
        topk: K, at most all slots that may be chosen.
        stride: What i1 counts for in a slot id; at least N.
        deterministic: As in ``mempool.kernels.product_topk``.
        num_slots: Slots that are there, of N ** P: products from this one on, counted with a stride of N, are never
            chosen. None: all.
        ranges: The slots that may be chosen, in the place of ``num_slots``: (first, end), counted with a stride of N,
            ascending, none empty, and none that touches the next one.

    Returns:
        Scores [B, H, K] float32 and slot ids [B, H, K] int64.
    """
    if ranges is None:
        ranges = [(0, keys_HPNd.shape[2] ** keys_HPNd.shape[1] if num_slots is None else num_slots)]
    edges = [edge for range_ in ranges for edge in range_]
    if torch.compiler.is_compiling():
        found = torch.ops.mempool.product_topk(queries_BHD, keys_HPNd, topk, stride, edges, deterministic)
        return found[0], found[1]
    return _ProductTopk.apply(queries_BHD, keys_HPNd, topk, stride, edges, deterministic)  # type: ignore[no-untyped-call, no-any-return]


class _ProductTopk(torch.autograd.Function):
    """The graph keeps queries, keys and chosen half-keys; half scores, [H * B, N] twice, are never all there."""

    @staticmethod
    def forward(
        ctx: Any, queries_BHD: Tensor, keys_HPNd: Tensor, topk: int, stride: int, edges: list[int], deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        scores, index = best_slots(queries_BHD, keys_HPNd, topk, edges, deterministic=deterministic)
        ctx.save_for_backward(queries_BHD, keys_HPNd, *index)
        ids = slot_ids(index, stride)
        ctx.mark_non_differentiable(ids)
        return scores, ids

    @staticmethod
    def backward(ctx: Any, grads_BHK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries_BHD, keys_HPNd, *index = ctx.saved_tensors
        with torch.no_grad():
            found = gradients(queries_BHD, keys_HPNd, tuple(index), grads_BHK)
        depends_on = (grads_BHK, queries_BHD, keys_HPNd)
        return *(first_order_only(gradient, *depends_on) for gradient in found), None, None, None, None


@torch.library.custom_op("mempool::product_topk", mutates_args=())
def _topk_op(
    queries: Tensor, keys: Tensor, topk: int, stride: int, edges: Sequence[int], deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.compile keeps in its graph: scores and ids [B, H, K], and half-keys [P, B, H, K]."""
    scores, index = best_slots(queries, keys, topk, edges, deterministic=deterministic)
    return scores, slot_ids(index, stride), torch.stack(index)


@_topk_op.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    topk: int,
    stride: int,  # noqa: ARG001
    edges: Sequence[int],  # noqa: ARG001
    deterministic: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (queries.shape[0], queries.shape[1], topk)
    scores = queries.new_empty(shape, dtype=torch.float32)
    ids = queries.new_empty(shape, dtype=torch.int64)
    return scores, ids, queries.new_empty((keys.shape[1], *shape), dtype=torch.int64)


@torch.library.custom_op("mempool::product_gradient", mutates_args=())
def _gradient_op(queries: Tensor, keys: Tensor, index: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    return gradients(queries, keys, index.unbind(), grads)


@_gradient_op.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,  # noqa: ARG001
    grads: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape, dtype=torch.float32),
        keys.new_empty(keys.shape, dtype=torch.float32),
    )


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grads: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    query_grads, key_grads = torch.ops.mempool.product_gradient(*ctx.saved_tensors, grads)
    return query_grads, key_grads, None, None, None, None


_topk_op.register_autograd(_backward, setup_context=_set_up)
