"""A gather that is started before its answer is needed, and in the backward pass answered after it was asked.

Two nodes of the graph: the later one, made where the result is taken, pushes the update in the backward pass; the
earlier one, made where the gather was started, waits for d_weights. What was computed between start and result is
differentiated between the two, as torch runs the nodes that were made last first.

Legend: B bags, L pairs of all bags together, V value dim.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from mempool.client.bags import checked_bags
from mempool.client.gathers.autograd import reaches_anchor, refuse_export, refuse_transforms
from mempool.client.gathers.first_order import first_order_only
from mempool.client.gathers.links import Link, PendingAnswer
from mempool.client.gathers.markers import mark_like
from mempool.client.gathers.untraced import untraced
from mempool.client.opening.waiting import Pending
from mempool.client.routing.attempt import LookupRecord
from mempool.errors import InvalidRequest
from mempool.types.bags import Bags


class PendingGather:
    """A gather under way: made by ``Table.gather_async``. All threads may use it.

    The graph is made by ``result``: whether gradients flow, and into what, is as it is there, but for the weights,
    which are those of the start. A handle that is dropped costs the answer that nobody takes, and nothing is kept.
    """

    def __init__(
        self,
        link: Link,
        *,
        anchor: Tensor,
        trained: bool,
        bags: Bags,
        weights: Tensor | None,
        device: torch.device,
        pending: PendingAnswer | None,
    ) -> None:
        self._link = link
        self._anchor = anchor
        self._trained = trained
        self._bags = bags
        self._weights = weights
        self._device = device
        self._pending = pending
        self._asked = _Asked()
        self._token: Tensor | None = None
        self._weights_version = 0
        if weights is not None and weights.requires_grad:
            self._weights_version = weights._version
            if torch.is_grad_enabled():
                self._token = _Started.apply(weights.reshape(-1), self._asked)  # type: ignore[no-untyped-call]
                self._weights = None  # the graph has them

    def __repr__(self) -> str:
        state = "done" if self.done() else "pending"
        return f"PendingGather({self._link.name!r}, bags={self._bags.num_bags}, {state})"

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            f"a look-up under way in table {self._link.name!r} cannot be pickled; take its result() in this process"
        )

    @untraced
    def done(self) -> bool:
        """Whether ``result`` would not wait."""
        return self._pending is None or self._pending.done()

    @untraced
    def result(self) -> Tensor:
        """Wait for the answer: [B, value_dim] float32, bitwise and with the gradients of ``Table.gather`` of the same.

        It may be taken again, as activation checkpointing does: each is a tensor and a graph of its own.

        Raises:
            ShardUnavailable: A shard did not answer within the pool's timeout_s of the start.
            DataLoss: Pages of the table are gone.
            InvalidRequest: The weights were written to since a start without gradients; the pool was closed meanwhile.
        """
        token, asked = self._token, self._asked
        if token is None and self._weights is not None and self._weights.requires_grad and torch.is_grad_enabled():
            if self._weights._version != self._weights_version:
                raise InvalidRequest(
                    f"the weights of a gather of table {self._link.name!r} that was started under no_grad were written"
                    " to before its result was taken: their gradient would be that of other weights. Start it with"
                    " gradients enabled, or take the result first"
                )
            asked = _Asked()
            token = _Started.apply(self._weights.reshape(-1), asked)  # type: ignore[no-untyped-call]
        record: LookupRecord | None = None
        if self._pending is None:
            values = torch.zeros(self._bags.num_bags, self._link.value_dim, dtype=torch.float32, device="cpu")
        else:
            values, record = self._pending.result()
        lease = None if self._pending is None else self._pending.lease
        taken: Tensor = _Taken.apply(  # type: ignore[no-untyped-call]
            self._anchor, token, self._link, self._trained, record, lease, asked, values, self._device
        )
        return taken


def begin(
    link: Link,
    ids: Tensor,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    anchor: Tensor,
    trained: bool,
    remember: bool,
) -> PendingGather:
    """``autograd.gather``, whose result is taken later; arguments and errors as there, raised here. A graph break."""
    refuse_export(link.name)
    return _begin(link, ids, weights, offsets, anchor=anchor, trained=trained, remember=remember)


@untraced
def _begin(
    link: Link,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor | None,
    *,
    anchor: Tensor,
    trained: bool,
    remember: bool,
) -> PendingGather:
    refuse_transforms(link)
    flat_ids, flat_weights, flat_offsets = checked_bags(
        ids, weights, offsets, num_slots=link.num_slots, table=link.name
    )
    differentiable = torch.is_grad_enabled() and (
        anchor.requires_grad or (weights is not None and weights.requires_grad)
    )
    bags = Bags(ids=flat_ids, weights=link.wire_weights(flat_weights), offsets=flat_offsets)
    return PendingGather(
        link,
        anchor=anchor,
        trained=trained,
        bags=bags,
        weights=weights,
        device=ids.device if weights is None else weights.device,
        pending=link.begin_gather(bags, remember=remember and differentiable) if bags.num_pairs else None,
    )


class _Asked:
    """The gradients of one gather's weights that backward passes have asked for and not taken yet."""

    def __init__(self) -> None:
        self._pending: dict[int, list[Pending[Tensor | None]]] = {}  # by backward pass: one may end before they come

    def add(self, pending: Pending[Tensor | None]) -> None:
        self._pending.setdefault(torch._C._current_graph_task_id(), []).append(pending)

    def take(self) -> Tensor | None:
        """Their sum, [L] float32 on the CPU, for the backward pass that runs now; None where none was asked for."""
        total: Tensor | None = None
        for pending in self._pending.pop(torch._C._current_graph_task_id(), ()):
            answer = pending.result()
            assert answer is not None, "it was asked for"
            total = answer if total is None else total + answer
        return total


class _Started(torch.autograd.Function):
    """[TRAINER] forward: a token [1] that the result depends on. [TRAINER] backward: d_weights in, which are waited
    for here. It keeps no tensor for the backward pass but the weights, whose values do not matter there."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, asked: _Asked) -> Tensor:
        ctx.weights, ctx.asked = weights, asked
        return torch.zeros(1, dtype=torch.float32, device="cpu")

    @staticmethod
    def backward(ctx: Any, token_grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            answer = ctx.asked.take()
            weight_grad = torch.zeros_like(ctx.weights) if answer is None else answer.to(ctx.weights)
        return first_order_only(weight_grad, token_grad, ctx.weights), None


class _Taken(torch.autograd.Function):
    """[TRAINER] forward: the values. [TRAINER] backward: dY out. Otherwise as ``autograd``'s own."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        token: Tensor | None,  # noqa: ARG004  the graph leads through it
        link: Link,
        trained: bool,
        record: LookupRecord | None,
        lease: object,
        asked: _Asked,
        values: Tensor,
        device: torch.device,
    ) -> Tensor:
        ctx.save_for_backward(torch.empty(0, dtype=torch.float32, device="cpu"))  # a freed graph says so
        ctx.anchor, ctx.link, ctx.trained = anchor, link, trained
        ctx.record, ctx.lease, ctx.asked = record, lease, asked
        return values.to(device, copy=True)  # the handle may be asked again

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        accumulates, captured = reaches_anchor(ctx) if ctx.needs_input_grad[0] else (False, False)
        hold = accumulates and ctx.trained and ctx.anchor.requires_grad
        want_weight_grad = ctx.needs_input_grad[1] and torch._C._will_engine_execute_node(ctx.next_functions[1][0])
        anchor_grad = token_grad = None
        with torch.no_grad():
            if ctx.record is not None and want_weight_grad:
                ctx.asked.add(ctx.link.begin_update(ctx.record, grads.detach(), hold=hold))
            elif ctx.record is not None:
                ctx.link.send_update(ctx.record, grads.detach(), hold=hold, want_weight_grad=False)
            if captured:
                anchor_grad = torch.zeros_like(ctx.anchor)
            elif hold:
                anchor_grad = mark_like(ctx.anchor)
        if want_weight_grad:
            token_grad = first_order_only(torch.zeros(1, dtype=torch.float32, device="cpu"), grads, ctx.anchor)
        return anchor_grad, token_grad, *((None,) * 7)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(f"forward-mode derivatives do not reach a pool: table {ctx.link.name!r}. Use backward()")
