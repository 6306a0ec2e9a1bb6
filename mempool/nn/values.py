"""Parameters of a layer that stand for its table's values, or keys: to freeze and to zero them by."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mempool.client import Table
from mempool.client.gathers.links import LINKS, PendingAnswer
from mempool.client.gathers.markers import Mark
from mempool.client.lookup import has_flat_keys
from mempool.client.opening.waiting import Pending
from mempool.client.routing.attempt import LookupRecord
from mempool.nn.usage import HeadCounts
from mempool.types.bags import Act, Bags


def values_parameter(*, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    """One element, which nobody reads."""
    return nn.Parameter(torch.zeros(1, device=device, dtype=torch.get_default_dtype() if dtype is None else dtype))


def has_mark(parameter: nn.Parameter) -> bool:
    """Whether a gradient that is missing says that somebody zeroed it: of an ordinary parameter, and of FSDP2's own,
    sharded one. Others may be views that come and go, whose gradients are taken away by what manages them."""
    if type(parameter) is nn.Parameter:
        return True
    tensors = sys.modules.get("torch.distributed.tensor")  # there if anything is sharded; not loaded for the others
    return tensors is not None and isinstance(parameter, tensors.DTensor)


class LayerLink:
    """A table's link as one layer uses it: an update through it belongs to the layer's parameter.

    Args:
        table: The table.
        parameter: The layer's, while nothing has put another in its place.
        counts: Where what heads choose is counted, once its gradient is pushed; None: nowhere.
    """

    def __init__(self, table: Table, parameter: nn.Parameter, *, counts: HeadCounts | None = None) -> None:
        self._link = table.link
        self.parameter = parameter
        self.counts = counts
        self._mark = Mark(parameter) if has_mark(parameter) else None
        if self._mark is not None:
            self._link.markers.add(self._mark)
        self.number = LINKS.add(self)

    @property
    def name(self) -> str:
        return self._link.name

    @property
    def num_slots(self) -> int:
        return self._link.num_slots

    @property
    def value_dim(self) -> int:
        return self._link.value_dim

    def send_gather(self, bags: Bags, *, remember: bool) -> tuple[Tensor, LookupRecord]:
        return self._link.send_gather(bags, remember=remember)

    def send_update(self, record: LookupRecord, grads: Tensor, *, hold: bool, want_weight_grad: bool) -> Tensor | None:
        answer = self._link.send_update(record, grads, hold=hold, want_weight_grad=want_weight_grad)
        if hold:
            self._pushed(record)
        return answer

    def send_experts(self, bags: Bags, inputs: Tensor, *, act: Act, remember: bool) -> tuple[Tensor, LookupRecord]:
        return self._link.send_experts(bags, inputs, act=act, remember=remember)

    def send_expert_update(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, want_grads: bool
    ) -> tuple[Tensor, Tensor] | None:
        answer = self._link.send_expert_update(record, grads, hold=hold, want_grads=want_grads)
        if hold:
            self._pushed(record)
        return answer

    def begin_gather(self, bags: Bags, *, remember: bool) -> PendingAnswer:
        return self._link.begin_gather(bags, remember=remember)

    def begin_update(self, record: LookupRecord, grads: Tensor, *, hold: bool) -> Pending[Tensor | None]:
        pending = self._link.begin_update(record, grads, hold=hold)
        if hold:
            self._pushed(record)
        return pending

    def _pushed(self, record: LookupRecord) -> None:
        if self._mark is not None:
            self._mark.pushed()
        if self.counts is not None:
            self.counts.add(record.bags.ids, record.bags.num_bags)

    def release(self, record: LookupRecord) -> Callable[[], None]:
        return self._link.release(record)

    def wire_weights(self, weights: Tensor | None, *, kept: bool = True) -> Tensor | None:
        return self._link.wire_weights(weights, kept=kept)

    @property
    def lost(self) -> bool:
        """Whether the parameter was given another tensor's contents, which know nothing of its mark."""
        return self._mark is not None and self._mark.lost

    def end(self) -> None:
        """Another parameter stands for the values from now on; graphs that hold this link go on."""
        if self._mark is not None:
            self._mark.end()


class KeyLink(LayerLink):
    """The keys that a table trains in the pool, as one layer uses them.

    Args:
        table: The table; its keys' is ``table.keys``.
        parameter: The layer's that stands for the keys.
    """

    def __init__(self, table: Table, parameter: nn.Parameter) -> None:
        super().__init__(table.keys, parameter)
        self._table = table

    def chosen(self, queries_BHD: Tensor, topk: int, *, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slot ids [B, H, K] int64 and their scores float32, differentiable in queries and keys.

        Args:
            queries_BHD: Float32; H is 1 with flat keys, any number with hierarchical ones.
            anchor: The parameter, as the layer has it during its call.
        """
        assert anchor is not None, "a layer whose keys are the pool's has it"
        table = self._table
        queries = queries_BHD.squeeze(1) if has_flat_keys(table.schema) else queries_BHD
        trained = anchor.requires_grad and table.keys.requires_grad
        ids, scores = table.scored_by(self, queries, topk, anchor=anchor, trained=trained)
        shape = (*queries_BHD.shape[:2], topk)
        return ids.view(shape), scores.view(shape)


def key_link(table: Table, parameter: nn.Parameter | None) -> KeyLink | None:
    """None of a layer that has keys of its own, and no such parameter."""
    return None if parameter is None else KeyLink(table, parameter)


def follows(link: LayerLink, parameter: nn.Parameter | None) -> bool:
    """Whether another parameter, with a mark, has come in the place of a link's; or into it."""
    return parameter is not None and (parameter is not link.parameter or link.lost) and has_mark(parameter)
