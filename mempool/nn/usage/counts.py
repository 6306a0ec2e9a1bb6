"""Counts of the slots that each head of one layer chose: what the table's own counts, which are of all, cannot tell.

Legend: H heads, L pairs.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from mempool.types.usage import Tally, Usage, usage_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUsage:
    """How a layer used its table. all_heads: Together; heads: each. Without versions, and so none is outdated."""

    all_heads: Usage
    heads: tuple[Usage, ...]


class HeadCounts:
    """Counts in this process. Any thread may add to them.

    Args:
        heads: Of the layer.
        num_slots: Of its table.
    """

    def __init__(self, heads: int, num_slots: int) -> None:
        self._heads = heads
        self._num_slots = num_slots
        self._lock = threading.Lock()
        self._uses = torch.zeros(heads * num_slots, dtype=torch.int64, device="cpu")

    def add(self, ids: Tensor, num_bags: int) -> None:
        """Pairs whose gradient was pushed: [L] slots on the CPU, of each bag as many, those of the first head first."""
        by_head = ids.to(torch.int64).view(num_bags, self._heads, -1)
        places = by_head + self._num_slots * torch.arange(self._heads, dtype=torch.int64, device="cpu")[:, None]
        with self._lock:
            self._uses.index_add_(0, places.view(-1), torch.ones(ids.shape[0], dtype=torch.int64, device="cpu"))

    def usage(self) -> LayerUsage:
        """What the counts say by now."""
        with self._lock:
            uses = self._uses.view(self._heads, self._num_slots).clone().numpy()
        heads = tuple(usage_of(Tally.of(each)) for each in uses)
        return LayerUsage(all_heads=usage_of(Tally.of(uses.sum(axis=0))), heads=heads)
