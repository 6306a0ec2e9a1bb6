"""A gather as torch's autograd sees it: values forward, updates and d_weights backward.

Legend: B bags, L pairs of all bags together, V value dim. Sending is the table's.
"""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mempool.client.routing.attempt import LookupRecord
from mempool.types.bags import Bags


class Link(Protocol):
    """What this module asks of a table."""

    @property
    def value_dim(self) -> int: ...

    def send_gather(self, bags: Bags, *, remember: bool) -> tuple[Tensor, LookupRecord]: ...

    def send_update(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, want_weight_grad: bool
    ) -> Tensor | None: ...

    def release(self, record: LookupRecord) -> Callable[[], None]: ...

    def wire_weights(self, weights: Tensor | None) -> Tensor | None: ...


def pooled_gather(
    link: Link,
    *,
    anchor: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    remember: bool,
    device: torch.device,
) -> Tensor:
    """Pooled values [B, V] float32 on ``device``, differentiable in ``weights`` and in the table's values.

    Args:
        anchor: An empty leaf that requires grad exactly if the values are trained. It makes backward run where the
            weights are constants or there are none; it never gets a gradient.
        ids: [L] int64 on the CPU.
        weights: [L] floating, on any device; None means all ones.
        offsets: [B + 1] int64 on the CPU.
        remember: Let shards keep ids and weights if a backward pass may come.
    """
    differentiable = torch.is_grad_enabled() and (
        anchor.requires_grad or (weights is not None and weights.requires_grad)
    )
    pooled: Tensor = _PooledGather.apply(  # type: ignore[no-untyped-call]
        anchor, weights, ids, offsets, link, remember and differentiable, device
    )
    return pooled


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
        anchor: Tensor,  # noqa: ARG004  its part is to be an input that requires grad
        weights: Tensor | None,
        ids: Tensor,
        offsets: Tensor,
        link: Link,
        remember: bool,
        device: torch.device,
    ) -> Tensor:
        # Nothing goes through save_for_backward: what is kept are private copies that nobody writes over, and an update
        # must name the lookup that shards remember even if activation checkpointing runs the forward pass again.
        bags = Bags(ids=ids, weights=link.wire_weights(weights), offsets=offsets)
        ctx.link, ctx.record, ctx.lease = link, None, None
        if weights is not None:
            ctx.weights_dtype, ctx.weights_device = weights.dtype, weights.device
        if not bags.num_pairs:
            return torch.zeros(bags.num_bags, link.value_dim, dtype=torch.float32, device=device)
        values, record = link.send_gather(bags, remember=remember)
        ctx.record = record
        if record.remembered_by:
            ctx.lease = _Lease()
            weakref.finalize(ctx.lease, link.release(record)).atexit = False
        return values.to(device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        want_weight_grad = ctx.needs_input_grad[1]
        weight_grad = torch.zeros(0, dtype=torch.float32, device="cpu")
        if ctx.record is not None:
            weight_grad = ctx.link.send_update(
                ctx.record, grads, hold=_trains_values(ctx), want_weight_grad=want_weight_grad
            )
        if not want_weight_grad:
            return (None,) * 7
        weight_grad = weight_grad.to(device=ctx.weights_device, dtype=ctx.weights_dtype)
        return None, weight_grad, None, None, None, None, None


def _trains_values(ctx: Any) -> bool:
    """Whether this backward pass accumulates into the values.

    Not where the table was frozen at the forward pass, nor under ``torch.autograd.grad(loss, weights)`` and
    ``backward(inputs=...)``: there, as for a leaf that is not among the inputs, nothing is accumulated.
    """
    if not ctx.needs_input_grad[0]:
        return False
    return bool(torch._C._will_engine_execute_node(ctx.next_functions[0][0]))
