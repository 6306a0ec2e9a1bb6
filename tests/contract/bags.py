"""Bags of contract tests, and the plainest sums of them.

Legend: B bags, L pairs, V value dim, N slots.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bags:
    """ids [L] int64, weights [L] float32 or None, offsets [B + 1] int64."""

    ids: Tensor
    weights: Tensor | None
    offsets: Tensor

    @property
    def num_bags(self) -> int:
        return self.offsets.shape[0] - 1


def make_bags(seed: int, *, num_slots: int = 50, lengths: Sequence[int] = (3, 0, 5, 1), weighted: bool = True) -> Bags:
    """Random bags, with repeated ids, the first and the last slot."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(num_slots, (total,), generator=generator)
    if total >= 3:
        ids[0], ids[1], ids[-1] = num_slots - 1, 0, ids[total // 2]
    weights = torch.randn(total, generator=generator) if weighted else None
    return Bags(ids, weights, torch.tensor([0, *itertools.accumulate(lengths)]))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-12))


def reference_sums(values_NV: Tensor, bags: Bags) -> Tensor:
    """[B, V] float64: weighted sums, one pair after another."""
    sums = torch.zeros(bags.num_bags, values_NV.shape[1], dtype=torch.float64)
    for bag in range(bags.num_bags):
        for pair in range(int(bags.offsets[bag]), int(bags.offsets[bag + 1])):
            weight = 1.0 if bags.weights is None else bags.weights[pair].double()
            sums[bag] += weight * values_NV[bags.ids[pair]].double()
    return sums
