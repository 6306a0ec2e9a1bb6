"""Reading an arena on the CPU: weighted sums of bags, and the gradient of the weights.

Pairs that are here are listed first, some hundred at a time, and the rows of the list are then read tile by tile: so
rows ahead can be prefetched across the bounds of bags.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mempool.kernels.arguments import Paged
from mempool.kernels.checking import check_offsets
from mempool.kernels.cpu.admission import NO_IDS, NO_OFFSETS, admit, ascends
from mempool.kernels.cpu.elements import load, locate
from mempool.kernels.cpu.runtime import (
    EMPTY_WEIGHTS,
    Array,
    borrowed,
    elements,
    has_wide_registers,
    inlined,
    keep,
    kernel,
    optional_weights,
    scales,
    serial,
    several_tasks,
    spread,
    use_threads,
    view,
)
from mempool.kernels.cpu.vectors import LANES, add_product, dot_tile, sum_tile

# Pairs that are listed at once: so many that the rest of the work is nothing beside, and the list stays in the cache.
PIECE = 512
_AHEAD_BYTES, _LEAST_AHEAD, _MOST_AHEAD = 8192, 8, 32
# Columns of a tile: as many as registers hold, then less for what is left.
_WIDE, _MIDDLE, _NARROW, _SLIM, _LEAST = (256 if has_wide_registers() else 64), 64, 2 * LANES, LANES, LANES // 2
_sum_wide, _sum_middle, _sum_narrow, _sum_slim, _sum_least = map(sum_tile, (_WIDE, _MIDDLE, _NARROW, _SLIM, _LEAST))
_dot_wide, _dot_middle, _dot_narrow, _dot_slim, _dot_least = map(dot_tile, (_WIDE, _MIDDLE, _NARROW, _SLIM, _LEAST))
# Tasks per thread: threads that the system stops, or that have the longer bags, take fewer.
TASKS_PER_THREAD = 4
# Bags are handed out whole, unless one of them would leave the other threads idle: then columns are.
_LOPSIDED = 1.25
# Reading an element takes a fraction of the time that a thread's share of the work is measured by: a step on it.
READS_PER_STEP = 4
# Columns of a block that is not full: more than any row has, and tiles divide it.
_ONE_BLOCK = 1 << 40
# Numba compiles a function once more for an argument that is a number of the source.
ZERO: Any = np.int64(0)


class Arena(NamedTuple):
    """An arena as these kernels read it, and ``rows``."""

    rows: Array
    scales: Array
    first_scale: int
    block_dim: int
    page_table: Array
    page_shift: int


def arena_of(paged: Paged) -> Arena:
    """Views of an arena, made once."""
    arena: Arena | None = paged.views.get("bags")
    if arena is None:
        block_dim = paged.width if paged.packed is None else paged.packed.block_dim
        if block_dim >= paged.width:
            block_dim = _ONE_BLOCK
        arena = Arena(elements(paged), *scales(paged), block_dim, view(paged.page_table), paged.page_shift)
        paged.views["bags"] = arena
    return arena


class Listed(NamedTuple):
    """The pairs of a piece that are here, and the rows that are read after them."""

    rows: Array  # [PIECE + _MOST_AHEAD] int64
    weights: Array  # [PIECE] float32
    places: Array  # [PIECE + 1] int64: how many pairs of the piece that are here come before each


@inlined
def rows_ahead(row_bytes: int) -> Any:
    """How many rows are prefetched ahead of the one that is read: so many bytes of them, within bounds."""
    return min(max(_AHEAD_BYTES // row_bytes, _LEAST_AHEAD), _MOST_AHEAD)


@serial
def new_list() -> Any:
    rows, places = np.empty(PIECE + _MOST_AHEAD, dtype=np.int64), np.empty(PIECE + 1, dtype=np.int64)
    return Listed(rows, np.ones(PIECE, dtype=np.float32), places)


@inlined
def list_pairs(arena: Arena, ids: Array, weights: Array, first: int, end: int, last: int, into: Listed) -> bool:
    """List the pairs ``first`` to ``end`` that are here, and the rows of those up to ``last`` that are read next.

    Returns whether all of them are: their places and weights are not written then, as they are those of the pairs.
    """
    # Numbers without a sign spare the code that looks for negative ones.
    num_pairs: Any = np.uintp(end - first)
    count: Any = np.uintp(0)
    lowest: Any = np.int64(0)
    for place in range(num_pairs):
        row = locate(ids[np.uintp(first) + place], arena.page_table, arena.page_shift)
        into.rows[place] = row
        lowest = min(lowest, row)
    if lowest < 0:
        for place in range(num_pairs):
            row = into.rows[place]
            into.rows[count] = row
            into.places[place] = count
            if weights.shape[0] > 0:
                into.weights[count] = weights[np.uintp(first) + place]
            if row >= 0:
                count += np.uintp(1)
        into.places[num_pairs] = count
    else:
        count = num_pairs
    for ahead in range(np.uintp(_MOST_AHEAD)):
        row = 0
        if end + np.int64(ahead) < last:
            row = max(row, locate(ids[np.uintp(end) + ahead], arena.page_table, arena.page_shift))
        into.rows[count + ahead] = row
    return lowest >= 0  # type: ignore[no-any-return]


@inlined
def end_in(listed: Listed, all_here: bool, pair: int) -> int:
    """How many pairs that are here a piece has before its ``pair``-th."""
    return pair if all_here else listed.places[np.uintp(pair)]


@inlined
def _tile_columns(arena: Arena, column: int, end: int) -> int:
    """Columns of the next tile; 0 where columns are left that fill none, or blocks that tiles would straddle."""
    packed = arena.rows.itemsize == 1
    aligned = arena.block_dim | column  # tiles are powers of two
    if end - column < _LEAST or (packed and aligned % _LEAST != 0):
        return 0
    if end - column < _SLIM or (packed and aligned % _SLIM != 0):
        return _LEAST
    if end - column < _NARROW or (packed and aligned % _NARROW != 0):
        return _SLIM
    if end - column < _MIDDLE or (packed and aligned % _MIDDLE != 0):
        return _NARROW
    return _WIDE if end - column >= _WIDE else _MIDDLE


@serial
def _sum_rest(
    arena: Arena, listed: Array, first: int, end: int, column: int, end_column: int, weights: Array, acc: Array
) -> None:
    # Columns that fill no tile, block by block.
    while column < end_column:
        block = column // arena.block_dim
        block_end = min(end_column, (block + 1) * arena.block_dim)
        sums = acc[column:block_end]
        for place in range(first, end):
            weight = weights[place]
            if arena.rows.itemsize == 1:
                weight = np.float32(weight * arena.scales[listed[place], arena.first_scale + block])
            values = arena.rows[listed[place], column:block_end]
            for position in range(sums.shape[0]):
                sums[position] = add_product(weight, load(values[position]), sums[position])
        column = block_end


@inlined
def sum_listed(
    arena: Arena,
    listed: Array,
    first: int,
    count: int,
    first_column: int,
    end_column: int,
    weights: Array,
    fresh: bool,
    acc: Array,
    after: int,
) -> None:
    # Per column: acc = fma(w, v, acc), pair after pair. Then the rows that follow in the list are read, from ``after``.
    rows, block_dim, scales_start = arena.rows, arena.block_dim, 4 * arena.first_scale
    column, columns = first_column, _tile_columns(arena, first_column, end_column)
    while columns > 0:
        following = column + columns
        next_columns = _tile_columns(arena, following, end_column)
        then, back = (following, count) if next_columns > 0 else (after, ZERO)
        ahead = rows_ahead(columns * rows.itemsize)
        source = rows, scales_start, block_dim, listed, first, count, ahead, column, then, back
        if columns == _WIDE and columns == end_column - first_column and after == first_column:
            # The usual width: what is read next follows in the list, which the compiler is told.
            _sum_wide(
                rows, scales_start, block_dim, listed, first, count, ahead, column, column, 0, weights, fresh, acc
            )
        elif columns == _WIDE:
            _sum_wide(*source, weights, fresh, acc)
        elif columns == _MIDDLE:
            _sum_middle(*source, weights, fresh, acc)
        elif columns == _NARROW:
            _sum_narrow(*source, weights, fresh, acc)
        elif columns == _SLIM:
            _sum_slim(*source, weights, fresh, acc)
        else:
            _sum_least(*source, weights, fresh, acc)
        column, columns = following, next_columns
    if column < end_column:
        if fresh:
            acc[column:end_column] = 0
        _sum_rest(arena, listed, first, first + count, column, end_column, weights, acc)


@serial
def _sum_bags(
    arena: Arena,
    ids: Array,
    weights: Array,
    offsets: Array,
    bag: int,
    end_bag: int,
    first_column: int,
    end_column: int,
    out: Array,
) -> None:
    own = new_list()
    listed = borrowed(own)
    first_pair, last_pair = offsets[bag], offsets[end_bag]
    while bag < end_bag:
        end_pair = min(last_pair, first_pair + PIECE)
        all_here = list_pairs(arena, ids, weights, first_pair, end_pair, last_pair, listed)
        own_weights = all_here and weights.shape[0] > 0
        given = weights[first_pair:end_pair] if own_weights else listed.weights
        first = ZERO
        while bag < end_bag:
            end = end_in(listed, all_here, min(offsets[bag + 1], end_pair) - first_pair)
            fresh = offsets[bag] >= first_pair
            sum_listed(
                arena, listed.rows, first, end - first, first_column, end_column, given, fresh, out[bag], first_column
            )
            first = end
            if offsets[bag + 1] > end_pair:  # goes on in the next piece
                break
            bag += 1
        first_pair = end_pair
    keep(own)


@serial
def first_bag_of_part(offsets: Array, part: int, num_parts: int) -> Any:
    # The first bag with at least part / num_parts of all pairs before it, where a bag counts as a pair as well.
    num_bags = offsets.shape[0] - 1
    if part >= num_parts:
        return num_bags
    wanted = (offsets[num_bags] + num_bags) * part // num_parts
    low, high = 0, num_bags
    while low < high:
        middle = (low + high) // 2
        if offsets[middle] + middle < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@serial
def _is_lopsided(offsets: Array, num_threads: int) -> bool:
    num_bags = offsets.shape[0] - 1
    largest = 0
    for part in range(num_threads):
        first = first_bag_of_part(offsets, part, num_threads)
        end = first_bag_of_part(offsets, part + 1, num_threads)
        largest = max(largest, offsets[end] + end - offsets[first] - first)
    return bool(largest * num_threads > _LOPSIDED * (offsets[num_bags] + num_bags))


@serial
def _sum_task(
    task: int,
    arena: Arena,
    ids: Array,
    weights: Array,
    offsets: Array,
    num_tasks: int,
    by_columns: bool,
    out: Array,
) -> None:
    num_bags, width = out.shape
    num_groups = width // _MIDDLE
    first_bag, end_bag, first_column, end_column = ZERO, num_bags, ZERO, width
    if by_columns:
        first_column = num_groups * task // num_tasks * _MIDDLE
        if task + 1 < num_tasks:
            end_column = num_groups * (task + 1) // num_tasks * _MIDDLE
    else:
        first_bag = first_bag_of_part(offsets, task, num_tasks)
        end_bag = first_bag_of_part(offsets, task + 1, num_tasks)
    _sum_bags(arena, ids, weights, offsets, first_bag, end_bag, first_column, end_column, out)


@kernel
def _weighted_sum(
    arena: Arena, ids: Array, weights: Array, offsets: Array, num_threads: int, num_tasks: int, out: Array
) -> bool:
    if not ascends(offsets, ids.shape[0]):
        return False
    num_groups = out.shape[1] // _MIDDLE
    by_columns = num_groups > 1 and _is_lopsided(offsets, num_threads)
    num_tasks = min(num_groups, num_threads) if by_columns else num_tasks
    spread(num_tasks, _sum_task, (arena, ids, weights, offsets, num_tasks, by_columns, out))
    return True


def weighted_sum(
    paged: Paged,
    ids: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """See mempool.kernels.weighted_sum."""
    whole = dtype == torch.float32
    width, num_ids = paged.width, ids.shape[0]
    if out is not None and whole:
        sums = out
    else:
        sums = torch.empty(offsets.shape[0] - 1, width, dtype=torch.float32, device="cpu")
    num_threads = use_threads(num_ids * width // READS_PER_STEP)
    num_tasks = several_tasks(num_threads, TASKS_PER_THREAD)
    given = view(ids), optional_weights(weights), view(offsets)
    if not _weighted_sum(arena_of(paged), *given, num_threads, num_tasks, view(sums)):
        check_offsets(offsets, num_ids)
    if whole:
        return sums
    return sums.to(dtype) if out is None else out.copy_(sums)


def sum_arrays(
    paged: Paged,
    ids: Array,
    weights: Array | None,
    offsets: Array,
    *,
    num_slots: int,
    private: bool,
    out: Array,
) -> tuple[Array, Array] | None:
    """See mempool.kernels.array_sums."""
    own_ids, own_offsets = ids.view(np.int32), offsets
    if private:
        admitted = admit(own_ids, num_slots, NO_IDS, offsets, NO_OFFSETS)
    else:
        own_ids, own_offsets = np.empty(ids.shape[0], np.int32), offsets.copy()
        admitted = admit(ids, num_slots, own_ids, own_offsets, NO_OFFSETS)
    if not admitted:
        return None
    num_threads = use_threads(ids.shape[0] * paged.width // READS_PER_STEP)
    num_tasks = several_tasks(num_threads, TASKS_PER_THREAD)
    given = own_ids, EMPTY_WEIGHTS if weights is None else weights, own_offsets
    return (own_ids, own_offsets) if _weighted_sum(arena_of(paged), *given, num_threads, num_tasks, out) else None


@serial
def _dot_rest(
    arena: Arena,
    listed: Array,
    first: int,
    end: int,
    column: int,
    end_column: int,
    fresh: bool,
    grad: Array,
    results: Array,
) -> None:
    for place in range(first, end):
        total = np.float32(0) if fresh else results[place]
        for position in range(column, end_column):
            value = load(arena.rows[listed[place], position])
            if arena.rows.itemsize == 1:
                value *= arena.scales[listed[place], arena.first_scale + position // arena.block_dim]
            total += value * grad[position]
        results[place] = total


@inlined
def dot_listed(
    arena: Arena,
    listed: Array,
    first: int,
    count: int,
    first_column: int,
    end_column: int,
    grad: Array,
    results: Array,
    after: int,
    back_after: int,
) -> None:
    # Of columns of rows and of grad. Then is read from ``after``: the rows that follow, or those so many places back.
    rows, block_dim, scales_start = arena.rows, arena.block_dim, 4 * arena.first_scale
    column, columns = first_column, _tile_columns(arena, first_column, end_column)
    while columns > 0:
        following = column + columns
        next_columns = _tile_columns(arena, following, end_column)
        then, back = (following, count) if next_columns > 0 else (after, back_after)
        ahead = rows_ahead(columns * rows.itemsize)
        source = rows, scales_start, block_dim, listed, first, count, ahead, column, then, back
        if columns == _WIDE and columns == end_column - first_column and back_after == 0 and after == first_column:
            alone = rows, scales_start, block_dim, listed, first, count, ahead, column, column, 0
            _dot_wide(*alone, True, grad, results)
        elif columns == _WIDE:
            _dot_wide(*source, column == first_column, grad, results)
        elif columns == _MIDDLE:
            _dot_middle(*source, column == first_column, grad, results)
        elif columns == _NARROW:
            _dot_narrow(*source, column == first_column, grad, results)
        elif columns == _SLIM:
            _dot_slim(*source, column == first_column, grad, results)
        else:
            _dot_least(*source, column == first_column, grad, results)
        column, columns = following, next_columns
    if column < end_column:
        fresh = column == first_column
        _dot_rest(arena, listed, first, first + count, column, end_column, fresh, grad, results)


@serial
def _multiply_task(
    task: int, arena: Arena, ids: Array, offsets: Array, grads: Array, num_tasks: int, out: Array
) -> None:
    first_pair, last_pair = ids.shape[0] * task // num_tasks, ids.shape[0] * (task + 1) // num_tasks
    own, own_results = new_list(), np.empty(PIECE, dtype=np.float32)
    listed, results = borrowed(own), borrowed(own_results)
    no_weights = results[:0]  # an array of the source is read-only, for which list_pairs would be compiled once more
    bag, width = np.searchsorted(offsets, first_pair, side="right") - 1, grads.shape[1]
    while first_pair < last_pair:
        end_pair = min(last_pair, first_pair + PIECE)
        all_here = list_pairs(arena, ids, no_weights, first_pair, end_pair, last_pair, listed)
        first, count = ZERO, end_in(listed, all_here, end_pair - first_pair)
        while first < count:
            end = end_in(listed, all_here, min(offsets[bag + 1], end_pair) - first_pair)
            if end > first:
                dot_listed(arena, listed.rows, first, end - first, ZERO, width, grads[bag], results, ZERO, ZERO)
            first = end
            bag += first < count
        for pair in range(end_pair - first_pair):
            place = end_in(listed, all_here, pair)
            is_here = end_in(listed, all_here, pair + 1) > place
            out[first_pair + pair] = results[place] if is_here else np.float32(0)
        while bag + 1 < offsets.shape[0] - 1 and offsets[bag + 1] <= end_pair:
            bag += 1
        first_pair = end_pair
    keep(own)
    keep(own_results)


@kernel
def _weight_gradient(arena: Arena, ids: Array, offsets: Array, grads: Array, num_tasks: int, out: Array) -> bool:
    if not ascends(offsets, ids.shape[0]):
        return False
    spread(num_tasks, _multiply_task, (arena, ids, offsets, grads, num_tasks, out))
    return True


def weight_gradient(paged: Paged, ids: Tensor, offsets: Tensor, grads: Tensor, out: Tensor | None = None) -> Tensor:
    """See mempool.kernels.weight_gradient."""
    out = torch.empty(ids.numel(), dtype=torch.float32, device="cpu") if out is None else out
    num_tasks = several_tasks(use_threads(ids.numel() * paged.width // READS_PER_STEP), TASKS_PER_THREAD)
    if not _weight_gradient(arena_of(paged), view(ids), view(offsets), view(grads), num_tasks, view(out)):
        check_offsets(offsets, ids.numel())
    return out
