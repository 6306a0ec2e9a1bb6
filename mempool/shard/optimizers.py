"""From a table's OptimizerSpec to the state its shards keep and the step the kernels take. The arithmetic is theirs."""

from dataclasses import dataclass
from typing import Literal

from mempool.kernels import OptimizerStep
from mempool.types import OptimizerSpec, TableSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class StateArray:
    """One array of optimizer state, float32. per: one number per element of the values, or per (slot, block)."""

    name: str
    per: Literal["element", "block"]
    initial: float


def state_arrays(optimizer: OptimizerSpec) -> tuple[StateArray, ...]:
    """The arrays an optimizer keeps beside the values, as the kernels name them."""
    accumulator = optimizer.initial_accumulator_value
    match optimizer.algorithm:
        case "sgd":
            return ()
        case "adagrad":
            return (StateArray(name="sum", per="element", initial=accumulator),)
        case "rowwise_adagrad":
            return (StateArray(name="row_sum", per="block", initial=accumulator),)
        case "adam":
            return (
                StateArray(name="exp_avg", per="element", initial=0.0),
                StateArray(name="exp_avg_sq", per="element", initial=0.0),
            )


def optimizer_step(schema: TableSchema, *, lr: float, grad_scale: float, version: int) -> OptimizerStep:
    """The step of the commit that makes table version ``version``."""
    optimizer = schema.optimizer
    return OptimizerStep(
        algorithm=optimizer.algorithm,
        lr=lr,
        grad_scale=grad_scale,
        step=version,
        eps=optimizer.eps,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        lr_decay=optimizer.lr_decay,
        block_dim=schema.block_dim,
    )
