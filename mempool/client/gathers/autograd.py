"""A gather as torch's autograd sees it: values forward, updates and d_weights backward.

Legend: B bags, L pairs of all bags together, V value dim. Sending is the link's; under torch.compile ``compiled`` does
the same.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mempool.client.bags import checked_bags
from mempool.client.gathers.compiled import compiled_gather
from mempool.client.gathers.first_order import first_order_only
from mempool.client.gathers.links import Link
from mempool.client.gathers.markers import mark_like
from mempool.client.routing.attempt import LookupRecord
from mempool.errors import InvalidRequest
from mempool.types.bags import Bags


def gather(
    link: Link,
    ids: Tensor,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    anchor: Tensor,
    trained: bool,
    remember: bool,
) -> Tensor:
    """Pooled values [B, V] float32, differentiable in ``weights`` and in the table's values.

    Args:
        ids: [B, L] integers, or [L] with offsets; on any device.
        weights: The shape of ids, floating, on any device; None means all ones.
        offsets: [B + 1] integers.
        anchor: A leaf that requires grad where the values do. It makes backward run where the weights are constants or
            there are none, and where a backward pass does not accumulate into it, it does not into the values. It gets
            a gradient of nearly nothing (``markers``). [1] floating.
        trained: Push updates, if anchor requires grad.
        remember: Let shards keep ids and weights if a backward pass may come.

    Raises:
        InvalidRequest: A wrong shape, dtype or id, or a transform that a lookup cannot follow; nothing was sent.
    """
    refuse_export(link.name)
    if torch.compiler.is_compiling():
        return compiled_gather(link, ids, weights, offsets, anchor=anchor, trained=trained, remember=remember)
    refuse_transforms(link)
    flat_ids, flat_weights, flat_offsets = checked_bags(
        ids, weights, offsets, num_slots=link.num_slots, table=link.name
    )
    return pooled_gather(
        link,
        anchor=anchor,
        ids=flat_ids,
        weights=flat_weights,
        offsets=flat_offsets,
        trained=trained,
        remember=remember,
        device=ids.device if weights is None else weights.device,
    )


def pooled_gather(
    link: Link,
    *,
    anchor: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    trained: bool,
    remember: bool,
    device: torch.device,
) -> Tensor:
    """``gather`` of checked bags: ids [L] and offsets [B + 1] int64 on the CPU, weights [L]; values on ``device``."""
    differentiable = torch.is_grad_enabled() and (
        anchor.requires_grad or (weights is not None and weights.requires_grad)
    )
    if (
        not differentiable and forward_ad._current_level < 0
    ):  # what torch makes ready for a graph is a part of a small call
        bags = Bags(ids=ids, weights=link.wire_weights(weights, kept=False), offsets=offsets)
        return _sums(link, bags, remember=False, device=device)[0]
    pooled: Tensor = _PooledGather.apply(  # type: ignore[no-untyped-call]
        anchor, weights, ids, offsets, link, trained, remember and differentiable, device
    )
    return pooled


def _sums(link: Link, bags: Bags, *, remember: bool, device: torch.device) -> tuple[Tensor, LookupRecord | None]:
    """Pooled values [B, V] on ``device``, and the lookup that they come from; None where there was nothing to ask."""
    if not bags.num_pairs:
        return torch.zeros(bags.num_bags, link.value_dim, dtype=torch.float32, device=device), None
    values, record = link.send_gather(bags, remember=remember)
    return values if values.device == device else values.to(device), record


class _Lease:
    """Lives as long as the graph that holds it."""

    __slots__ = ("__weakref__",)


class _PooledGather(torch.autograd.Function):
    """[TRAINER] forward: ids and weights out, pooled values in. [SHARD] remembers ids and weights.

    [TRAINER] backward: dY out, d_weights in; [SHARD] holds the update. Each backward pass is an update of its own,
    whether through one graph kept alive or through two. [TRAINER] the graph is freed: the next gather says so,
    [SHARD] forgets.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        weights: Tensor | None,
        ids: Tensor,
        offsets: Tensor,
        link: Link,
        trained: bool,
        remember: bool,
        device: torch.device,
    ) -> Tensor:
        # What backward needs does not go through save_for_backward: it is private copies that nobody writes over, and
        # an update must name the lookup that shards remember even if activation checkpointing runs the forward pass
        # again. An empty tensor does, so that a graph that was freed says so as every other does.
        ctx.save_for_backward(torch.empty(0, dtype=torch.float32, device="cpu"))
        bags = Bags(ids=ids, weights=link.wire_weights(weights), offsets=offsets)
        ctx.link, ctx.trained, ctx.record, ctx.lease = link, trained, None, None
        ctx.anchor, ctx.weights = anchor, weights
        values, record = _sums(link, bags, remember=remember, device=device)
        ctx.record = record
        if record is not None and record.remembered_by:
            ctx.lease = _Lease()
            weakref.finalize(ctx.lease, link.release(record)).atexit = False
        return values

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        needs_anchor_grad, want_weight_grad = ctx.needs_input_grad[:2]
        accumulates, captured = reaches_anchor(ctx) if needs_anchor_grad else (False, False)
        accumulates = accumulates and ctx.anchor.requires_grad  # it may have been frozen since; torch's leaves ask, too
        anchor_grad = weight_grad = None
        with torch.no_grad():
            if ctx.record is None:
                weight_grad = torch.zeros_like(ctx.weights) if want_weight_grad else None
            else:
                answer = ctx.link.send_update(
                    ctx.record,
                    grads.detach(),
                    hold=accumulates and ctx.trained,
                    want_weight_grad=want_weight_grad,
                )
                if want_weight_grad:
                    weight_grad = answer.to(device=ctx.weights.device, dtype=ctx.weights.dtype)
            if captured:
                anchor_grad = torch.zeros_like(ctx.anchor)
            elif accumulates and ctx.trained:
                anchor_grad = mark_like(ctx.anchor)
        if weight_grad is not None:
            weight_grad = first_order_only(weight_grad, grads, ctx.weights, ctx.anchor)
        return anchor_grad, weight_grad, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(f"forward-mode derivatives do not reach a pool: table {ctx.link.name!r}. Use backward()")


def reaches_anchor(ctx: Any) -> tuple[bool, bool]:
    """Whether this backward pass accumulates into the values; and whether it only hands out the anchor's gradient.

    Under ``torch.autograd.grad(loss, weights)`` and ``backward(inputs=...)`` nothing is accumulated, as for a leaf that
    is not among the inputs. ``torch.autograd.grad`` with the anchor among them takes its gradient and accumulates none.
    """
    try:
        return bool(torch._C._will_engine_execute_node(ctx.next_functions[0][0])), False
    except RuntimeError:  # torch's answer for a leaf that autograd.grad was asked for
        return False, True


def refuse_export(table: str) -> None:
    """Raises InvalidRequest while torch makes a program of a look-up that is to be saved."""
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        raise InvalidRequest(
            f"table {table!r} cannot be exported: its values live in a pool, and a saved program would hold a"
            " connection. Export what comes before and after the lookup, and look up in between"
        )


def refuse_transforms(link: Link) -> None:
    """Raises InvalidRequest inside of what torch.func transforms."""
    if torch._C._are_functorch_transforms_active():
        raise InvalidRequest(
            f"torch.func's transforms (grad, vmap, jvp, jacrev, ...) cannot follow a lookup in table {link.name!r}: its"
            " values are not in this process. Use backward() or torch.autograd.grad, and a batch instead of vmap"
        )
