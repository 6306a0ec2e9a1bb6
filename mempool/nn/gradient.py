"""A table's gradient as torch's optimizers, scalers and clipping functions see it: one number.

Applies nothing itself: that is ``PoolOptimizer``'s.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mempool.client import Prepared, Table
from mempool.client.counts import as_number
from mempool.client.training.tables import discard_tables, prepare_tables
from mempool.errors import InvalidRequest

_SCALING = frozenset(
    name
    for verb in ("mul", "div", "multiply", "divide", "true_divide", "copy", "zero")
    for name in (f"{verb}_", f"_foreach_{verb}_")
) | {"detach_", "requires_grad_", "_amp_foreach_non_finite_check_and_unscale_"}
_IN_PLACE_OPERATORS = frozenset({"__iadd__", "__isub__", "__ipow__", "__ifloordiv__", "__imod__", "__setitem__"})
_NORMS = frozenset({"linalg_vector_norm", "vector_norm", "linalg_norm", "norm", "_foreach_norm", "dist"})


class TableNorm(Tensor):
    """The norm of a table's gradient, [1]: what multiplies it multiplies the gradient, and nothing else is possible.

    Norms of other orders than 2 are asked of the pool. Clipping by value needs the elements, which are there: an
    InvalidRequest says so, where the number alone would give a wrong answer.
    """

    owner: "TableGradient"

    @classmethod
    def of(cls, norm: Tensor, owner: "TableGradient") -> "TableNorm":
        self = norm.detach().as_subclass(cls)
        self.owner = owner
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        norms = list(_norms_in([*args, *options.values()]))
        if name in _NORMS:
            order = _order(name, args, options, norms)
            if order != 2.0:
                args = tuple(_of_order(part, order) for part in args)
                options = {key: _of_order(part, order) for key, part in options.items()}
        elif norms and _writes_otherwise(name) and (name.startswith("_foreach") or isinstance(args[0], TableNorm)):
            _refuse_in_place(name, norms)
        with torch._C.DisableTorchFunctionSubclass():
            answer = func(*args, **options)
        if name in ("zero_", "_foreach_zero_"):
            for norm in norms:
                norm.owner.grad = None
        return answer


class TableGradient(nn.Parameter):
    """Stands for the values of a table in an optimizer's parameter groups.

    The values and their gradient are in the pool; what a trainer can know of that gradient is its norm. So ``grad`` is
    a tensor [1] with that norm, and whatever scales it scales the whole gradient of the table when it is applied:
    ``GradScaler.unscale_`` and ``torch.nn.utils.clip_grad_norm_`` work as on any parameter, and a norm taken over
    several of these (and over ordinary parameters) is the true global norm. A gradient with an inf or NaN anywhere has
    norm inf. Norms of other orders are asked of the pool when torch's functions want them (``norm_type=math.inf``);
    clipping by value is refused.

    Reading ``grad`` [TRAINER] prepares the step: [SHARD] reduces what it holds and answers the squared norm, once for
    the same updates. It is None while no update is pending, and nothing is sent then. Setting it to None, or zeroing
    it, discards them. ``requires_grad`` is the table's: freezing this parameter freezes the table.

    Attributes:
        table: The table, shared by reference.
        peers: Gives the gradients that are stepped together with this one: they are prepared together too.
    """

    table: Table
    peers: "Callable[[], Sequence[TableGradient]]"
    _norm: float | None
    _scaled_norm: Tensor | None
    _updates: tuple[int, int, int] | None
    _generation: int
    _other_norms: dict[float, float]

    def __new__(cls, table: Table) -> "TableGradient":
        self = nn.Parameter.__new__(cls, torch.zeros(1, dtype=torch.float64, device="cpu"))
        assert isinstance(self, TableGradient)
        self.table = table
        self.peers = tuple
        self._forget()
        return self

    def __init__(self, table: Table) -> None:
        """Nothing is left to do: a tensor is made by ``__new__``."""

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TableGradient({self.table.name!r})"

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(
            f"the parameter of table {self.table.name!r} cannot be copied or pickled: the table is a connection"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__deepcopy__(None)

    @property
    def grad(self) -> Tensor | None:
        """[1] float64 on the CPU."""
        if not self.takes_part:
            self._forget()
        elif not self.prepared:
            together = [self, *(peer for peer in self.peers() if peer is not self and peer.takes_part)]
            for gradient in together:
                gradient.table.link.drop_zeroed()
            answers = prepare_tables([gradient.table.link for gradient in together])
            for gradient, prepared in zip(together, answers, strict=True):
                gradient._take(prepared)
        return self._scaled_norm

    @grad.setter
    def grad(self, scaled_norm: Tensor | None) -> None:
        if scaled_norm is None:
            self._forget()
            discard_tables([self.table.link])
        elif self.grad is not None:
            self._scaled_norm = TableNorm.of(scaled_norm.to(dtype=torch.float64, device="cpu"), self)
        else:
            raise InvalidRequest(
                f"the gradient of table {self.table.name!r} is in the pool and cannot be set here; backward() makes it."
                " (torch.distributed.checkpoint's functions for optimizers do this: save and load"
                " PoolOptimizer.state_dict() beside them instead)"
            )

    @property
    def requires_grad(self) -> bool:
        """The table's."""
        return self.table.requires_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.table.requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> "TableGradient":
        """Freeze the table, or train it, for gathers from now on."""
        self.table.requires_grad_(requires_grad)
        return self

    @property
    def takes_part(self) -> bool:
        """Whether there is anything to step: pending here, or perhaps at another rank of the group."""
        return self.table.pending > 0 or self.table.link.steps_together

    @property
    def prepared(self) -> bool:
        """Whether ``grad`` was read since the last update came, and, in a group, since a rank last came back: it is
        known then, and reading it again asks nobody."""
        return self.known and self._generation == self.table.link.place[1]

    @property
    def known(self) -> bool:
        """Whether ``grad`` was read since the last update came: what it was scaled by since is what it is scaled by."""
        return self._scaled_norm is not None and self._updates == self._pending_updates()

    @property
    def scale(self) -> float:
        """What the gradient was multiplied with since it was prepared; 1.0 where it was not."""
        if self._norm is None or self._scaled_norm is None or not self.known:
            return 1.0
        # A gradient of nothing but zeros stays one, whatever it is multiplied with.
        return self._scaled_norm.item() / self._norm if self._norm > 0.0 else 1.0

    def ask_again(self, scale: float) -> None:
        """All ranks begin the step anew: it is prepared once more, and then multiplied with this alone."""
        self._generation = -1  # of no group
        if self.known and self._norm is not None and math.isfinite(self._norm):
            norm = torch.tensor([self._norm * scale], dtype=torch.float64, device="cpu")
            self._scaled_norm = TableNorm.of(norm, self)

    def norm_of_order(self, scaled_norm: TableNorm, order: float) -> float:
        """The norm of another order of a gradient of which ``scaled_norm`` is the 2-norm, scaled as it is.

        Raises:
            InvalidRequest: It is not this table's gradient any more: it was applied, dropped, or more has come.
        """
        if scaled_norm is not self._scaled_norm or not self.prepared:
            raise InvalidRequest(
                f"this is an earlier gradient of table {self.table.name!r}, of which only the 2-norm is known; read the"
                " parameter's grad again"
            )
        if order not in self._other_norms:
            self.table.link.drop_zeroed()
            (prepared,) = prepare_tables([self.table.link], norm_order=order)
            assert prepared is not None, "it is pending"
            self._other_norms[order] = prepared.norm if prepared.finite else math.inf
        return self._other_norms[order] * abs(self.scale)

    def _take(self, prepared: Prepared | None) -> None:
        """Its step is prepared. Where it was already, with the same updates, what it was scaled by stays."""
        if self.prepared:
            return
        scale = self.scale  # of the same updates, which all ranks prepare anew
        self._forget()
        if prepared is not None:
            self._norm = math.sqrt(prepared.squared_norm) if prepared.finite else math.inf
            scale = scale if math.isfinite(scale) else 1.0
            norm = torch.tensor([self._norm * scale], dtype=torch.float64, device="cpu")
            self._scaled_norm = TableNorm.of(norm, self)
            self._updates, self._generation = self._pending_updates(), self.table.link.place[1]

    def drop(self) -> None:
        """Its updates were discarded."""
        self._forget()

    def _pending_updates(self) -> tuple[int, int, int]:
        """Numbers that no other set of pending updates of this table's session, and its group's step, has had."""
        return self.table.counters.updates_pushed, self.table.pending, self.table.link.place[0]

    def _forget(self) -> None:
        self._norm = self._scaled_norm = self._updates = None
        self._generation = 0
        self._other_norms = {}


def _norms_in(parts: list[Any]) -> Iterator[TableNorm]:
    for part in parts:
        if isinstance(part, TableNorm):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from (inner for inner in part if isinstance(inner, TableNorm))


def _writes_otherwise(name: str) -> bool:
    """Whether a function of torch's writes to what it is given, and not by a factor."""
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__") and name not in _SCALING)


def _names(norms: list[TableNorm]) -> str:
    return ", ".join(repr(norm.owner.table.name) for norm in norms)


def _order(name: str, args: tuple[Any, ...], options: dict[str, Any], norms: list[TableNorm]) -> float:
    """The order of the norm that is asked for; raises InvalidRequest for one that only the elements could tell."""
    asked = next((options[key] for key in ("ord", "p") if key in options), args[1] if len(args) > 1 else None)
    order = 2.0 if asked in (None, "fro") else as_number(asked)
    if name == "dist" or not order > 0.0:
        what = "distance from" if name == "dist" else f"norm of order {asked} of"
        raise InvalidRequest(
            f"the {what} the gradient of table {_names(norms)} is not known: its elements are in the pool, which"
            " answers norms of orders above 0 only (math.inf for the largest element)"
        )
    return order


def _of_order(part: Any, order: float) -> Any:
    """What stands for a gradient where its norm of another order is taken: one element of that size."""
    if isinstance(part, TableNorm):
        return torch.tensor([part.owner.norm_of_order(part, order)], dtype=torch.float64, device="cpu")
    if isinstance(part, (list, tuple)):
        return [_of_order(inner, order) for inner in part]
    return part


def _refuse_in_place(name: str, norms: list[TableNorm]) -> NoReturn:
    what = "clipped by value" if "clamp" in name or "clip" in name else f"changed by {name}"
    raise InvalidRequest(
        f"the gradient of table {_names(norms)} cannot be {what}: its elements are in the pool, and here is only their"
        " norm, which may be scaled. Clip it by norm: torch.nn.utils.clip_grad_norm_, or PoolOptimizer's max_norm"
    )
