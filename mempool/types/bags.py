"""Bags of (slot id, weight) pairs, as clients send them and shards keep them.

Legend: B bags, L pairs of all bags together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


Act = Literal["", "gelu", "relu", "silu"]
"""What experts do to their product; "": the rows are no experts, but values. gelu: the exact one, of erf."""

ACTS: tuple[Act, ...] = ("gelu", "relu", "silu")


@dataclass(frozen=True, slots=True, eq=False)
class Bags:
    """B bags of L pairs.

    Attributes:
        ids: [L] int64, or int32 where the table has no more than 2^31 slots (on a shard fewer).
        weights: [L] float32 or bfloat16 (float32 on a shard); None means all ones.
        offsets: [B + 1] int64; bag b holds pairs offsets[b] to offsets[b + 1].
        made: What others have made of them, by names of their own, for whoever is given the same: these are written to
            by nobody. Lives as long as these, so nothing large is kept there that is not these themselves.
    """

    ids: Tensor
    weights: Tensor | None
    offsets: Tensor
    made: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)

    @property
    def num_bags(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def num_pairs(self) -> int:
        return self.ids.shape[0]

    @property
    def num_bytes(self) -> int:
        weights = 0 if self.weights is None else self.weights.nbytes
        return self.ids.nbytes + weights + self.offsets.nbytes

    def some(self, first: int, end: int) -> Bags:
        """The bags from ``first`` to ``end``; views, but for the offsets."""
        if first == 0 and end == self.num_bags:
            return self
        start, stop = int(self.offsets[first]), int(self.offsets[end])
        weights = None if self.weights is None else self.weights[start:stop]
        return Bags(ids=self.ids[start:stop], weights=weights, offsets=self.offsets[first : end + 1] - start)
