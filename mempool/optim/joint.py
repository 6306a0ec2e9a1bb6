"""JointOptimizer: an optimizer of torch's and that of the tables as one, for loops that step a single optimizer."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from mempool.client.counts import as_number
from mempool.errors import InvalidRequest
from mempool.nn import PoolOptimizer


class JointOptimizer(torch.optim.Optimizer):
    """Steps the model's parameters and its tables together, as trainers do that take one optimizer.

    ``param_groups`` are those of both, the dense ones first: LR schedulers and ``GradScaler`` work on all of them. A
    step that a scaler skips is skipped for both, and ``zero_grad`` then drops it, as it does a dense gradient. In a
    step the tables come first: where their pool refuses or does not answer, the model is as it was, and the next call
    goes on.

    Args:
        dense: Of the model's own parameters.
        memory: Of its tables.
        max_norm: Clip the gradient of both together to this norm, as ``torch.nn.utils.clip_grad_norm_`` would all of
            it, also under FSDP2. ``math.inf`` only measures ``last_norm``; None does neither. Turn off what the trainer
            clips by itself then (``max_grad_norm=0``): over ``model.parameters()`` it does not see the tables.

    Attributes:
        dense, memory: As above.
        max_norm: As above; may be changed at any time.
        last_norm: Norm of the gradient of the last step, before clipping; None where nobody asked for it.

    Raises:
        InvalidRequest: dense or memory is something else, memory clips by itself, or max_norm is not above 0.

    Example:
        >>> dense = torch.optim.AdamW(model.parameters(), lr=1e-4)
        >>> optimizer = mempool.optim.JointOptimizer(dense, mempool.optim.PoolOptimizer(model), max_norm=1.0)
        >>> trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    """

    def __init__(self, dense: torch.optim.Optimizer, memory: PoolOptimizer, *, max_norm: float | None = None) -> None:
        if not isinstance(memory, PoolOptimizer) or isinstance(dense, PoolOptimizer):
            raise InvalidRequest(
                f"JointOptimizer({type(dense).__name__}, {type(memory).__name__}): give it an optimizer of the model's"
                " parameters, then the PoolOptimizer of its tables"
            )
        if not isinstance(dense, torch.optim.Optimizer):
            raise InvalidRequest(f"dense = {type(dense).__name__} must be an optimizer of torch's")
        if memory.max_norm is not None:
            raise InvalidRequest(
                f"this PoolOptimizer clips by itself (max_norm = {memory.max_norm}): leave that out there, and give"
                " JointOptimizer max_norm for both together"
            )
        if max_norm is not None and not as_number(max_norm) > 0.0:
            raise InvalidRequest(f"max_norm = {max_norm!r} must be above 0; None turns clipping off")
        self.dense, self.memory = dense, memory
        self.max_norm = max_norm
        self.last_norm: float | None = None
        self._made = False
        super().__init__([{"params": []}], {**dense.defaults})
        self._made = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the two as they are now, not copies: who changes an lr here changes it there."""
        return [*self.dense.param_groups, *self.memory.param_groups]

    @param_groups.setter
    def param_groups(self, _: object) -> None:
        self._refuse("param_groups")

    @property
    def state(self) -> Any:
        """That of ``dense``: what the tables' optimizers keep is in the pool."""
        return self.dense.state

    @state.setter
    def state(self, _: object) -> None:
        self._refuse("state")

    def _refuse(self, name: str) -> None:
        """torch's own making of an optimizer sets both, of nothing; nobody else has anything to put there."""
        if self._made:
            raise InvalidRequest(f"{name} of a JointOptimizer belong to its dense and memory: set them there")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both.

        Args:
            closure: Evaluates the model again and returns the loss.

        Raises:
            InvalidRequest: With max_norm, a gradient has an inf or NaN; or as ``PoolOptimizer.step``. Nothing was
                applied.
            MempoolError: As ``PoolOptimizer.step``; the model is as it was, and the next call goes on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_norm = self._clipped_norm()
        self.memory.step()
        self.dense.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of both: also drops what is pending on the tables."""
        self.memory.zero_grad()
        self.dense.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group of parameters, or ``{"table": table}``: to the optimizer that it is for."""
        if self._made:
            (self.memory if "table" in param_group else self.dense).add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """``dense`` and ``memory``: the state of each."""
        return {"dense": self.dense.state_dict(), "memory": self.memory.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Each takes over its own.

        Raises:
            InvalidRequest: It is no state of a JointOptimizer, or of other tables.
        """
        if set(state_dict) != {"dense", "memory"}:
            raise InvalidRequest(f"this is no state of a JointOptimizer: it has {', '.join(map(str, state_dict))}")
        self.memory.load_state_dict(dict(state_dict["memory"]))
        self.dense.load_state_dict(dict(state_dict["dense"]))

    def _clipped_norm(self) -> float | None:
        if self.max_norm is None:
            return None
        parameters = [each for group in self.dense.param_groups for each in group["params"]]
        parameters += [group["params"][0] for group in self.memory.param_groups]
        grads = [grad for each in parameters if (grad := each.grad) is not None]
        norm = math.hypot(*map(_norm, _alike(grads)))
        if not math.isfinite(norm):
            raise InvalidRequest(
                "the gradient has an inf or NaN, which clipping would spread; nothing was applied. zero_grad() drops it"
            )
        if norm > self.max_norm:
            for grad in grads:
                grad.mul_(self.max_norm / (norm + 1e-6))
        return norm


def _alike(grads: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those that are sharded over one mesh, and those that are not: torch takes no norm over both."""
    groups: dict[object, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    return list(groups.values())


def _norm(grads: list[Tensor]) -> float:
    """Over all ranks, where they are sharded."""
    norm = get_total_norm(grads)
    full = getattr(norm, "full_tensor", None)
    return float(norm if full is None else full())
