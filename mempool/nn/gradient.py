"""A table's gradient as torch's optimizers, scalers and clipping functions see it: one number.

Applies nothing itself: that is ``PoolOptimizer``'s.
"""

import math

import torch
from torch import Tensor, nn

from mempool.client import Table


class TableGradient(nn.Parameter):
    """Stands for the values of a table in an optimizer's parameter groups.

    The values and their gradient are in the pool; what a trainer can know of that gradient is its norm. So ``grad`` is
    a tensor [1] with that norm, and whatever scales it scales the whole gradient of the table when it is applied:
    ``GradScaler.unscale_`` and ``torch.nn.utils.clip_grad_norm_`` work as on any parameter, and a norm taken over
    several of these (and over ordinary parameters) is the true global norm. A gradient with an inf or NaN anywhere has
    norm inf.

    Reading ``grad`` [TRAINER] prepares the step: [SHARD] reduces what it holds and answers the squared norm, once for
    the same updates. It is None while no update is pending, and nothing is sent then. Setting it to None discards them.

    Attributes:
        table: The table, shared by reference.
    """

    table: Table
    _norm: float | None
    _scaled_norm: Tensor | None
    _updates: tuple[int, int] | None

    def __new__(cls, table: Table) -> "TableGradient":
        self = nn.Parameter.__new__(cls, torch.zeros(1, dtype=torch.float64))
        assert isinstance(self, TableGradient)
        self.table = table
        self._forget()
        return self

    def __init__(self, table: Table) -> None:
        """Nothing is left to do: a tensor is made by ``__new__``."""

    @property
    def grad(self) -> Tensor | None:
        """[1] float64 on the CPU."""
        if not self.table.pending:
            self._forget()
        elif not self.prepared:
            prepared = self.table.prepare()
            self._forget()
            if prepared is not None:
                self._norm = math.sqrt(prepared.squared_norm) if prepared.finite else math.inf
                self._scaled_norm = torch.tensor([self._norm], dtype=torch.float64)
                self._updates = self._pending_updates()
        return self._scaled_norm

    @grad.setter
    def grad(self, scaled_norm: Tensor | None) -> None:
        if scaled_norm is None:
            self._forget()
            self.table.discard()
        elif self.grad is not None:
            self._scaled_norm = scaled_norm

    @property
    def prepared(self) -> bool:
        """Whether ``grad`` was read since the last update came: it is known then, and reading it again asks nobody."""
        return self._scaled_norm is not None and self._updates == self._pending_updates()

    @property
    def scale(self) -> float:
        """What the gradient was multiplied with since it was prepared; 1.0 where it was not."""
        if self._norm is None or self._scaled_norm is None or not self.prepared:
            return 1.0
        # A gradient of nothing but zeros stays one, whatever it is multiplied with.
        return self._scaled_norm.item() / self._norm if self._norm > 0.0 else 1.0

    def _pending_updates(self) -> tuple[int, int]:
        """Two numbers that no other set of pending updates of this table's session has had."""
        return self.table.counters.updates_pushed, self.table.pending

    def _forget(self) -> None:
        self._norm = self._scaled_norm = self._updates = None
