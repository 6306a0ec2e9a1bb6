"""PoolOptimizer: the optimizer step of tables in a pool, in the shape torch's loops, schedulers and scalers expect.

The arithmetic (SGD, Adagrad, Adam) runs on the shards, by the optimizer in each table's schema; this decides when, with
which learning rate and with which scale.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from mempool.client import Table
from mempool.errors import InvalidRequest
from mempool.nn.gradient import TableGradient

Tables = nn.Module | Table | Iterable[Table | Mapping[str, Any]]


class PoolOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` over tables: one parameter group per table, however many layers share it.

    ``loss.backward()`` has pushed the gradients of the values already: shards hold them until ``step`` applies, or
    ``zero_grad`` discards them. Gradients accumulate over backward passes as in torch, and ``step`` consumes them: a
    step without a backward pass before it does nothing, and there is nothing to clear after it. A step that
    ``GradScaler.step`` skips stays held, as in torch, until ``zero_grad``; ``step(grad_scaler=...)`` discards it.

    A group holds ``lr``, which every LR scheduler may change (those that also cycle momentum must be told not to:
    ``OneCycleLR(..., cycle_momentum=False)``), ``table``, the table's name, and ``params``, one ``TableGradient``, so
    that ``GradScaler.step``, ``GradScaler.unscale_`` and ``torch.nn.utils.clip_grad_norm_`` work with this optimizer.
    ``state_dict`` holds the groups; the state of the shards' optimizers is the pool's, and stays there.

    Args:
        tables: A model, whose memory layers' tables are taken; or tables; or groups ``{"table": table, "lr": 0.1}``.
        lr: Learning rate of groups that name none; None takes each table's own.
        max_norm: Clip the gradient of all tables together to this norm, by the formula of
            ``torch.nn.utils.clip_grad_norm_``. ``math.inf`` only measures ``last_norm``. None does neither and saves a
            round trip per step.

    Attributes:
        max_norm: As above; may be changed at any time.
        last_norm: Norm of the gradient that the last step applied, over all tables, unscaled, before clipping; inf if
            the step was skipped. None where nothing was pending, or neither max_norm nor a scaler asked for it.

    Raises:
        InvalidRequest: No memory layer in the model, a table named twice, or an lr or max_norm that makes no sense.

    Example:
        >>> memory_optimizer = mempool.optim.PoolOptimizer(model, max_norm=1.0)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(memory_optimizer, T_max=1000)
        >>> loss.backward()
        >>> memory_optimizer.step()
    """

    def __init__(self, tables: Tables, lr: float | None = None, max_norm: float | None = None) -> None:
        if max_norm is not None and not max_norm > 0.0:
            raise InvalidRequest(f"max_norm = {max_norm} must be above 0; None turns clipping off")
        self.max_norm = max_norm
        self.last_norm: float | None = None
        super().__init__(_groups(tables), {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take one more table: ``{"table": table}``, with an ``lr`` of its own if wanted.

        Raises:
            InvalidRequest: The table has a group already, or the group or its lr makes no sense.
        """
        table = param_group.get("table")
        if not isinstance(table, Table):
            raise InvalidRequest(f'a group of a PoolOptimizer is {{"table": table, ...}}, got {param_group!r}')
        if any(gradient.table is table for gradient in self._gradients()):
            raise InvalidRequest(f"table {table.name!r} has a parameter group already; a table can have only one")
        lr = param_group.get("lr", self.defaults["lr"])
        lr = table.schema.optimizer.lr if lr is None else lr
        if not (math.isfinite(lr) and lr >= 0.0):
            raise InvalidRequest(f"lr = {lr} of table {table.name!r} must be finite and at least 0")
        super().add_param_group({**param_group, "params": [TableGradient(table)], "table": table.name, "lr": lr})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> float | None:
        """Apply what is pending, as one commit of each table that has anything; nothing is sent for the others.

        With a norm or a scaler to decide by, every table is prepared before any is committed. A step that failed on its
        way (a shard away for too long) is continued by the next call, with what was decided.

        Args:
            closure: Evaluates the model again and returns the loss.
            grad_scaler: As ``grad_scaler.step(self)``, and a step that is skipped for an inf or NaN is discarded here
                and now. Call ``grad_scaler.update()`` afterwards as usual.

        Returns:
            What the closure returned.

        Raises:
            InvalidRequest: With max_norm, or where a gradient's ``grad`` was read since the last update: a gradient has
                an inf or NaN, which scaling would spread over the table. Nothing was applied; ``zero_grad`` drops it.
            MempoolError: What the tables' prepare and commit raise.
        """
        if grad_scaler is not None and grad_scaler.is_enabled():
            if closure is not None:
                raise InvalidRequest("step takes a closure or a grad_scaler, not both (as GradScaler.step does)")
            self._scaled_step(grad_scaler)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_norm = self._clipped_norm()
        for group, gradient in zip(self.param_groups, self._gradients(), strict=True):
            if gradient.table.pending:
                gradient.table.commit(lr=float(group["lr"]), grad_scale=gradient.scale)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  # torch's signature
        """Drop what backward passes have pushed since the last step; nothing is sent where nothing is held."""
        for gradient in self._gradients():
            gradient.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over learning rates and other options of groups, by the tables' names.

        Raises:
            InvalidRequest: The state is of other tables than this optimizer's.
        """
        saved = list(state_dict["param_groups"])
        saved_names = [group.get("table") for group in saved]
        names = [group["table"] for group in self.param_groups]
        if sorted(map(str, saved_names)) != sorted(names):
            raise InvalidRequest(
                f"the state is of tables {sorted(map(str, saved_names))}; this optimizer has {sorted(names)}"
            )
        # Tables of several pools may have one name: among those, the order of the groups decides.
        groups = [saved.pop([group["table"] for group in saved].index(name)) for name in names]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a PoolOptimizer cannot be copied or pickled: its tables are connections. Save its state_dict()"
        )

    def _gradients(self) -> list[TableGradient]:
        return [group["params"][0] for group in self.param_groups]

    def _clipped_norm(self) -> float | None:
        """The norm over all tables, after which their gradients are clipped; None where nobody asked for it."""
        gradients = [gradient for gradient in self._gradients() if gradient.table.pending]
        if not gradients or (self.max_norm is None and not any(gradient.prepared for gradient in gradients)):
            return None
        norm = float(clip_grad_norm_(gradients, math.inf))
        if not math.isfinite(norm):
            names = ", ".join(repr(gradient.table.name) for gradient in gradients)
            raise InvalidRequest(
                f"the gradient of {names} has an inf or NaN, which scaling would spread; nothing was applied."
                " zero_grad() drops it. In mixed precision give step a grad_scaler: it skips such steps"
            )
        if self.max_norm is not None:
            clip_grad_norm_(gradients, self.max_norm)
        return norm

    def _scaled_step(self, grad_scaler: torch.amp.GradScaler) -> None:
        self.last_norm = None
        if any(gradient.table.pending for gradient in self._gradients()):
            # Reads and unscales every gradient, then calls step without a scaler, or, for an inf or NaN, does not.
            grad_scaler.step(self)
            if any(gradient.table.pending for gradient in self._gradients()):
                self.last_norm = math.inf
                self.zero_grad()


def _groups(tables: Tables) -> list[dict[str, Any]]:
    if isinstance(tables, nn.Module):
        found = {
            id(value): value
            for module in tables.modules()
            for value in vars(module).values()
            if isinstance(value, Table)
        }
        if not found:
            raise InvalidRequest(
                f"found no MemoryLayer in model {type(tables).__name__}, nor another module that holds a table;"
                " give PoolOptimizer the model that has them, or a list of tables"
            )
        return [{"table": table} for table in found.values()]
    if isinstance(tables, Table):
        return [{"table": tables}]
    groups = [dict(item) if isinstance(item, Mapping) else {"table": item} for item in tables]
    if not groups:
        raise InvalidRequest("PoolOptimizer was given no table")
    return groups
