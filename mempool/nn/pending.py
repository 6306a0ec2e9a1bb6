"""A memory layer's look-up that was started and not finished yet. What it does is the layer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from mempool.client.gathers.pending import PendingGather
from mempool.errors import InvalidRequest
from mempool.nn.choice import MemoryLookup

if TYPE_CHECKING:
    from mempool.nn.layer import MemoryLayer


class PendingMemory:
    """The look-up of some tokens under way: made by ``MemoryLayer.start``, or by the call of a layer with ``overlap``.

    One that is dropped costs the answer that nobody takes, and nothing is kept of it.

    Attributes:
        layer: Whose it is.
        lookup: What was chosen; scores and weights are differentiable.
        x, gathering, with_gradients: For the layer: its input after dropout, the gather, whether a graph was made.
    """

    def __init__(self, layer: MemoryLayer, x: Tensor, gathering: PendingGather, lookup: MemoryLookup) -> None:
        self.layer = layer
        self.x = x
        self.gathering = gathering
        self.lookup = lookup
        self.with_gradients = torch.is_grad_enabled()

    def __repr__(self) -> str:
        state = "done" if self.done() else "pending"
        return f"PendingMemory({self.layer.table.name!r}, tokens={list(self.x.shape[:-1])}, {state})"

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            f"a look-up under way in table {self.layer.table.name!r} cannot be pickled; take its result() in this"
            " process"
        )

    def done(self) -> bool:
        """Whether ``result`` would not wait for shards."""
        return self.gathering.done()

    def result(self) -> Tensor:
        """``layer.finish`` of it: [..., out_dim]."""
        return self.layer.finish(self)
