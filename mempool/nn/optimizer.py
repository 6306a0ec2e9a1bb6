"""PoolOptimizer: the optimizer step of tables in a pool, in the shape torch's loops, schedulers and scalers expect.

The arithmetic (SGD, Adagrad, Adam) runs on the shards, by the optimizer in each table's schema; this decides when, with
which learning rate and with which scale.
"""

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from mempool.client import Table, TableAt
from mempool.client.counts import as_number
from mempool.client.training.tables import TableCommit, commit_tables, discard_tables
from mempool.errors import InvalidRequest, MempoolError, RankLost
from mempool.nn.gradient import TableGradient
from mempool.nn.tables import keys_of, lr_factor_of, tables_of, values_of

Tables = nn.Module | Table | Iterable[Table | Mapping[str, Any]]


class PoolOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` over tables: one parameter group per table, however many layers share it.

    ``loss.backward()`` has pushed the gradients of the values already: shards hold them until ``step`` applies, or
    ``zero_grad`` discards them. Gradients accumulate over backward passes as in torch, and ``step`` consumes them: a
    step without a backward pass before it does nothing, and there is nothing to clear after it. A step that a
    ``GradScaler`` skips is discarded at once: ``scaler.step(memory_optimizer)`` and ``step(grad_scaler=scaler)`` are
    the same, and the next step trains on. (Trainers that clip by themselves take this for a fused optimizer and refuse
    to clip under a scaler: use ``max_norm``.)

    Keys that a table trains in the pool are a table of their own, ``table.keys``, and have a group of their own after
    those of the tables, of the step of all: with the learning rate of their optimizer, if ``lr`` is None.

    A group holds ``lr``, which every LR scheduler may change (those that also cycle momentum must be told not to:
    ``OneCycleLR(..., cycle_momentum=False)``), ``table``, the table's name, and ``params``: one ``TableGradient``, so
    that ``GradScaler.unscale_`` and ``torch.nn.utils.clip_grad_norm_`` work with this optimizer, and the ``values`` of
    the model's layers, by which they are frozen. ``state_dict`` holds the groups and each table's version; the values
    and the state of the shards' optimizers are the pool's: after ``load_state_dict`` a look-up that meets another
    version than the state's warns. ``torch.distributed.checkpoint`` takes it as it is, beside a
    ``mempool.nn.PoolState`` for the tables; its functions (``get_optimizer_state_dict``) refuse this one.

    Args:
        tables: A model, whose tables are taken, wherever its modules hold them (attributes, lists, dicts, dataclasses);
            or tables; or groups ``{"table": table, "lr": 0.1}``.
        lr: Learning rate of groups that name none; None takes each table's own. Of a model, tables of hashed n-grams
            take 5 times it (``NgramLookup.lr_factor``), as in their paper.
        max_norm: Clip the gradient of all tables together to this norm, by the formula of
            ``torch.nn.utils.clip_grad_norm_``. ``math.inf`` only measures ``last_norm``. None does neither and saves a
            round trip per step.
        norm_type: Order of that norm, above 0; ``math.inf`` for the largest element. Others than 2 cost the shards one
            more pass over the gradient.

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

    # GradScaler.step then calls step also where it found an inf, and says so: what is pending can be discarded there.
    _step_supports_amp_scaling = True

    def __init__(
        self, tables: Tables, lr: float | None = None, max_norm: float | None = None, norm_type: float = 2.0
    ) -> None:
        self.max_norm = max_norm
        self.norm_type = as_number(norm_type)
        if not self.norm_type > 0.0:
            raise InvalidRequest(f"norm_type = {norm_type!r} must be above 0; math.inf is the largest element")
        self.last_norm: float | None = None
        self._looked_at: dict[int, tuple[int, int]] = {}
        self._dropped_told = False
        super().__init__(_groups(tables, lr), {"lr": lr})

    @property
    def max_norm(self) -> float | None:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, max_norm: float | None) -> None:
        if max_norm is not None and not as_number(max_norm) > 0.0:
            raise InvalidRequest(f"max_norm = {max_norm!r} must be above 0; None turns clipping off")
        self._max_norm = None if max_norm is None else float(max_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take one more table: ``{"table": table}``, with an ``lr`` of its own if wanted; or ``table.keys``.

        Raises:
            InvalidRequest: The table has a group already, or the group or its lr makes no sense.
        """
        table = param_group.get("table")
        if not isinstance(table, Table):
            given = param_group if table is None else table
            raise InvalidRequest(
                f'a group of a PoolOptimizer is {{"table": table, ...}}, got one of type {type(given).__name__}:'
                " give it the model, or its tables (its parameters belong to an optimizer of torch's)"
            )
        if isinstance(table, TableAt):
            raise InvalidRequest(
                f"table {table.name!r} is read at version {table.version} here, and cannot be trained: give the table"
            )
        if any(gradient.table is table for gradient in self._gradients()):
            raise InvalidRequest(f"table {table.name!r} has a parameter group already; a table can have only one")
        lr = param_group.get("lr", self.defaults["lr"])
        lr = table.schema.optimizer.lr if lr is None else lr
        _checked_lr(lr, table.name)
        group = {name: option for name, option in param_group.items() if name != "values"}
        gradient = TableGradient(table)
        gradient.peers = self._peers_of(gradient)
        params = [gradient, *param_group.get("values", ())]
        super().add_param_group({**group, "params": params, "table": table.name, "lr": lr})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> float | None:
        """Apply what is pending, as one step of all tables of a pool that have anything; the others hear nothing.

        Every group is checked before anything is sent. Tables of one pool are decided together, those of several pools
        one pool after another. A step that failed on its way (a shard away for too long) is continued by the next
        call, with what was decided.

        Args:
            closure: Evaluates the model again and returns the loss.
            grad_scaler: As ``grad_scaler.step(self)``. Call ``grad_scaler.update()`` afterwards as usual.

        Returns:
            What the closure returned.

        Raises:
            InvalidRequest: A group's lr is not a finite number of at least 0. Or, with max_norm, or where a gradient's
                ``grad`` was read since the last update: a gradient has an inf or NaN, which scaling would spread over
                the table. Nothing was applied; ``zero_grad`` drops it.
            MempoolError: What the tables' prepare and commit raise; it says whether the step is decided.
        """
        if grad_scaler is not None and grad_scaler.is_enabled():
            if closure is not None:
                raise InvalidRequest("step takes a closure or a grad_scaler, not both (as GradScaler.step does)")
            self.last_norm = None
            if any(gradient.grad is not None for gradient in self._taking_part()):
                grad_scaler.step(self)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lrs = [_checked_lr(group["lr"], group["table"]) for group in self.param_groups]
        self._warn_of_dropped()
        if float(getattr(self, "found_inf", 0.0)) > 0.0:
            self.last_norm = math.inf
            self.zero_grad()
            counting = [
                TableCommit(gradient.table.link, lr=lr)
                for lr, gradient in zip(lrs, self._gradients(), strict=True)
                if gradient.table.link.counts_steps
            ]
            commit_tables(counting)  # of nothing: others would wait for this step of a rank that has skipped it
            return loss
        before = [gradient.scale for gradient in self._gradients()]
        try:
            self._unscale(getattr(self, "grad_scale", None))
            self.last_norm = self._clipped_norm()
            commit_tables(
                [
                    TableCommit(gradient.table.link, lr=lr, grad_scale=gradient.scale)
                    for lr, gradient in zip(lrs, self._gradients(), strict=True)
                    if gradient.takes_part
                ]
            )
        except RankLost:
            for gradient, scale in zip(self._gradients(), before, strict=True):
                gradient.ask_again(scale)  # whoever comes back scales and clips it from the beginning, as the same call
            raise
        self._look()
        return loss

    # To a step whose signature names a scaler GradScaler hands itself, with a warning; to others it says what it found.
    step.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        list(inspect.signature(step).parameters.values())[:2]
    )

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  # torch's signature
        """Drop what backward passes have pushed since the last step; nothing is sent where nothing is held."""
        gradients = self._gradients()
        discard_tables([gradient.table.link for gradient in gradients])
        for group, gradient in zip(self.param_groups, gradients, strict=True):
            gradient.drop()
            for values in group["params"][1:]:
                values.grad = None
        self._look()

    def state_dict(self) -> dict[str, Any]:
        """Groups by their tables' names, and the version of each table (None where its pool does not answer)."""
        state = super().state_dict()
        groups = [
            {**group, "params": [number], "table_version": _version(gradient.table)}
            for number, (group, gradient) in enumerate(zip(state["param_groups"], self._gradients(), strict=True))
        ]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over learning rates and other options of groups, by the tables' names.

        Where the next look-up in one of the tables meets another version than the state was saved beside, it warns: the
        table may be restored before or after this.

        Raises:
            InvalidRequest: The state is of other tables than this optimizer's.
        """
        saved = [dict(group) for group in state_dict["param_groups"]]
        saved_names = [group.get("table") for group in saved]
        names = [group["table"] for group in self.param_groups]
        if sorted(map(str, saved_names)) != sorted(names):
            raise InvalidRequest(
                f"the state is of tables {sorted(map(str, saved_names))}; this optimizer has {sorted(names)}"
            )
        # Tables of several pools may have one name: among those, the order of the groups decides.
        groups = [saved.pop([group["table"] for group in saved].index(name)) for name in names]
        versions = [group.pop("table_version", None) for group in groups]
        count = 0
        for group, own in zip(groups, self.param_groups, strict=True):
            group["params"] = list(range(count, count + len(own["params"])))
            count += len(own["params"])
        super().load_state_dict({**state_dict, "param_groups": groups})
        for version, gradient in zip(versions, self._gradients(), strict=True):
            gradient.table.link.expect(version, whose="a PoolOptimizer")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a PoolOptimizer cannot be copied or pickled: its tables are connections. Save its state_dict()"
        )

    def _gradients(self) -> list[TableGradient]:
        return [group["params"][0] for group in self.param_groups]

    def _peers_of(self, gradient: TableGradient) -> Callable[[], list[TableGradient]]:
        """Those of tables of its pool: they are one step."""
        this, pool = weakref.ref(self), gradient.table.link.session.coordinator

        def peers() -> list[TableGradient]:
            optimizer = this()
            everyone = [] if optimizer is None else optimizer._gradients()
            return [each for each in everyone if each.table.link.session.coordinator is pool]

        return peers

    def _taking_part(self) -> list[TableGradient]:
        return [gradient for gradient in self._gradients() if gradient.takes_part]

    def _unscale(self, loss_scale: Tensor | None) -> None:
        if loss_scale is not None:
            for gradient in self._taking_part():
                grad = gradient.grad
                if grad is not None:
                    grad.div_(float(loss_scale))

    def _clipped_norm(self) -> float | None:
        """The norm over all tables, after which their gradients are clipped; None where nobody asked for it."""
        gradients = self._taking_part()
        if not gradients or (self.max_norm is None and not any(gradient.known for gradient in gradients)):
            return None
        norm = float(clip_grad_norm_(gradients, math.inf, self.norm_type))
        if not math.isfinite(norm):
            names = ", ".join(repr(gradient.table.name) for gradient in gradients)
            raise InvalidRequest(
                f"the gradient of {names} has an inf or NaN, which scaling would spread; nothing was applied."
                " zero_grad() drops it. In mixed precision give step a grad_scaler: it skips such steps"
            )
        if self.max_norm is not None:
            clip_grad_norm_(gradients, self.max_norm, self.norm_type)
        return norm

    def _look(self) -> None:
        for gradient in self._gradients():
            counters = gradient.table.counters
            self._looked_at[id(gradient)] = counters.updates_pushed, counters.updates_discarded

    def _warn_of_dropped(self) -> None:
        """A loop that zeroes before it steps trains nothing, and no number would show it."""
        for gradient in self._gradients():
            table, (pushed, discarded) = gradient.table, self._looked_at.get(id(gradient), (0, 0))
            table.link.drop_zeroed()
            dropped = table.counters.updates_discarded - discarded
            if dropped and not table.pending and table.counters.updates_pushed > pushed and not self._dropped_told:
                self._dropped_told = True
                warnings.warn(
                    f"step() has nothing to apply to table {table.name!r}: {dropped} updates of it were dropped by a"
                    " zero_grad() of a module or another optimizer between backward() and this step. Step first, then"
                    " zero",
                    stacklevel=3,
                )


def _groups(tables: Tables, lr: float | None) -> list[dict[str, Any]]:
    if isinstance(tables, nn.Module):
        found = tables_of(tables)
        if not found:
            raise InvalidRequest(
                f"found no MemoryLayer in model {type(tables).__name__}, nor another module that holds a table;"
                " give PoolOptimizer the model that has them, or a list of tables"
            )
        return [{"table": table, "values": values_of(tables, table), **_lr_of(tables, table, lr)} for table in found]
    if isinstance(tables, Table):
        tables = [tables]
    if not isinstance(tables, Iterable):
        raise InvalidRequest(
            f"PoolOptimizer was given {tables!r}; give it a model with memory layers, a table, or a list of tables"
        )
    groups = [dict(item) if isinstance(item, Mapping) else {"table": item} for item in tables]
    if not groups:
        raise InvalidRequest("PoolOptimizer was given no table")
    named = [group["table"] for group in groups if isinstance(group.get("table"), Table)]
    return groups + [{"table": keys} for keys in keys_of(named) if not any(keys is each for each in named)]


def _lr_of(model: nn.Module, table: Table, lr: float | None) -> dict[str, float]:
    """What a model's learning rate is for a table, where it has another one."""
    factor = lr_factor_of(model, table)
    return {} if lr is None or factor == 1.0 else {"lr": factor * _checked_lr(lr, table.name)}


def _checked_lr(lr: Any, table: str) -> float:
    """A number, or a tensor or array of one; raises InvalidRequest for all else."""
    number = as_number(lr)
    if not (math.isfinite(number) and number >= 0.0):
        raise InvalidRequest(f"lr = {lr!r} of table {table!r} must be finite and at least 0; nothing was applied")
    return number


def _version(table: Table) -> int | None:
    try:
        return table.link.version()
    except MempoolError:
        return None
