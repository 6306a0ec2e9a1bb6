"""The optimizers a table can ask for, by torch's names and meanings. The shards run them; this describes them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mempool.config.model import ConfigModel, Flag, Number, plain_init, within
from mempool.types import OptimizerSpec
from mempool.types.schema_checks import HYPER_PARAMETERS


def _limits(name: str) -> Any:
    return within(HYPER_PARAMETERS[name].range)


class SGD(ConfigModel):
    """value -= lr * gradient.

    Args:
        lr: Learning rate, at least 0. ``PoolOptimizer`` may send another with each step.

    Raises:
        ConfigError: A hyper-parameter is out of range (true of all optimizers here).

    Example:
        >>> SGD(0.1).spec().algorithm
        'sgd'
    """

    type: Literal["sgd"] = "sgd"
    lr: Annotated[Number, _limits("lr")]

    @plain_init
    def __init__(self, lr: float) -> None:
        super().__init__(lr=lr)

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return OptimizerSpec(algorithm=self.type, lr=self.lr)


class Adagrad(ConfigModel):
    """``torch.optim.Adagrad``: one sum of squared gradients per element.

    Args:
        lr: Learning rate, at least 0.
        eps: Added to the root of the sum.
        lr_decay: The rate of step t is lr / (1 + (t - 1) * lr_decay), t counting the table's commits.
        initial_accumulator_value: The sum of squares of a slot that had no gradient yet.
    """

    type: Literal["adagrad"] = "adagrad"
    lr: Annotated[Number, _limits("lr")]
    eps: Annotated[Number, _limits("eps")] = 1e-10
    lr_decay: Annotated[Number, _limits("lr_decay")] = 0.0
    initial_accumulator_value: Annotated[Number, _limits("initial_accumulator_value")] = 0.0

    @plain_init
    def __init__(
        self,
        lr: float,
        *,
        eps: float = 1e-10,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
    ) -> None:
        super().__init__(lr=lr, eps=eps, lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value)

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return OptimizerSpec(
            algorithm=self.type,
            lr=self.lr,
            eps=self.eps,
            lr_decay=self.lr_decay,
            initial_accumulator_value=self.initial_accumulator_value,
        )


class RowWiseAdagrad(ConfigModel):
    """Adagrad with one sum per slot and column block, of the mean of the squares: 1 / block_dim of Adagrad's state.

    Args:
        lr: Learning rate, at least 0.
        eps: Added to the root of the sum.
    """

    type: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: Annotated[Number, _limits("lr")]
    eps: Annotated[Number, _limits("eps")] = 1e-10

    @plain_init
    def __init__(self, lr: float, *, eps: float = 1e-10) -> None:
        super().__init__(lr=lr, eps=eps)

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return OptimizerSpec(algorithm=self.type, lr=self.lr, eps=self.eps)


class Adam(ConfigModel):
    """``torch.optim.SparseAdam``: only slots with a gradient change, and the step is the table's commit number.

    Args:
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, each at least 0 and below 1.
        eps: Added to the root of the second moment.
    """

    type: Literal["adam"] = "adam"
    lr: Annotated[Number, _limits("lr")]
    betas: tuple[Annotated[Number, _limits("beta1")], Annotated[Number, _limits("beta2")]] = (0.9, 0.999)
    eps: Annotated[Number, _limits("eps")] = 1e-8

    @plain_init
    def __init__(self, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(lr=lr, betas=betas, eps=eps)

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return OptimizerSpec(algorithm=self.type, lr=self.lr, eps=self.eps, beta1=self.betas[0], beta2=self.betas[1])


class AdamW(ConfigModel):
    """``torch.optim.AdamW``: Adam with decoupled weight decay; the step is the table's commit number.

    Args:
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, each at least 0 and below 1.
        eps: Added to the root of the corrected second moment.
        weight_decay: Values are first multiplied by 1 - lr * weight_decay.
        dense: False: only slots with a gradient change, decay too. True: as torch.optim.AdamW on the whole table; the
            shards do what a slot missed when it is next read or touched. Needs values in float32, or a master.
    """

    type: Literal["adamw"] = "adamw"
    lr: Annotated[Number, _limits("lr")]
    betas: tuple[Annotated[Number, _limits("beta1")], Annotated[Number, _limits("beta2")]] = (0.9, 0.999)
    eps: Annotated[Number, _limits("eps")] = 1e-8
    weight_decay: Annotated[Number, _limits("weight_decay")] = 0.01
    dense: Flag = False

    @plain_init
    def __init__(
        self,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        dense: bool = False,
    ) -> None:
        super().__init__(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, dense=dense)

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return OptimizerSpec(
            algorithm=self.type,
            lr=self.lr,
            eps=self.eps,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            dense=self.dense,
        )


class RowWiseAdam(ConfigModel):
    """Adam with one second moment per slot and column block, of the mean of the squares: half of Adam's state.

    Args:
        lr: Learning rate, at least 0.
        betas: Decay of the two moments, each at least 0 and below 1.
        eps: Added to the root of the second moment.
    """

    type: Literal["rowwise_adam"] = "rowwise_adam"
    lr: Annotated[Number, _limits("lr")]
    betas: tuple[Annotated[Number, _limits("beta1")], Annotated[Number, _limits("beta2")]] = (0.9, 0.999)
    eps: Annotated[Number, _limits("eps")] = 1e-8

    @plain_init
    def __init__(self, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(lr=lr, betas=betas, eps=eps)

    def spec(self) -> OptimizerSpec:
        """What travels to the shards."""
        return OptimizerSpec(algorithm=self.type, lr=self.lr, eps=self.eps, beta1=self.betas[0], beta2=self.betas[1])


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
