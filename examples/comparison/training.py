"""How every model of the comparison is trained: Adam, its rate warmed up and lowered, and the pool's optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from comparison.blocks import Blocks
from mempool import optim

_WARMUP_STEPS = 50


class Learner:
    """A model in training.

    Attributes:
        seconds: spent in steps.
        steps: done.

    Args:
        model: what learns; `blocks` are a part of it.
        blocks: say which tables there are, and their extra losses.
        lr: of Adam, after the warm-up; lowered to 0.
        table_lr: of the values; lowered to a tenth in a line, as UltraMem does (`ValueLR`).
        num_steps: of all.
        lower_values: else the values' rate stays.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        *,
        lr: float,
        table_lr: float,
        num_steps: int,
        lower_values: bool = True,
    ) -> None:
        self.model, self._blocks = model, blocks
        adam = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98))
        self._optimizers: list[torch.optim.Optimizer] = [adam]
        self._schedulers: list[LRScheduler] = [
            LambdaLR(adam, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS) * (1.0 - step / num_steps))
        ]
        if blocks.layers() or blocks.ngram is not None:
            tables = optim.PoolOptimizer(model, lr=table_lr)
            self._optimizers.append(tables)
            if lower_values:
                self._schedulers.append(optim.ValueLR(tables, num_steps, start=1.0, end=0.1))
        self.seconds, self.steps = 0.0, 0

    def step(self, loss: Tensor) -> None:
        """Backward, and one step of every optimizer."""
        extra = self._blocks.extra_loss()
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
        for optimizer in self._optimizers:
            optimizer.step()
        for scheduler in self._schedulers:
            scheduler.step()
        self.steps += 1

    def train(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """All steps: each of ``losses`` is a function that computes one."""
        self.model.train()
        for loss in losses:
            start_s = time.perf_counter()
            self.step(loss())
            self.seconds += time.perf_counter() - start_s


def parameters_of(model: nn.Module) -> int:
    """In the trainer."""
    return sum(each.numel() for each in model.parameters())
