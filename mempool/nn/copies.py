"""Copies: one of a layer shares the table, and is told once that its values are live; one of its state dict says which
version of the table it goes with."""

import warnings
from typing import Any

import torch
from torch import nn

from mempool.client import Table


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
                "this copy of a memory layer was given other parameters (an average, as AveragedModel or EMA makes it,"
                f" or a snapshot), but it reads the live values of table {self._table!r}: a copy shares the table, and"
                " its values are not averaged",
                stacklevel=5,
            )


class VersionWhenCopied:
    """In a layer's state: turns into the table's version where that is pickled or copied.

    Until then its tensors are the model's own, which train on, or which a loader writes to: of no version.
    """

    def __init__(self, table: Table) -> None:
        self._link = table.link

    def __reduce__(self) -> tuple[Any, ...]:
        version = self._link.known_version
        return torch.Size, (() if version is None else (version,),)  # a type that torch.load takes by itself


def copied_version(kept: object) -> int | None:
    """The version that a copy of a state has; None where it is no copy, or has none."""
    return kept[0] if isinstance(kept, torch.Size) and len(kept) == 1 else None


def _versions(module: nn.Module) -> tuple[int, ...]:
    # Those of inference mode are not counted.
    return tuple(-1 if parameter.is_inference() else parameter._version for parameter in module.parameters())
