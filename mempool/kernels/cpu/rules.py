"""The optimizers' rules on one row of float32 values and state, on the CPU; what is inlined into ``updates``' kernels.

Rules follow each column, or each block of columns, apart from the others. Their options (momentum, weight decay, the
largest norm of a row) are compiled into variants of their own, of steps that have any.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as typed_numba
import numpy as np
from numba.extending import overload

from mempool.kernels.cpu.runtime import Array, serial
from mempool.kernels.steps import OptimizerStep

numba: Any = typed_numba

#: The number by which kernels know a rule. AdamW's is Adam's, with a decay and a correction of the root.
RULES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "adam": 3, "adamw": 3, "rowwise_adam": 4, "sgd_momentum": 5}
#: Partial sums of a block's squares: one for all columns that are equal modulo this.
LANES = 16
MOMENTUM = RULES["sgd_momentum"]


class Options(NamedTuple):
    """What a step does besides its rule; see ``mempool.kernels.OptimizerStep``."""

    gradient_decay: np.float32
    decay: np.float32
    momentum: np.float32
    share: np.float32  #: 1 - dampening
    max_norm: np.float32  #: infinity for none
    nesterov: bool


class Rule(NamedTuple):
    """An optimizer's step: rule, numbers, state. State that is not kept has one row, of no columns."""

    number: int  #: of RULES
    scalars: Array  #: float32: grad_scale, step_size, eps, 1 - beta1, 1 - beta2, root_correction, decay
    state0: Array  #: [R, W] float32, or [R, blocks] for row-wise Adagrad
    state1: Array  #: [R, W] float32, or [R, blocks] for row-wise Adam
    randomly: bool  #: stochastic rounding, else to nearest
    key: int  #: ``RandomRounding.key``
    columns: Array  #: ``RandomRounding.columns``, not read unless randomly
    options: Options | None  #: None: the rule by itself, compiled without any code for options


def options_of(step: OptimizerStep) -> Options | None:
    """The options of a step, as kernels take them."""
    if step.plain:
        return None
    return Options(
        np.float32(step.gradient_decay),
        np.float32(1.0 if step.algorithm == "adamw" else step.decay),  # adamw's is part of its rule
        np.float32(step.momentum),
        np.float32(1.0 - step.dampening),
        np.float32(step.max_norm),
        step.nesterov,
    )


@serial
def _own_row(matrix: Array, row: int) -> Any:
    """A row of a matrix, or the only one of a matrix that is not kept."""
    return matrix[row if matrix.shape[1] > 0 else 0]


@serial
def _sum_of_squares(grads: Array, lanes: Array) -> Any:
    """Added up in an order that vector units can follow."""
    width = grads.shape[0]
    for lane in range(LANES):
        lanes[lane] = np.float32(0)
    for group in range(width // LANES):
        part = grads[LANES * group : LANES * group + LANES]
        for lane in range(LANES):
            lanes[lane] += part[lane] * part[lane]
    rest = grads[width - width % LANES :]
    for lane in range(rest.shape[0]):
        lanes[lane] += rest[lane] * rest[lane]
    half = LANES // 2
    while half > 0:
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
        half //= 2
    return lanes[0]


@serial
def _mean_square(grads: Array, lanes: Array) -> Any:
    return _sum_of_squares(grads, lanes) / np.float32(grads.shape[0])


@serial
def _follow_rule(rule: Rule, block_dim: int, row: int, values: Array, grads: Array, lanes: Array) -> None:
    """A rule by itself; arguments as of apply_rule. Gradients are only read."""
    scalars = rule.scalars
    state0, state1 = _own_row(rule.state0, row), _own_row(rule.state1, row)
    step_size, eps, width = scalars[1], scalars[2], grads.shape[0]
    if rule.number == 0:
        for column in range(width):
            values[column] = values[column] - step_size * grads[column]
    elif rule.number == 1:
        for column in range(width):
            grad = grads[column]
            total = state0[column] + grad * grad
            state0[column] = total
            values[column] = values[column] - step_size * (grad / (np.sqrt(total) + eps))
    elif rule.number == 2:
        for block in range(state0.shape[0]):
            first, end = block * block_dim, min((block + 1) * block_dim, width)
            block_grads, block_values = grads[first:end], values[first:end]
            total = state0[block] + _mean_square(block_grads, lanes)
            state0[block] = total
            divisor = np.sqrt(total) + eps
            for column in range(block_grads.shape[0]):
                block_values[column] = block_values[column] - step_size * (block_grads[column] / divisor)
    elif rule.number == 3:
        rest1, rest2, correction, decay = scalars[3], scalars[4], scalars[5], scalars[6]
        for column in range(width):
            grad = grads[column]
            moment1 = state0[column] + (grad - state0[column]) * rest1
            moment2 = state1[column] + (grad * grad - state1[column]) * rest2
            state0[column] = moment1
            state1[column] = moment2
            update = moment1 / (np.sqrt(moment2) / correction + eps)
            values[column] = values[column] * decay - step_size * update
    else:
        rest1, rest2 = scalars[3], scalars[4]
        for block in range(state1.shape[0]):
            first, end = block * block_dim, min((block + 1) * block_dim, width)
            block_grads, block_values, moments = grads[first:end], values[first:end], state0[first:end]
            moment2 = state1[block] + (_mean_square(block_grads, lanes) - state1[block]) * rest2
            state1[block] = moment2
            divisor = np.sqrt(moment2) / scalars[5] + eps
            for column in range(block_grads.shape[0]):
                moment1 = moments[column] + (block_grads[column] - moments[column]) * rest1
                moments[column] = moment1
                block_values[column] = block_values[column] - step_size * (moment1 / divisor)


@serial
def _add_to_momentum(options: Any, buffer: Array, grads: Array) -> None:
    """Bring a row's momentum on, and put the update in the place of the gradients."""
    for column in range(grads.shape[0]):
        grad, before = grads[column], buffer[column]
        # NO_MOMENTUM; adding 0.0 keeps a gradient of -0.0 apart from it.
        fresh = np.float32(before).view(np.uint32) == np.uint32(0x80000000)
        moved = options.momentum * before + options.share * grad
        after = (grad if fresh else moved) + np.float32(0)
        buffer[column] = after
        grads[column] = grad + options.momentum * after if options.nesterov else after


@serial
def _bound_norm(max_norm: Any, values: Array, lanes: Array) -> None:
    norm = np.sqrt(_sum_of_squares(values, lanes))
    if norm > max_norm:
        share = max_norm / norm
        for column in range(values.shape[0]):
            values[column] = values[column] * share


@serial
def _with_options(rule: Any, block_dim: int, row: int, values: Array, grads: Array, lanes: Array) -> None:
    options, width = rule.options, grads.shape[0]
    if options.gradient_decay != 0:
        for column in range(width):
            grads[column] = grads[column] + options.gradient_decay * values[column]
    if options.decay != 1:
        for column in range(width):
            values[column] = values[column] * options.decay
    if rule.number == MOMENTUM:
        step_size = rule.scalars[1]
        _add_to_momentum(options, _own_row(rule.state0, row), grads)
        for column in range(width):
            values[column] = values[column] - step_size * grads[column]
    else:
        _follow_rule(rule, block_dim, row, values, grads, lanes)
    if options.max_norm < np.inf:
        _bound_norm(options.max_norm, values, lanes)


def apply_rule(rule: Any, block_dim: Any, row: Any, values: Any, grads: Any, lanes: Any) -> None:
    """One row's step on float32 values and state, in place, with its options.

    Args:
        rule: What to do.
        block_dim: Columns of a block.
        row: The arena row, for its state.
        values: [W].
        grads: [W], scaled; overwritten.
        lanes: [LANES], overwritten.
    """
    raise NotImplementedError(f"compiled code only, called with {type(rule)} and {type(values)}")


@overload(apply_rule, strict=False, jit_options={"error_model": "numpy", "forceinline": True})
def _apply_rule(rule: Any, block_dim: Any, row: Any, values: Any, grads: Any, lanes: Any) -> Any:  # noqa: ARG001
    plain = isinstance(rule.types[rule.fields.index("options")], numba.types.NoneType)
    # The function itself, not one that calls it: a call level more cost a tenth of a step of 64 columns.
    rule_of: Any = _follow_rule if plain else _with_options
    return rule_of.py_func
