"""One row's part of a commit on the CPU: its gradients summed, its values read and rounded, its missed steps done.

Everything here runs on the calling thread and is compiled into the kernels of ``updates``. Sums and rules follow each
column, or each block of columns, apart from the others: the columns of an arena may be cut between blocks without
changing a bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as typed_numba
import numpy as np
from numba.extending import overload

from mempool.kernels.arguments import RUN_PIECE
from mempool.kernels.cpu.elements import load, row_random, store_block
from mempool.kernels.cpu.rules import Rule
from mempool.kernels.cpu.runtime import Array, inlined, prefetch_line, prefetch_row, serial

numba: Any = typed_numba

# Pairs whose gradients are prefetched ahead, and those whose weight and bag are, which say what to prefetch next: pairs
# in order lie all over what came with the request, and of a narrow row waiting for that took most of the time.
_PAIRS_AHEAD = 24
_PAIRS_FAR_AHEAD = 64


class Gradients(NamedTuple):
    """The pairs of a commit, with what they weigh and the gradients of their bags."""

    order: Array  #: [L'] int64
    starts: Array  #: [U + 1] int64
    weights: Array  #: [L] float32, or [0] for all ones
    bags: Array  #: [L] int64
    grads: Array  #: [B, W] float32


class Arena(NamedTuple):
    """Stored rows, the scales of packed ones, and the master. What is not kept has one row, of no columns."""

    rows: Array  #: [R, W] of ``runtime.elements``
    scales: Array  #: [R, n] float32, as ``runtime.scales``
    first_scale: int
    master: Array  #: [R, W] float32
    block_dim: int
    width: int


class Schedule(NamedTuple):
    """What a dense AdamW's steps do to rows without a gradient; see ``mempool.kernels.DenseSchedule``."""

    first_step: int
    horizon: int
    step_sizes: Array  #: [T] float32
    root_corrections: Array  #: [T] float32
    decays: Array  #: [T] float32
    log_decays: Array  #: [T + 1] float64
    scalars: Array  #: float64: beta1, beta2, eps


@inlined
def _sum_piece(gradients: Gradients, first: int, end: int, out: Array) -> None:
    # out = out + weight * grad from zero, pair after pair, no fused multiply-add. Four pairs share one pass over the
    # columns; the order of the additions stays that of the pairs.
    order, weights, bags, grads = gradients.order, gradients.weights, gradients.bags, gradients.grads
    weighted, width = weights.shape[0] > 0, out.shape[0]
    for place in range(first + _PAIRS_FAR_AHEAD, min(end + _PAIRS_FAR_AHEAD, order.shape[0])):
        prefetch_line(bags, order[place], 0)
        if weighted:
            prefetch_line(weights, order[place], 0)
    for place in range(first + _PAIRS_AHEAD, min(end + _PAIRS_AHEAD, order.shape[0])):
        prefetch_row(grads, bags[order[place]])
    pair = order[first]
    weight, grad = weights[pair] if weighted else np.float32(1), grads[bags[pair]]
    for column in range(width):
        out[column] = np.float32(0) + weight * grad[column]
    place = first + 1
    while place + 4 <= end:
        pair, pair1, pair2, pair3 = order[place], order[place + 1], order[place + 2], order[place + 3]
        weight = weights[pair] if weighted else np.float32(1)
        weight1 = weights[pair1] if weighted else np.float32(1)
        weight2 = weights[pair2] if weighted else np.float32(1)
        weight3 = weights[pair3] if weighted else np.float32(1)
        grad, grad1, grad2, grad3 = grads[bags[pair]], grads[bags[pair1]], grads[bags[pair2]], grads[bags[pair3]]
        for column in range(width):
            total = out[column] + weight * grad[column]
            total = total + weight1 * grad1[column]
            total = total + weight2 * grad2[column]
            out[column] = total + weight3 * grad3[column]
        place += 4
    while place < end:
        pair = order[place]
        weight, grad = weights[pair] if weighted else np.float32(1), grads[bags[pair]]
        for column in range(width):
            out[column] = out[column] + weight * grad[column]
        place += 1


@inlined
def sum_pairs(gradients: Gradients, first: int, end: int, piece: Array, out: Array) -> None:
    """Sum ``weights[i] * grads[bags[i]]`` over the pairs ``order[first:end]``, at least one, in pieces of RUN_PIECE.

    Args:
        gradients: The pairs.
        first: Place of the first pair.
        end: Place behind the last.
        piece: [W], overwritten if there are several pieces.
        out: [W] float32, the sum.
    """
    _sum_piece(gradients, first, min(end, first + RUN_PIECE), out)
    for start in range(first + RUN_PIECE, end, RUN_PIECE):
        _sum_piece(gradients, start, min(end, start + RUN_PIECE), piece)
        for column in range(out.shape[0]):
            out[column] += piece[column]


@serial
def _follow(schedule: Schedule, first: int, end: int, values: Array, moment1: Array, moment2: Array) -> None:
    beta1, beta2 = np.float32(schedule.scalars[0]), np.float32(schedule.scalars[1])
    eps = np.float32(schedule.scalars[2])
    for step in range(first, end):
        step_size, decay = schedule.step_sizes[step], schedule.decays[step]
        correction = schedule.root_corrections[step]
        for column in range(values.shape[0]):
            first_moment, second_moment = moment1[column] * beta1, moment2[column] * beta2
            moment1[column] = first_moment
            moment2[column] = second_moment
            update = first_moment / (np.sqrt(second_moment) / correction + eps)
            values[column] = values[column] * decay - step_size * update


@serial
def catch_up_block(schedule: Schedule, done: int, to: int, values: Array, moment1: Array, moment2: Array) -> None:
    """Do a dense AdamW's steps ``done + 1`` to ``to`` with gradients of zero on a block, in place.

    Args:
        schedule: What each step does.
        done: The last step that the block has done.
        to: The last to do.
        values: [n] float32.
        moment1: [n] float32.
        moment2: [n] float32.
    """
    # Never before what is recorded, whatever the state says: there is no step to read there.
    first, end = max(0, done + 1 - schedule.first_step), to + 1 - schedule.first_step
    # Without momentum there is nothing to follow (unless a root of 0 is divided by): the closed form holds at once.
    moving = not schedule.scalars[2] > 0
    for column in range(moment1.shape[0]):
        moving |= moment1[column] != 0
    turn = min(end, first + schedule.horizon) if moving else first
    log_decay = schedule.log_decays[end] - schedule.log_decays[turn]
    if np.isnan(log_decay):
        turn = end
    _follow(schedule, first, turn, values, moment1, moment2)
    if turn < end:
        decay = np.float32(np.exp(log_decay))
        decay1 = np.float32(schedule.scalars[0] ** (end - turn))
        decay2 = np.float32(schedule.scalars[1] ** (end - turn))
        for column in range(values.shape[0]):
            values[column] *= decay
            moment1[column] *= decay1
            moment2[column] *= decay2


def own_values(arena: Any, row: Any, scratch: Any) -> Any:
    """A row's float32 values where a step can change them: its master, the row itself, or its elements in ``scratch``.

    Args:
        arena: Arena.
        row: Which.
        scratch: [W] float32.
    """
    raise NotImplementedError(f"compiled code only, called with {type(arena)} and {type(scratch)} for {row}")


@overload(own_values, strict=False)
def _own_values(arena: Any, row: Any, scratch: Any) -> Any:  # noqa: ARG001 - Numba matches arguments by name
    stored = arena.types[arena.fields.index("rows")].dtype
    if stored == numba.float32:

        def in_place(arena, row, scratch):  # type: ignore[no-untyped-def]  # noqa: ARG001
            return arena.master[row] if arena.master.shape[1] > 0 else arena.rows[row]

        return in_place
    packed = stored != numba.uint16

    def widened(arena, row, scratch):  # type: ignore[no-untyped-def]
        if arena.master.shape[1] > 0:
            return arena.master[row]
        for first in range(0, arena.width, arena.block_dim):
            part = scratch[first : min(first + arena.block_dim, arena.width)]
            elements = arena.rows[row, first : first + part.shape[0]]
            if packed:
                scale = arena.scales[row, arena.first_scale + first // arena.block_dim]
                for column in range(part.shape[0]):
                    part[column] = scale * load(elements[column])
            else:
                for column in range(part.shape[0]):
                    part[column] = load(elements[column])
        return scratch

    return widened


@serial
def round_block(
    arena: Arena, row: int, block: int, values: Array, randomly: bool, low: Any, high: Any, table_column: int
) -> None:
    """Round a block of a row's float32 values [W] to its stored elements, scale included; as ``store_block``."""
    first, end = block * arena.block_dim, min((block + 1) * arena.block_dim, arena.width)
    scale = store_block(values[first:end], arena.rows[row, first:end], randomly, low, high, table_column)
    if arena.scales.shape[1] > 0:
        arena.scales[row, arena.first_scale + block] = scale


@serial
def round_row(arena: Arena, row: int, values: Array, rule: Rule, slot: int) -> None:
    """Round a row's float32 values [W] to its stored elements, as the rule says."""
    low, high = row_random(rule.key, slot)
    for block in range((arena.width + arena.block_dim - 1) // arena.block_dim):
        column = rule.columns[block] if rule.randomly else 0
        round_block(arena, row, block, values, rule.randomly, low, high, column)
