"""Learning rates of values that begin above those of other parameters, and come down to them."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from mempool.client.counts import as_number
from mempool.errors import InvalidRequest
from mempool.nn.sizes import checked_int


class ValueLR(LRScheduler):
    """Multiplies all learning rates of an optimizer by a factor that goes in a line from ``start`` to ``end``.

    UltraMem (arXiv 2411.12364) trains values with 10 times the learning rate of the other parameters at first, and with
    the same at the end. It changes what rates are at, as torch's chainable schedulers do: another one of the same
    optimizer, stepped before or after this one, has its effect too.

    Args:
        optimizer: A ``PoolOptimizer``, or another.
        steps: Calls of ``step`` after which the factor is ``end``, and stays so.
        start, end: Factors above 0.

    Raises:
        InvalidRequest: A factor or a number of steps that makes no sense.

    Example:
        >>> memory_optimizer = mempool.optim.PoolOptimizer(model, lr=1e-3)
        >>> schedulers = [mempool.optim.ValueLR(memory_optimizer, steps=10_000)]
        >>> schedulers += [torch.optim.lr_scheduler.ExponentialLR(memory_optimizer, 0.9999)]
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, steps: int, start: float = 10.0, end: float = 1.0, last_epoch: int = -1
    ) -> None:
        self.steps = checked_int("steps", steps)
        self.start, self.end = _checked_factor("start", start), _checked_factor("end", end)
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The factor behind so many steps."""
        return self.start + (self.end - self.start) * min(step, self.steps) / self.steps

    def get_lr(self) -> list[Any]:
        step = self.last_epoch
        change = self.factor(step) / (self.factor(step - 1) if step > 0 else 1.0)
        return [group["lr"] * change for group in self.optimizer.param_groups]


def _checked_factor(name: str, factor: object) -> float:
    value = as_number(factor)
    if not 0.0 < value < float("inf"):
        raise InvalidRequest(
            f"{name} = {factor!r} must be a finite number above 0: what learning rates are multiplied by"
        )
    return value
