"""A commit on the CPU: gradients summed per slot, the optimizer's step, missed steps, norms of gradients.

Threads take rows in parts, whoever is free the next one; runs of very many pairs are cut over all threads. No result
depends on how many threads there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import RUN_PIECE, Paged, SortedPairs
from mempool.kernels.cpu.rules import LANES, RULES, Rule, apply_rule, options_of
from mempool.kernels.cpu.runtime import (
    EMPTY_WEIGHTS,
    Array,
    borrowed,
    elements,
    keep,
    kernel,
    optional_weights,
    prefer_huge_pages,
    prefetch_row,
    reassociating,
    scales,
    serial,
    several_tasks,
    spread,
    storage,
    use_threads,
    view,
)
from mempool.kernels.cpu.steps import (
    Arena,
    Gradients,
    Schedule,
    catch_up_block,
    own_values,
    round_block,
    round_row,
    sum_pairs,
)
from mempool.kernels.steps import LAST_STEP, MASTER, STATE_NAMES, DenseSchedule, OptimizerStep

_NO_MATRIX: Array = np.zeros((1, 0), dtype=np.float32)
_NO_NUMBERS: Array = np.zeros(0, dtype=np.int64)
# Tasks for each thread: small enough that threads end together.
_TASKS_OF_A_THREAD = 16
# Runs of more pairs are summed by all threads together.
_LONG_RUN = 4 * RUN_PIECE
# Pieces of a long run that are held at once.
_PIECES_AT_ONCE = 64
# A row's values and state take as long to bring from memory and back as the gradients of this many pairs.
_ROW_COST = 8
_ROWS_AHEAD = 8
# Rows whose squares a task sums; each row has a sum of its own, so that the result does not depend on tasks.
_NORM_ROWS = 256
_NO_NORMS: Array = np.zeros(0, dtype=np.float64)


def _no_long_runs() -> Array:
    """Where kernels say whether they met runs that they leave to ``_sum_long_run``."""
    return np.zeros(1, dtype=np.bool_)


@serial
def _first_row(starts: Array, pair_cost: int, part: int, num_parts: int) -> Any:
    # The first row with at least part / num_parts of all cost before it.
    low, high = 0, starts.shape[0] - 1
    total = starts[high] * pair_cost + high * _ROW_COST
    while low < high:
        middle = (low + high) // 2
        if (starts[middle] * pair_cost + middle * _ROW_COST) * num_parts < total * part:
            low = middle + 1
        else:
            high = middle
    return low


@reassociating
def _row_norm(row: Array) -> Any:
    """The sum of a float32 row's squares in float64, in one order whoever asks."""
    total = 0.0
    for column in range(row.shape[0]):
        total += np.float64(row[column]) * np.float64(row[column])
    return total


@serial
def _sum_task(
    task: int, num_tasks: int, gradients: Gradients, places: Array, has_long: Array, out: Array, norms: Array
) -> None:
    own = np.empty(out.shape[1], dtype=np.float32), np.empty(out.shape[1], dtype=np.float32)
    total, piece = borrowed(own)
    starts = gradients.starts
    for position in range(_first_row(starts, 1, task, num_tasks), _first_row(starts, 1, task + 1, num_tasks)):
        first, end = starts[position], starts[position + 1]
        if end - first > _LONG_RUN:
            has_long[0] = True
        elif places.shape[0] == 0:
            sum_pairs(gradients, first, end, piece, out[position])
            if norms.shape[0] > 0:
                norms[position] = _row_norm(out[position])
        else:
            sums = out[places[position]]
            for start in range(first, end, RUN_PIECE):
                sum_pairs(gradients, start, min(end, start + RUN_PIECE), piece, total)
                for column in range(total.shape[0]):
                    sums[column] += total[column]
    keep(own)


@kernel
def _sum_segments(
    num_tasks: int, gradients: Gradients, places: Array, has_long: Array, out: Array, norms: Array
) -> None:
    """Sums of all runs but the long ones, if there are any, and the squares' of each if ``norms`` has room for them.
    With places, added to what is there."""
    spread(num_tasks, _sum_task, (num_tasks, gradients, places, has_long, out, norms))


@serial
def _piece_task(piece: int, gradients: Gradients, begin: int, end: int, pieces: Array) -> None:
    first = begin + piece * RUN_PIECE
    sum_pairs(gradients, first, min(first + RUN_PIECE, end), pieces[piece], pieces[piece])


@kernel
def _sum_long_run(gradients: Gradients, begin: int, end: int, adding: bool, pieces: Array, out: Array) -> None:
    for batch in range(begin, end, pieces.shape[0] * RUN_PIECE):
        num_pieces = min(pieces.shape[0], (end - batch + RUN_PIECE - 1) // RUN_PIECE)
        spread(num_pieces, _piece_task, (gradients, batch, end, pieces))
        for piece in range(num_pieces):
            if adding or batch + piece > begin:
                for column in range(out.shape[0]):
                    out[column] += pieces[piece, column]
            else:
                for column in range(out.shape[0]):
                    out[column] = pieces[piece, column]


def _long_runs(starts: Array) -> Iterator[tuple[int, int, int]]:
    for position in np.flatnonzero(np.diff(starts) > _LONG_RUN).tolist():
        yield position, int(starts[position]), int(starts[position + 1])


def _gradients(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Gradients:
    return Gradients(view(pairs.order), view(pairs.starts), optional_weights(weights), view(bags), view(grads))


def _add(out: Array, places: Array, gradients: Gradients, norms: Array = _NO_NORMS) -> None:
    num_tasks = several_tasks(use_threads(gradients.order.size * out.shape[1]), _TASKS_OF_A_THREAD)
    has_long = _no_long_runs()
    _sum_segments(num_tasks, gradients, places, has_long, out, norms)
    if has_long[0]:
        pieces = np.empty((_PIECES_AT_ONCE, out.shape[1]), dtype=np.float32)
        for position, first, end in _long_runs(gradients.starts):
            place = int(places[position]) if places.size else position
            _sum_long_run(gradients, first, end, places.size > 0, pieces, out[place])
            if norms.size:
                _row_norms(out[place : place + 1], norms[place : place + 1])


def segment_sum_and_norm(
    pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> tuple[Tensor, float, bool]:
    """See mempool.kernels.segment_sum_and_norm."""
    out = prefer_huge_pages(torch.empty(pairs.rows.numel(), grads.shape[1], dtype=torch.float32, device="cpu"))
    norms = np.empty(out.shape[0], dtype=np.float64)
    _add(storage(out), _NO_NUMBERS, _gradients(pairs, weights, bags, grads), norms)
    return out, *_total(norms)


def segment_sum(pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor) -> Tensor:
    """See mempool.kernels.segment_sum."""
    out = prefer_huge_pages(torch.empty(pairs.rows.numel(), grads.shape[1], dtype=torch.float32, device="cpu"))
    _add(storage(out), _NO_NUMBERS, _gradients(pairs, weights, bags, grads))
    return out


def add_segments(
    sums: Tensor, places: Tensor, pairs: SortedPairs, weights: Tensor | None, bags: Tensor, grads: Tensor
) -> None:
    """See mempool.kernels.add_segments."""
    if places.numel():
        _add(storage(sums), view(places), _gradients(pairs, weights, bags, grads))


@serial
def _step_task(
    task: int,
    num_tasks: int,
    arena: Arena,
    rule: Rule,
    targets: Array,
    slots: Array,
    sums: Array,
    gradients: Gradients,
    has_long: Array,
) -> None:
    fused, starts, width, num_rows = sums.shape[1] == 0, gradients.starts, arena.width, targets.shape[0]
    pair_cost = 1 if fused else 0
    grad_scale = rule.scalars[0]
    own = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
    own_lanes = np.empty(LANES, dtype=np.float32)
    (total, piece, scratch), lanes = borrowed(own), borrowed(own_lanes)
    begin = _first_row(starts, pair_cost, task, num_tasks)
    for position in range(begin, _first_row(starts, pair_cost, task + 1, num_tasks)):
        if position + _ROWS_AHEAD < num_rows:
            ahead = targets[position + _ROWS_AHEAD]
            prefetch_row(arena.rows, ahead)
            prefetch_row(arena.master, ahead)
            prefetch_row(rule.state0, ahead)
            prefetch_row(rule.state1, ahead)
        if fused:
            first, end = starts[position], starts[position + 1]
            if end - first > _LONG_RUN:
                has_long[0] = True
                continue
            sum_pairs(gradients, first, end, piece, total)
            for column in range(width):
                total[column] = total[column] * grad_scale
        else:
            given = sums[position]
            for column in range(width):
                total[column] = given[column] * grad_scale
        row = targets[position]
        values = own_values(arena, row, scratch)
        apply_rule(rule, arena.block_dim, row, values, total, lanes)
        if arena.rows.itemsize < 4 or arena.master.shape[1] > 0:
            round_row(arena, row, values, rule, slots[position])
    keep(own)
    keep(own_lanes)


@kernel
def _step_rows(
    num_tasks: int,
    arena: Arena,
    rule: Rule,
    targets: Array,
    slots: Array,
    sums: Array,
    gradients: Gradients,
    has_long: Array,
) -> None:
    """The step of ``targets`` with the gradients ``sums``; where those have no columns, with the sums of their pairs,
    of all but the rows with long runs, if there are any."""
    spread(num_tasks, _step_task, (num_tasks, arena, rule, targets, slots, sums, gradients, has_long))


def _arena(paged: Paged, state: dict[str, Tensor], block_dim: int) -> Arena:
    master = storage(state[MASTER]) if MASTER in state else _NO_MATRIX
    return Arena(elements(paged), *scales(paged), master, block_dim, paged.width)


def _rule(state: dict[str, Tensor], step: OptimizerStep) -> Rule:
    numbers = (step.grad_scale, step.step_size, step.eps, 1.0 - step.beta1, 1.0 - step.beta2)
    states = [storage(state[name]) for name in STATE_NAMES[step.algorithm]]
    state0, state1 = [*states, _NO_MATRIX, _NO_MATRIX][:2]
    rounding = None if MASTER in state else step.rounding
    decay = step.decay if step.algorithm == "adamw" else 1.0  # other rules' is among the options
    return Rule(
        RULES[step.algorithm],
        np.array([*numbers, step.root_correction, decay], dtype=np.float32),
        state0,
        state1,
        rounding is not None,
        0 if rounding is None else rounding.key,
        _NO_NUMBERS if rounding is None else view(rounding.columns),
        options_of(step),
    )


def optimizer_step(
    paged: Paged, state: dict[str, Tensor], pairs: SortedPairs, sums: Tensor, step: OptimizerStep
) -> None:
    """See mempool.kernels.optimizer_step."""
    num_tasks = several_tasks(use_threads(4 * sums.numel()), _TASKS_OF_A_THREAD)
    no_gradients = Gradients(_NO_NUMBERS, view(pairs.starts), EMPTY_WEIGHTS, _NO_NUMBERS, _NO_MATRIX)
    arena, rule = _arena(paged, state, step.block_dim), _rule(state, step)
    targets, slots = view(pairs.rows), view(pairs.slots)
    _step_rows(num_tasks, arena, rule, targets, slots, view(sums), no_gradients, _no_long_runs())


def fused_step(
    paged: Paged,
    state: dict[str, Tensor],
    pairs: SortedPairs,
    weights: Tensor | None,
    bags: Tensor,
    grads: Tensor,
    step: OptimizerStep,
) -> None:
    """See mempool.kernels.fused_step."""
    num_threads = use_threads((pairs.order.numel() + 4 * pairs.rows.numel()) * grads.shape[1])
    num_tasks = several_tasks(num_threads, _TASKS_OF_A_THREAD)
    arena, rule, gradients = (
        _arena(paged, state, step.block_dim),
        _rule(state, step),
        _gradients(pairs, weights, bags, grads),
    )
    targets, slots = view(pairs.rows), view(pairs.slots)
    has_long = _no_long_runs()
    _step_rows(num_tasks, arena, rule, targets, slots, _NO_MATRIX, gradients, has_long)
    if has_long[0]:
        sums, bounds = np.empty((1, paged.width), dtype=np.float32), np.array([0, 1])
        pieces = np.empty((_PIECES_AT_ONCE, paged.width), dtype=np.float32)
        for position, first, end in _long_runs(gradients.starts):
            _sum_long_run(gradients, first, end, False, pieces, sums[0])
            one = slice(position, position + 1)
            given = gradients._replace(starts=bounds)
            _step_rows(1, arena, rule, targets[one], slots[one], sums, given, has_long)


@serial
def _catch_up_task(
    task: int,
    num_tasks: int,
    arena: Arena,
    schedule: Schedule,
    moment1: Array,
    moment2: Array,
    last_step: Array,
    targets: Array,
    to: int,
) -> None:
    own, num_rows = np.empty(arena.width, dtype=np.float32), targets.shape[0]
    scratch = borrowed(own)
    # Not numbers of the source, for which round_block would be compiled once more.
    randomly: Any = np.bool_(False)
    column: Any = np.int64(0)
    nothing = np.uint32(0)
    for position in range(num_rows * task // num_tasks, num_rows * (task + 1) // num_tasks):
        row = targets[position]
        values = own_values(arena, row, scratch)
        for block in range(last_step.shape[1]):
            done: Any = np.int64(last_step[row, block])
            if done >= to:
                continue
            first, end = block * arena.block_dim, min((block + 1) * arena.block_dim, arena.width)
            moments = moment1[row, first:end], moment2[row, first:end]
            catch_up_block(schedule, done, to, values[first:end], moments[0], moments[1])
            last_step[row, block] = to
            if arena.master.shape[1] > 0:
                round_block(arena, row, block, values, randomly, nothing, nothing, column)
    keep(own)


@kernel
def _catch_up(
    num_tasks: int,
    arena: Arena,
    schedule: Schedule,
    moment1: Array,
    moment2: Array,
    last_step: Array,
    targets: Array,
    to: int,
) -> None:
    spread(num_tasks, _catch_up_task, (num_tasks, arena, schedule, moment1, moment2, last_step, targets, to))


def catch_up(
    paged: Paged,
    state: dict[str, Tensor],
    rows: Tensor,
    schedule: DenseSchedule,
    to: int,
    block_dim: int,
) -> None:
    """See mempool.kernels.catch_up."""
    num_tasks = several_tasks(use_threads(16 * rows.numel() * paged.width), _TASKS_OF_A_THREAD)
    step_sizes, root_corrections, decays = (storage(schedule.steps[number]) for number in range(3))
    steps = Schedule(
        schedule.first_step,
        schedule.horizon,
        step_sizes,
        root_corrections,
        decays,
        storage(schedule.log_decays),
        np.array([schedule.beta1, schedule.beta2, schedule.eps]),
    )
    moments = storage(state["exp_avg"]), storage(state["exp_avg_sq"])
    _catch_up(
        num_tasks,
        _arena(paged, state, block_dim),
        steps,
        *moments,
        storage(state[LAST_STEP]),
        view(rows),
        to,
    )


@serial
def _norm_task(task: int, sums: Array, norms: Array) -> None:
    for row in range(task * _NORM_ROWS, min((task + 1) * _NORM_ROWS, sums.shape[0])):
        norms[row] = _row_norm(sums[row])


@kernel
def _row_norms(sums: Array, norms: Array) -> None:
    spread((sums.shape[0] + _NORM_ROWS - 1) // _NORM_ROWS, _norm_task, (sums, norms))


@kernel
def _added_up(norms: Array) -> float:
    total = 0.0
    for row in range(norms.shape[0]):
        total += norms[row]
    return total


def _total(norms: Array) -> tuple[float, bool]:
    # Squares of float32 numbers are far from the end of float64: what is not finite comes from an element that is not.
    total = float(_added_up(norms))
    return total, math.isfinite(total)


def squared_norm(sums: Tensor) -> tuple[float, bool]:
    """See mempool.kernels.squared_norm."""
    norms = np.empty(sums.shape[0], dtype=np.float64)
    use_threads(sums.numel())
    _row_norms(view(sums), norms)
    return _total(norms)
