"""The optimizers a table can ask for, by torch's names and meanings. The shards run them; this describes them.

FBGEMM's and TorchRec's LAMB, partial row-wise LAMB and LARS-SGD are not there.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mempool.config.model import ConfigModel, Flag, Number, plain_init, within
from mempool.types import OptimizerSpec
from mempool.types.schema_checks import HYPER_PARAMETERS


def _limits(name: str) -> Any:
    return within(HYPER_PARAMETERS[name].range)


_Lr = Annotated[Number, _limits("lr")]
_Eps = Annotated[Number, _limits("eps")]
_Betas = tuple[Annotated[Number, _limits("beta1")], Annotated[Number, _limits("beta2")]]
_WeightDecay = Annotated[Number, _limits("weight_decay")]
_MaxNorm = Annotated[Number, _limits("max_norm")] | None
RowWise = Literal["block", "row"]


class _Optimizer(ConfigModel):
    by_position = "lr"
    called_wrong = (
        "; lr may come without its name. It takes no parameters, as it says what the shards do with a table's values: "
        "make the table with TableConfig(..., optimizer=...), and step with mempool.optim.PoolOptimizer(model)"
    )

    @plain_init
    def __init__(self, /, **data: Any) -> None:
        super().__init__(**data)


class SGD(_Optimizer):
    """``torch.optim.SGD`` of the slots that have a gradient; the momentum of the others rests.

    Args:
        lr: Learning rate, at least 0. ``PoolOptimizer`` may send another with each step.
        momentum: The update is a buffer that each gradient is added to, after it was multiplied by momentum.
        dampening: The share of a gradient that the buffer does not get; it gets a slot's first one whole, as in torch.
        weight_decay: Times the values, added to the gradient.
        nesterov: The update is the gradient plus momentum times the buffer.
        decoupled_weight_decay: Values are multiplied by 1 - lr * weight_decay instead (true of all optimizers here).
        max_norm: Slots whose value has a larger 2-norm after a step are scaled to it, as FBGEMM does (true of all
            optimizers here). The table then has one column block, ``block_dim`` being value_dim: pages spread by rows.

    Raises:
        ConfigError: A hyper-parameter is out of range (true of all optimizers here).

    Example:
        >>> SGD(0.1, momentum=0.9).spec().momentum
        0.9
    """

    type: Literal["sgd"] = "sgd"
    lr: _Lr
    momentum: Annotated[Number, _limits("momentum")] = 0.0
    dampening: Annotated[Number, _limits("dampening")] = 0.0
    weight_decay: _WeightDecay = 0.0
    nesterov: Flag = False
    decoupled_weight_decay: Flag = False
    max_norm: _MaxNorm = None

    @plain_init
    def __init__(
        self,
        lr: float,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            decoupled_weight_decay=decoupled_weight_decay,
            max_norm=max_norm,
        )

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return _spec(self)


class Adagrad(_Optimizer):
    """``torch.optim.Adagrad`` of the slots that have a gradient: one sum of squared gradients per element.

    Args:
        lr: Learning rate, at least 0.
        eps: Added to the root of the sum.
        lr_decay: The rate of step t is lr / (1 + (t - 1) * lr_decay), t counting the table's steps.
        initial_accumulator_value: The sum of squares of a slot that had no gradient yet.
        weight_decay: As of SGD.
        decoupled_weight_decay: As of SGD, by the rate of the step.
        max_norm: As of SGD.
    """

    type: Literal["adagrad"] = "adagrad"
    lr: _Lr
    eps: _Eps = 1e-10
    lr_decay: Annotated[Number, _limits("lr_decay")] = 0.0
    initial_accumulator_value: Annotated[Number, _limits("initial_accumulator_value")] = 0.0
    weight_decay: _WeightDecay = 0.0
    decoupled_weight_decay: Flag = False
    max_norm: _MaxNorm = None

    @plain_init
    def __init__(
        self,
        lr: float,
        *,
        eps: float = 1e-10,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            lr=lr,
            eps=eps,
            lr_decay=lr_decay,
            initial_accumulator_value=initial_accumulator_value,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            max_norm=max_norm,
        )

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return _spec(self)


class RowWiseAdagrad(_Optimizer):
    """Adagrad with one sum per slot and column block, of the mean of the squares: 1 / block_dim of Adagrad's state.

    FBGEMM's, where a slot is one block.

    Args:
        lr: Learning rate, at least 0.
        eps: Added to the root of the sum.
        weight_decay: As of SGD.
        decoupled_weight_decay: As of SGD.
        max_norm: As of SGD.
        rowwise: What has one number of state: "block", a slot's column block, so that columns may lie on several shards
            and training does not depend on where; "row", the whole slot, as FBGEMM and TorchRec have it: the table then
            has one column block, ``block_dim`` being value_dim, and pages spread by rows.
    """

    type: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: _Lr
    eps: _Eps = 1e-10
    weight_decay: _WeightDecay = 0.0
    decoupled_weight_decay: Flag = False
    max_norm: _MaxNorm = None
    rowwise: RowWise = "block"

    @plain_init
    def __init__(
        self,
        lr: float,
        *,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        rowwise: RowWise = "block",
    ) -> None:
        super().__init__(
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            max_norm=max_norm,
            rowwise=rowwise,
        )

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return _spec(self)


class Adam(_Optimizer):
    """``torch.optim.SparseAdam``: only slots with a gradient change, and the step is the table's.

    With ``corrected_eps`` the arithmetic is that of ``torch.optim.Adam`` and of FBGEMM's Adam, whose weight decay is
    decoupled.

    Args:
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, each at least 0 and below 1.
        eps: Added to the root of the second moment.
        corrected_eps: Added after the root's bias correction; False: before it, as SparseAdam does.
        weight_decay: As of SGD.
        decoupled_weight_decay: As of SGD.
        max_norm: As of SGD.
    """

    type: Literal["adam"] = "adam"
    lr: _Lr
    betas: _Betas = (0.9, 0.999)
    eps: _Eps = 1e-8
    corrected_eps: Flag = False
    weight_decay: _WeightDecay = 0.0
    decoupled_weight_decay: Flag = False
    max_norm: _MaxNorm = None

    @plain_init
    def __init__(
        self,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        corrected_eps: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(
            lr=lr,
            betas=betas,
            eps=eps,
            corrected_eps=corrected_eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            max_norm=max_norm,
        )

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return _spec(self)


class AdamW(_Optimizer):
    """``torch.optim.AdamW``: Adam with decoupled weight decay; the step is the table's.

    Args:
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, each at least 0 and below 1.
        eps: Added to the root of the corrected second moment.
        weight_decay: Values are first multiplied by 1 - lr * weight_decay.
        dense: False: only slots with a gradient change, decay too. True: as torch.optim.AdamW on the whole table; the
            shards do what a slot missed when it is next read or touched. Needs values in float32, or a master.
        max_norm: As of SGD; not with dense.
    """

    type: Literal["adamw"] = "adamw"
    lr: _Lr
    betas: _Betas = (0.9, 0.999)
    eps: _Eps = 1e-8
    weight_decay: _WeightDecay = 0.01
    dense: Flag = False
    max_norm: _MaxNorm = None

    @plain_init
    def __init__(
        self,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        dense: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, dense=dense, max_norm=max_norm)

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return _spec(self)


class RowWiseAdam(_Optimizer):
    """Adam with one second moment per slot and column block, of the mean of the squares: half of Adam's state.

    FBGEMM's partial row-wise Adam with ``corrected_eps`` and ``rowwise="row"``; its weight decay is decoupled.

    Args:
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, each at least 0 and below 1.
        eps: Added to the root of the second moment.
        corrected_eps: As of Adam.
        weight_decay: As of SGD.
        decoupled_weight_decay: As of SGD.
        max_norm: As of SGD.
        rowwise: As of RowWiseAdagrad.
    """

    type: Literal["rowwise_adam"] = "rowwise_adam"
    lr: _Lr
    betas: _Betas = (0.9, 0.999)
    eps: _Eps = 1e-8
    corrected_eps: Flag = False
    weight_decay: _WeightDecay = 0.0
    decoupled_weight_decay: Flag = False
    max_norm: _MaxNorm = None
    rowwise: RowWise = "block"

    @plain_init
    def __init__(
        self,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        corrected_eps: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        rowwise: RowWise = "block",
    ) -> None:
        super().__init__(
            lr=lr,
            betas=betas,
            eps=eps,
            corrected_eps=corrected_eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            max_norm=max_norm,
            rowwise=rowwise,
        )

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return _spec(self)


def whole_rows(optimizer: "Optimizer") -> str | None:
    """Why a table with this optimizer has one column block, as messages say it; None where it may have several."""
    if isinstance(optimizer, RowWiseAdagrad | RowWiseAdam) and optimizer.rowwise == "row":
        return "rowwise = 'row'"
    return None if optimizer.max_norm is None else "max_norm"


def _spec(optimizer: ConfigModel) -> OptimizerSpec:
    fields = optimizer.model_dump(exclude={"type", "betas", "rowwise"})
    betas = getattr(optimizer, "betas", None)
    if betas is not None:
        fields |= {"beta1": betas[0], "beta2": betas[1]}
    return OptimizerSpec(algorithm=getattr(optimizer, "type"), **fields)  # noqa: B009 - every optimizer has one


def _known_type(value: object) -> object:
    """Let a file say Adagrad, ADAM or RowWiseAdagrad."""
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return value
    written = value["type"].lower().replace("_", "").replace("-", "")
    return {**value, "type": _BY_PLAIN_NAME.get(written, value["type"])}


_BY_PLAIN_NAME = {
    name.replace("_", ""): name for name in ("sgd", "adagrad", "rowwise_adagrad", "adam", "adamw", "rowwise_adam")
}

Optimizer = Annotated[
    SGD | Adagrad | RowWiseAdagrad | Adam | AdamW | RowWiseAdam,
    Field(discriminator="type"),
    BeforeValidator(_known_type),
]
