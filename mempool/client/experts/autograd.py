"""Sums of experts as torch's autograd sees them: what they answer forward, updates, d_gates and d_inputs backward.

[TRAINER] forward: ids, gates and inputs out, sums in. [SHARD] remembers ids and gates. [TRAINER] backward: inputs and
dY out, d_gates and d_inputs in; [SHARD] holds what trains u and v until the commit.

Legend: B bags, L pairs of all bags together, V value dim, I columns of u.
"""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from mempool.client.bags import checked_bags, require_dense
from mempool.client.gathers.autograd import reaches_anchor, refuse_export, refuse_transforms
from mempool.client.gathers.first_order import first_order_only
from mempool.client.gathers.links import Link
from mempool.client.gathers.markers import mark_like
from mempool.client.gathers.untraced import untraced
from mempool.client.routing.attempt import LookupRecord
from mempool.errors import InvalidRequest
from mempool.types.bags import ACTS, Act, Bags


class ExpertLink(Link, Protocol):
    """What is asked of the table whose rows are experts."""

    def send_experts(self, bags: Bags, inputs: Tensor, *, act: Act, remember: bool) -> tuple[Tensor, LookupRecord]: ...

    def send_expert_update(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, want_grads: bool
    ) -> tuple[Tensor, Tensor] | None: ...


@untraced
def expert_sums(
    link: ExpertLink,
    inputs: Tensor,
    ids: Tensor,
    gates: Tensor,
    *,
    act: Act,
    anchor: Tensor,
    trained: bool,
    remember: bool,
) -> Tensor:
    """Sums [B, V - I] float32 of gate * act(<u, input>) * v over each bag's experts, differentiable in inputs, gates
    and in the rows [u, v].

    Args:
        inputs: [B, I] floating, on any device; the sums are there too.
        ids: [B, L] integers.
        gates: [B, L] floating.
        act: What an expert does to its product.
        anchor, trained, remember: As of ``gathers.autograd.gather``.

    Raises:
        InvalidRequest: A wrong shape, dtype, id or act, or a transform that a lookup cannot follow; nothing was sent.
    """
    refuse_export(link.name)
    refuse_transforms(link)
    flat_ids, flat_gates, offsets = checked_bags(ids, gates, None, num_slots=link.num_slots, table=link.name)
    assert flat_gates is not None, "gates were given"
    _check_inputs(link, inputs, num_bags=ids.shape[0], act=act)
    wants = anchor.requires_grad or flat_gates.requires_grad or inputs.requires_grad
    remember = remember and torch.is_grad_enabled() and wants
    sums: Tensor = _ExpertSums.apply(  # type: ignore[no-untyped-call]
        anchor, inputs, flat_gates, flat_ids, offsets, link, act, trained, remember
    )
    return sums


def _check_inputs(link: Link, inputs: Tensor, *, num_bags: int, act: str) -> None:
    if act not in ACTS:
        raise InvalidRequest(f"experts of table {link.name!r}: act = {act!r} must be one of {', '.join(ACTS)}")
    require_dense("inputs", inputs, table=link.name)
    if inputs.dim() != 2 or inputs.shape[0] != num_bags or not inputs.is_floating_point():
        raise InvalidRequest(
            f"experts of table {link.name!r}: inputs must be [{num_bags}, I] of a floating dtype, one for each bag of "
            f"ids, not {list(inputs.shape)} {inputs.dtype}"
        )
    if not 1 <= inputs.shape[1] < link.value_dim:
        raise InvalidRequest(
            f"experts of table {link.name!r}: inputs of {inputs.shape[1]} columns leave none of a row's "
            f"{link.value_dim} for u or v; make the table with value_dim = inputs + outputs"
        )


class _Lease:
    """Lives as long as the graph that holds it."""

    __slots__ = ("__weakref__",)


class _ExpertSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        inputs: Tensor,
        gates: Tensor,
        ids: Tensor,
        offsets: Tensor,
        link: ExpertLink,
        act: Act,
        trained: bool,
        remember: bool,
    ) -> Tensor:
        # As a gather does: private copies, and an empty tensor that says whether the graph was freed.
        ctx.save_for_backward(torch.empty(0, dtype=torch.float32, device="cpu"))
        ctx.link, ctx.trained, ctx.record, ctx.lease = link, trained, None, None
        ctx.anchor, ctx.inputs, ctx.gates = anchor, inputs, gates
        if not ids.shape[0]:
            return torch.zeros(
                inputs.shape[0], link.value_dim - inputs.shape[1], dtype=torch.float32, device=inputs.device
            )
        bags = Bags(ids=ids, weights=link.wire_weights(gates), offsets=offsets)
        own = link.wire_weights(inputs)
        assert own is not None, "inputs were given"
        sums, ctx.record = link.send_experts(bags, own, act=act, remember=remember)
        if ctx.record.remembered_by:
            ctx.lease = _Lease()
            weakref.finalize(ctx.lease, link.release(ctx.record)).atexit = False
        return sums.to(inputs.device)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        needs_anchor_grad, *wanted = ctx.needs_input_grad[:3]
        accumulates, captured = reaches_anchor(ctx) if needs_anchor_grad else (False, False)
        hold = accumulates and ctx.anchor.requires_grad and ctx.trained
        given = ctx.inputs, ctx.gates
        gradients = [torch.zeros_like(of) if wants else None for of, wants in zip(given, wanted, strict=True)]
        anchor_grad = None
        with torch.no_grad():
            if ctx.record is not None:
                answer = ctx.link.send_expert_update(ctx.record, grads, hold=hold, want_grads=any(wanted))
                if answer is not None:
                    of_gates, of_inputs = answer
                    gradients = [
                        found.to(device=of.device, dtype=of.dtype) if wants else None
                        for found, of, wants in zip((of_inputs, of_gates), given, wanted, strict=True)
                    ]
            if captured:
                anchor_grad = torch.zeros_like(ctx.anchor)
            elif hold:
                anchor_grad = mark_like(ctx.anchor)
        depends_on = (grads, ctx.inputs, ctx.gates, ctx.anchor)
        first = [None if each is None else first_order_only(each, *depends_on) for each in gradients]
        return anchor_grad, *first, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(f"forward-mode derivatives do not reach a pool: table {ctx.link.name!r}. Use backward()")
