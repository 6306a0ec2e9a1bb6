"""What is looked up: shapes, pairs of a seed, and a table's values, which every process makes for itself and alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mempool.bench.cases.inputs import sampled
from mempool.bench.gate import Check

#: Sets of inputs of a shape: look-ups that follow each other never have the same, see measuring.interleaved.
NUM_INPUTS = 4
#: Rows that are drawn; a table repeats them. A prime, so that no two pages hold the same rows in the same places.
_DRAWN_ROWS = 4093
_WRITTEN_ROWS = 1 << 16
_CHECKED_BAGS = 8
#: Of an id and of a weight, as the product sends them.
_PAIR_BYTES = 4 + 4


@dataclass(frozen=True)
class TableSize:
    """Slots and columns of float32, and the seed of the values."""

    num_slots: int
    value_dim: int
    seed: int = 0

    def values(self, ids: Tensor) -> Tensor:
        """Rows [L, W] float32 of ids [L]."""
        return self._drawn()[ids % _DRAWN_ROWS]

    def fill(self, rows: Tensor) -> Tensor:
        """Write the whole table into rows [N, W]."""
        drawn = self._drawn()
        for first in range(0, self.num_slots, _DRAWN_ROWS):
            part = rows[first : first + _DRAWN_ROWS]
            part.copy_(drawn[: part.shape[0]])
        return rows

    def write(self, write: Callable[[Tensor, Tensor], object]) -> None:
        """Give the whole table to a function of ids [L] and rows [L, W], some at a time."""
        for ids in torch.split(torch.arange(self.num_slots), _WRITTEN_ROWS):
            write(ids, self.values(ids))

    def _drawn(self) -> Tensor:
        return torch.randn(_DRAWN_ROWS, self.value_dim, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class Shape:
    """Bags and pairs of each; "1024x128"."""

    bags: int
    pairs: int

    @property
    def name(self) -> str:
        return f"{self.bags}x{self.pairs}"

    @property
    def request_bytes(self) -> int:
        """Bytes of the tensors that are sent: ids of 32 bits and weights."""
        return self.bags * self.pairs * _PAIR_BYTES

    def reply_bytes(self, table: TableSize) -> int:
        """Bytes of the tensor that comes back."""
        return self.bags * table.value_dim * 4


@dataclass(frozen=True)
class Pairs:
    """One look-up: ids [B, K] int64, uniform; weights [B, K] float32, 0.5 to 1.5."""

    ids: Tensor
    weights: Tensor

    def some(self, bags: list[int]) -> Pairs:
        """Those of some bags."""
        return replace(self, ids=self.ids[bags], weights=self.weights[bags])


def drawn_pairs(shape: Shape, table: TableSize, seed: int, num_sets: int = NUM_INPUTS) -> list[Pairs]:
    """Sets of pairs of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Pairs(
            torch.randint(table.num_slots, (shape.bags, shape.pairs), generator=generator),
            torch.rand(shape.bags, shape.pairs, generator=generator) + 0.5,
        )
        for _ in range(num_sets)
    ]


def checked_sums(name: str, table: TableSize, pairs: Pairs, found: Tensor) -> Check:
    """How far sums [B, W] are from float64: of all bags by shape, of some by value."""
    if found.shape != (pairs.ids.shape[0], table.value_dim):
        raise ValueError(f"{name} answers {list(found.shape)}, not {[pairs.ids.shape[0], table.value_dim]}")
    bags = sampled(_CHECKED_BAGS, pairs.ids.shape[0], table.seed)
    some = pairs.some(bags)
    rows = table.values(some.ids.flatten()).double().view(*some.ids.shape, table.value_dim)
    return Check.of(name, [found[bags]], [(rows * some.weights.double().unsqueeze(-1)).sum(1)])
