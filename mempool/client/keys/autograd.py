"""Scores of keys that are trained in the pool, as torch's autograd sees them.

[TRAINER] forward: queries out, scores and slot ids in. Backward: the gradient of the scores out as the weights of a
gather of the keys, whose sums are the gradient of the queries; and as the weights of an update of them, whose bags'
gradients are the queries: [SHARD] holds it until the commit, as it does that of values.

Legend: B bags, H heads, S sections, K top-k, D key dim.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mempool.client.gathers.autograd import reaches_anchor, refuse_export, refuse_transforms
from mempool.client.gathers.first_order import first_order_only
from mempool.client.gathers.links import Link
from mempool.client.gathers.markers import mark_like
from mempool.client.keys.layout import KeyLayout
from mempool.errors import InvalidRequest

Ask = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Queries [B, H, D] float32 -> scores and slot ids [B, H, K]."""


def key_scores(
    link: Link, layout: KeyLayout, queries: Tensor, own: Tensor, ask: Ask, *, anchor: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    """Scores [B, H, K] float32, differentiable in ``queries`` and in the keys, and slot ids [B, H, K] int64, on the
    device of ``queries``.

    Args:
        link: The table of keys.
        queries: As the caller has them.
        own: The same as [B, H, D] float32 on the CPU, checked, nobody else's.
        anchor: As of ``gathers.autograd.gather``, for the keys.
        trained: Push updates, if anchor requires grad.
    """
    refuse_export(link.name)
    refuse_transforms(link)
    scores, ids = _KeyScores.apply(anchor, queries, own, link, layout, ask, trained)  # type: ignore[no-untyped-call]
    return scores, ids


class _Lease:
    """Lives as long as the graph that holds it."""

    __slots__ = ("__weakref__",)


class _KeyScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        queries: Tensor,
        own: Tensor,
        link: Link,
        layout: KeyLayout,
        ask: Ask,
        trained: bool,
    ) -> tuple[Tensor, Tensor]:
        # As a gather does: private copies, and an empty tensor that says whether the graph was freed.
        ctx.save_for_backward(torch.empty(0, dtype=torch.float32, device="cpu"))
        scores, ids = ask(own)
        ctx.link, ctx.layout, ctx.trained, ctx.anchor = link, layout, trained, anchor
        ctx.queries, ctx.own, ctx.ids, ctx.lease = queries, own, ids, None
        ids = ids.to(queries.device, copy=True)
        ctx.mark_non_differentiable(ids)
        return scores.to(queries.device), ids

    @staticmethod
    def backward(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        needs_anchor_grad, want_query_grad = ctx.needs_input_grad[:2]
        accumulates, captured = reaches_anchor(ctx) if needs_anchor_grad else (False, False)
        hold = accumulates and ctx.anchor.requires_grad and ctx.trained
        query_grad = anchor_grad = None
        with torch.no_grad():
            if ctx.ids.numel() and (want_query_grad or hold):
                sums = _pushed(ctx, grads, hold=hold)
                query_grad = sums.view(ctx.own.shape) if want_query_grad else None
            elif want_query_grad:
                query_grad = torch.zeros_like(ctx.own)
            if captured:
                anchor_grad = torch.zeros_like(ctx.anchor)
            elif hold:
                anchor_grad = mark_like(ctx.anchor)
        if query_grad is not None:
            query_grad = query_grad.view(ctx.queries.shape).to(device=ctx.queries.device, dtype=ctx.queries.dtype)
            query_grad = first_order_only(query_grad, grads, ctx.queries, ctx.anchor)
        return anchor_grad, query_grad, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(f"forward-mode derivatives do not reach a pool: table {ctx.link.name!r}. Use backward()")


def _pushed(ctx: Any, grads: Tensor, *, hold: bool) -> Tensor:
    """The gradient of the queries, [B * S, W] in the order of ``section_queries``; and the keys' goes out."""
    link: Link = ctx.link
    layout: KeyLayout = ctx.layout
    weights = grads.detach().to(device="cpu", dtype=torch.float32)
    if weights.shape != ctx.ids.shape:
        raise InvalidRequest(f"the gradient of scores {list(ctx.ids.shape)} came as {list(weights.shape)}")
    bags = layout.key_bags(ctx.ids, weights)
    sums, record = link.send_gather(bags, remember=hold)
    if record.remembered_by:
        ctx.lease = _Lease()
        weakref.finalize(ctx.lease, link.release(record)).atexit = False
    queries = layout.section_queries(ctx.own).reshape(-1, layout.width)
    link.send_update(record, queries, hold=hold, want_weight_grad=False)
    return sums
