"""A gather as ``torch.compile`` sees it: two operators of torch's own registry, so that the graph does not break.

They do what ``autograd`` does, from inside a compiled graph: what backward needs of a lookup rides along as a ticket, a
tensor whose memory's end tells the shards that they may forget.

Legend: B bags, L pairs of all bags together, V value dim.
"""

import itertools
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.client.bags import checked_bags
from mempool.client.gathers.links import LINKS, Link
from mempool.client.gathers.markers import mark_like
from mempool.client.routing.attempt import LookupRecord
from mempool.errors import InvalidRequest
from mempool.types.bags import Bags


def compiled_gather(
    link: Link,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor | None,
    *,
    anchor: Tensor,
    trained: bool,
    remember: bool,
) -> Tensor:
    """As ``autograd.gather``; ids are checked when the operator runs."""
    differentiable = torch.is_grad_enabled() and (
        anchor.requires_grad or (weights is not None and weights.requires_grad)
    )
    values, _ = torch.ops.mempool.gather(
        anchor, weights, ids, offsets, link.number, link.value_dim, trained, remember and differentiable
    )
    return values  # type: ignore[no-any-return]


class _Tickets:
    """Lookups by ticket, for as long as the ticket's memory is there."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._records: dict[int, LookupRecord] = {}

    def issue(self, link: Link, record: LookupRecord) -> Tensor:
        """[1] int64 on the CPU."""
        number = next(self._numbers)
        self._records[number] = record
        body = np.array([number], dtype=np.int64)
        release = link.release(record) if record.remembered_by else None
        records = self._records

        def end() -> None:
            records.pop(number, None)
            if release is not None:
                release()

        # On the array that the tensor's storage keeps, not on the tensor: torch makes and drops those as it likes.
        weakref.finalize(body, end).atexit = False
        return torch.from_numpy(body)

    def record(self, ticket: Tensor) -> LookupRecord | None:
        """None where only a copy of the ticket is left, as hooks that move saved tensors leave it."""
        return self._records.get(int(ticket))


_TICKETS = _Tickets()


def _bags(link: Link, ids: Tensor, weights: Tensor | None, offsets: Tensor | None) -> Bags:
    flat_ids, flat_weights, flat_offsets = checked_bags(
        ids, weights, offsets, num_slots=link.num_slots, table=link.name
    )
    return Bags(ids=flat_ids, weights=link.wire_weights(flat_weights), offsets=flat_offsets)


@torch.library.custom_op("mempool::gather", mutates_args=())
def _gather(
    anchor: Tensor,  # noqa: ARG001  its part is to be an input that requires grad
    weights: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    link: int,
    value_dim: int,
    trained: bool,  # noqa: ARG001  for the backward pass
    remember: bool,
) -> tuple[Tensor, Tensor]:
    table = LINKS.get(link)
    device = ids.device if weights is None else weights.device
    bags = _bags(table, ids, weights, offsets)
    if not bags.num_pairs:
        values = torch.zeros(bags.num_bags, value_dim, dtype=torch.float32, device=device)
        return values, torch.zeros(1, dtype=torch.int64, device="cpu")
    values, record = table.send_gather(bags, remember=remember)
    return values.to(device), _TICKETS.issue(table, record)


@_gather.register_fake
def _(
    anchor: Tensor,  # noqa: ARG001
    weights: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    link: int,  # noqa: ARG001
    value_dim: int,
    trained: bool,  # noqa: ARG001
    remember: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    if (ids.dim() != 2) if offsets is None else (offsets.dim() != 1):
        raise InvalidRequest(f"give ids [B, L], or ids [L] with offsets [B + 1]; got ids {list(ids.shape)}")
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - 1
    device = ids.device if weights is None else weights.device
    values = torch.empty(num_bags, value_dim, dtype=torch.float32, device=device)
    return values, torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("mempool::update", mutates_args=())
def _update(
    anchor: Tensor,
    weights: Tensor | None,
    ids: Tensor,
    offsets: Tensor | None,
    ticket: Tensor,
    grads: Tensor,
    link: int,
    hold: bool,
    want_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The anchor's gradient and the weights' (empty where there are none). The first makes the graph keep the call."""
    table = LINKS.get(link)
    hold = hold and _accumulates(anchor)
    anchor_grad = mark_like(anchor)
    weight_grad = torch.zeros(0, dtype=torch.float32, device="cpu") if weights is None else torch.zeros_like(weights)
    if ids.numel() == 0:
        return anchor_grad, weight_grad
    record = _TICKETS.record(ticket)
    if record is None:
        _, record = table.send_gather(_bags(table, ids, weights, offsets), remember=False)
    answer = table.send_update(record, grads, hold=hold, want_weight_grad=want_weight_grad)
    if answer is not None and weights is not None:
        weight_grad = answer.to(device=weights.device, dtype=weights.dtype, copy=True).view(weights.shape)
    return anchor_grad, weight_grad


@_update.register_fake
def _(
    anchor: Tensor,
    weights: Tensor | None,
    ids: Tensor,  # noqa: ARG001
    offsets: Tensor | None,  # noqa: ARG001
    ticket: Tensor,  # noqa: ARG001
    grads: Tensor,  # noqa: ARG001
    link: int,  # noqa: ARG001
    hold: bool,  # noqa: ARG001
    want_weight_grad: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    weight_grad = torch.empty(0, dtype=torch.float32, device="cpu") if weights is None else torch.empty_like(weights)
    return torch.empty_like(anchor), weight_grad


def _accumulates(anchor: Tensor) -> bool:
    """Whether the backward pass that runs now reaches the anchor; see ``autograd``."""
    node = torch._C._current_autograd_node()
    for leaf, _ in () if node is None else node.next_functions:
        variable = getattr(leaf, "variable", None)
        # The operator sees another tensor of the same memory.
        if leaf is not None and variable is not None and variable.data_ptr() == anchor.data_ptr():
            try:
                return bool(torch._C._will_engine_execute_node(leaf)) and variable.requires_grad
            except RuntimeError:  # torch's answer for a leaf that autograd.grad was asked for
                return False
    return True


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    anchor, weights, ids, offsets, link, _, trained, _ = inputs
    ctx.save_for_backward(anchor, weights, ids, offsets, output[1])
    ctx.link, ctx.trained = link, trained
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    anchor, weights, ids, offsets, ticket = ctx.saved_tensors
    hold, want_weight_grad = ctx.trained and ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    if grads is None or not (hold or want_weight_grad):
        return (None,) * 8
    anchor_grad, weight_grad = torch.ops.mempool.update(
        anchor, weights, ids, offsets, ticket, grads, ctx.link, hold, want_weight_grad
    )
    return anchor_grad if hold else None, weight_grad if want_weight_grad else None, *((None,) * 6)


_gather.register_autograd(_backward, setup_context=_set_up)
