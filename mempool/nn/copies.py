"""What a copy of a layer is told: it shares the table, so an average of models averages everything but the values."""

import warnings

import torch
from torch import nn


class CopyCaution:
    """Watches a deep copy until it is trained by itself, or until it was told, once.

    A copy whose parameters are written from outside is an average of models (``AveragedModel``, EMA) or a snapshot of
    one (a target network); it reads the live values all the same.

    Args:
        copy: A module that was just copied.
        table: The name of its table.
    """

    def __init__(self, copy: nn.Module, table: str) -> None:
        self._table = table
        self._versions = _versions(copy)
        self._over = False

    def before_call(self, copy: nn.Module) -> None:
        """Warns where it is due."""
        if self._over:
            return
        if copy.training and torch.is_grad_enabled():
            self._over = True
        elif _versions(copy) != self._versions:
            self._over = True
            warnings.warn(
                "this copy of a MemoryLayer was given other parameters (an average, as AveragedModel or EMA makes it,"
                f" or a snapshot), but it reads the live values of table {self._table!r}: a copy shares the table, and"
                " its values are not averaged",
                stacklevel=5,
            )


def _versions(module: nn.Module) -> tuple[int, ...]:
    return tuple(parameter._version for parameter in module.parameters())
