"""Trains the towers on triples of one digit, each way's item drawn by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from digits.data import Way
from digits.model import Towers
from mempool import optim

BATCH = 128
STEPS = 250
_LR = 2e-3
_WARMUP = 0.1  # of the steps


def train(
    towers: Towers, ways: Mapping[str, Way], *, steps: int = STEPS, seed: int = 0, on_step: Callable[[], object] = int
) -> float:
    """Answers the loss of the last step."""
    generator = torch.Generator().manual_seed(seed)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(towers.parameters(), lr=_LR, weight_decay=0.01)]
    if towers.memory is not None:
        optimizers.append(optim.PoolOptimizer(towers))
    rising = max(1.0, _WARMUP * steps)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: min((step + 1) / rising, 1.0) * (1.0 - step / steps))
        for each in optimizers
    ]
    towers.train()
    loss = torch.zeros(())
    for _ in range(steps):
        loss = towers.loss(*batch(ways, generator))
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        on_step()
    return float(loss.detach())


def batch(ways: Mapping[str, Way], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Digits [BATCH], as many of each as fit, and of each way an item of each of them."""
    digits = torch.arange(BATCH) % 10
    drawn = {}
    for name, way in ways.items():
        features = torch.empty(BATCH, way.trained.features.shape[1])
        for digit in range(10):
            places, wanted = way.trained.of_digit(digit), digits == digit
            chosen = torch.randint(len(places), (int(wanted.sum()),), generator=generator)
            features[wanted] = way.trained.features[places[chosen]]
        drawn[name] = features
    return drawn, digits
