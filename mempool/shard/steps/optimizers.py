"""From a table's OptimizerSpec to the state its shards keep and the step the kernels take. The arithmetic is theirs."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

from mempool.errors import InvalidRequest
from mempool.kernels import (
    BLOCK_STATE,
    LAST_STEP,
    MASTER,
    NO_MOMENTUM,
    STATE_NAMES,
    Algorithm,
    DenseSchedule,
    Needs,
    OptimizerStep,
    RandomRounding,
)
from mempool.types import FlatKeySpec, OptimizerSpec, OwnKeySpec, ProductKeySpec, TableSchema

_ACCUMULATORS = ("sum", "row_sum")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateArray:
    """One array of optimizer state. per: one number per element of the values, or per (slot, block)."""

    name: str
    per: Literal["element", "block"]
    initial: float
    dtype: torch.dtype = torch.float32


def state_arrays(optimizer: OptimizerSpec) -> tuple[StateArray, ...]:
    """The arrays an optimizer keeps beside the values, as the kernels name them."""
    initial = dict.fromkeys(_ACCUMULATORS, optimizer.initial_accumulator_value) | {"momentum_buffer": NO_MOMENTUM}
    arrays = [
        StateArray(name=name, per="block" if name in BLOCK_STATE else "element", initial=initial.get(name, 0.0))
        for name in STATE_NAMES[_algorithm(optimizer)]
    ]
    if optimizer.dense:
        arrays.append(StateArray(name=LAST_STEP, per="block", initial=0, dtype=torch.int32))
    return tuple(arrays)


def step_names(schema: TableSchema) -> tuple[str, ...]:
    """The arrays a step changes besides the values."""
    names = tuple(array.name for array in state_arrays(schema.optimizer))
    return (*names, MASTER) if schema.master else names


def optimizer_step(schema: TableSchema, *, lr: float, grad_scale: float, number: int) -> OptimizerStep:
    """The step of a commit, without its rounding. number: from 1, as the optimizer counts."""
    optimizer = schema.optimizer
    return OptimizerStep(
        algorithm=_algorithm(optimizer),
        lr=lr,
        grad_scale=grad_scale,
        step=number,
        eps=optimizer.eps,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        lr_decay=optimizer.lr_decay,
        weight_decay=optimizer.weight_decay,
        block_dim=schema.block_dim,
        l2=optimizer.algorithm != "adamw" and not optimizer.decoupled_weight_decay,
        momentum=optimizer.momentum,
        dampening=optimizer.dampening,
        nesterov=optimizer.nesterov,
        corrected_eps=optimizer.corrected_eps,
        max_norm=math.inf if optimizer.max_norm is None else optimizer.max_norm,
    )


def id_dtype(schema: TableSchema) -> torch.dtype:
    """In which slot ids of bags are kept on a shard: half the bytes where they fit."""
    return torch.int32 if schema.num_slots < 2**31 else torch.int64


def kernel_needs(schema: TableSchema, device: torch.device) -> Needs:
    """Which kernels a table of this schema needs on a shard."""
    step = optimizer_step(schema, lr=0.0, grad_scale=1.0, number=1)
    return Needs(
        element=schema.dtype,
        algorithm=step.algorithm,
        plain=step.plain,
        master=schema.master,
        dense=schema.optimizer.dense,
        # Whoever may ask for them: only rows laid out whole are experts, and keys of another table are none.
        experts=schema.layout == "rows" and schema.value_dim > 1 and not isinstance(schema.keys, OwnKeySpec),
        keys=_scored(schema),
        device=device.type,
        ids="int32" if id_dtype(schema) == torch.int32 else "int64",
    )


def _scored(schema: TableSchema) -> Literal["", "product", "flat"]:
    """What its queries are scored against here."""
    if isinstance(schema.keys, ProductKeySpec):
        return "product"
    return "flat" if isinstance(schema.keys, FlatKeySpec | OwnKeySpec) else ""


def _algorithm(optimizer: OptimizerSpec) -> Algorithm:
    """The kernels' rule: SGD with momentum is one of its own."""
    return "sgd_momentum" if optimizer.algorithm == "sgd" and optimizer.momentum > 0.0 else optimizer.algorithm


def rounding(
    schema: TableSchema, blocks: tuple[int, ...], *, number: int, device: torch.device
) -> RandomRounding | None:
    """How the step of that number rounds the columns of these blocks, side by side; None: to nearest."""
    if schema.rounding == "nearest":
        return None
    # By its name: a pool's table ids tell when tables were made, and no two runs of one job would be alike.
    table = int.from_bytes(hashlib.sha256(schema.name.encode()).digest()[:8], "big")
    key = RandomRounding.key_of(seed=schema.seed, table=table, step=number)
    return RandomRounding(key, torch.tensor([schema.block_columns(block)[0] for block in blocks], device=device))


def dense_schedule(schema: TableSchema, *, version: int, device: torch.device) -> DenseSchedule | None:
    """What slots without a gradient do in the steps after table version ``version``; None where they do nothing.

    Raises:
        InvalidRequest: The schema asks for a dense optimizer that there is not, or for values too coarse for one.
    """
    optimizer = schema.optimizer
    if not optimizer.dense:
        return None
    if optimizer.algorithm != "adamw" or (schema.dtype != "float32" and not schema.master):
        raise InvalidRequest(
            f"table {schema.name!r}: a dense {optimizer.algorithm} on {schema.dtype} values is not there; dense is of "
            "adamw, with dtype float32 or master"
        )
    return DenseSchedule(
        first_step=version + 1,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        device=device,
    )
