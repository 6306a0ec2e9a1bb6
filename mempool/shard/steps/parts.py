"""A step's gradient summed per row in parts, so that its temporary memory stays within a budget whatever the batch.

The step's slots are cut into ranges whose pairs and sums fit. For each range the pairs of every held update that lie in
it are picked out, in canonical order, and summed; no update is copied whole. A slot with more pairs than fit is a range
of its own, summed in parts that end where pieces of ``kernels.segment_sum`` end: the bits are those of one sum of all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mempool import kernels
from mempool.shard.pages.storage import Lane, Storage
from mempool.shard.steps.budget import out_of_memory
from mempool.shard.steps.held import HeldUpdate, Pairs, Reduction

SORT_BYTES = 64
"""Temporary bytes of a pair while it is sorted, besides what sorting answers."""
SORTED_BYTES = 32
"""Bytes of a sorted pair, where each is of another row: order, row, slot, start."""

_SCANNED_BYTES = 24  # of a pair of which it is found whether its slot lies in a range: masks, its position
_PICKED_BYTES = 48  # of a pair in that range: position, id, weight, bag, and their copies while they are joined
_BUCKETS = 4096
_LEAST_ROOM = 2**16


def pairs_bytes(table: Storage, updates: Sequence[HeldUpdate]) -> int:
    """Bytes that joining all pairs of these updates and sorting them takes at most, in all lanes at once."""
    pairs, bags = _count(updates)
    width = table.width
    joined = 0 if len(updates) == 1 else 28 * pairs + 4 * width * bags
    in_lanes = sum(
        SORTED_BYTES * pairs + (0 if lane.columns is None else 4 * lane.arena.width * bags) for lane in table.lanes
    )
    return (
        16 * bags + (8 + SORT_BYTES + _scratch_bytes(table, width) + _missed_bytes(table)) * pairs + joined + in_lanes
    )


def reduce_in_parts(
    table: Storage, updates: Sequence[HeldUpdate], room_bytes: int, *, reached: tuple[int, int] = (0, 0)
) -> Iterator[Reduction]:
    """The sums of all rows of a step, range after range.

    Args:
        table: Where the rows are.
        updates: In canonical order.
        room_bytes: What this may take, with what the optimizer needs besides for one part. RUN_PIECE pairs are taken at
            once in any case: 150 KiB, and where gradients have to be picked out (of several updates, or for an arena of
            some of the columns) 8 KiB for each column.
        reached: Where to go on after an earlier part (``Reduction.reached``), perhaps with another room.
    """
    for number, lane in enumerate(table.lanes):
        if number < reached[0]:
            continue
        width = lane.arena.width
        picks_gradients = len(updates) > 1 or lane.columns is not None
        pair_bytes = _PICKED_BYTES + SORTED_BYTES + SORT_BYTES + _scratch_bytes(table, width)
        pair_bytes += 8 * width if picks_gradients else 0
        max_pairs = max(1, room_bytes // 2 // pair_bytes // kernels.RUN_PIECE) * kernels.RUN_PIECE
        max_rows = max(1, room_bytes // 4 // (4 * width + _missed_bytes(table)))
        scanned = max(_BUCKETS, room_bytes // 8 // _SCANNED_BYTES)
        begin = reached[1] if number == reached[0] else 0
        if begin >= table.schema.num_slots:
            continue
        ranges = _ranges(
            updates, begin, table.schema.num_slots, max_pairs=max_pairs, max_rows=max_rows, scanned=scanned
        )
        for first, end in ranges:
            parts = _parts(updates, first, end, num_pairs=max_pairs, scanned=scanned)
            reduction = _summed(lane, _joined(lane, next(parts)), reached=(number, end))
            for part in parts:  # there are more where the range is one slot
                pairs = _joined(lane, part)
                _add(lane, pairs, reduction.sums)
                reduction = replace(reduction, more=reduction.more + pairs.ids.shape[0])
            yield reduction


def reduce_in_smaller_parts(table: Storage, updates: Sequence[HeldUpdate], room_bytes: int) -> Iterator[Reduction]:
    """As ``reduce_in_parts``; where there is no memory for a part after all, it goes on with smaller ones."""
    reached = 0, 0
    while True:
        try:
            for reduction in reduce_in_parts(table, updates, room_bytes, reached=reached):
                reached = reduction.reached
                yield reduction
            return
        except Exception as error:
            if not out_of_memory(error) or room_bytes <= _LEAST_ROOM:
                raise
            room_bytes //= 4


def _scratch_bytes(table: Storage, width: int) -> int:
    """Bytes for each pair of the sums of a GPU's long runs."""
    return -(-4 * width // kernels.LONG_RUN) if table.device.type == "cuda" else 0


def _missed_bytes(table: Storage) -> int:
    """Bytes of a row while it catches up with a dense optimizer's steps."""
    return 0 if table.schedule is None else 48 + 4 * len(table.blocks)


def _count(updates: Sequence[HeldUpdate]) -> tuple[int, int]:
    """Pairs and bags."""
    return sum(update.bags.ids.shape[0] for update in updates), sum(update.bags.num_bags for update in updates)


def _within(update: HeldUpdate, first: int, end: int, scanned: int) -> Iterator[Tensor]:
    """Positions of an update's pairs whose slots lie in ``first`` to ``end``, ascending, some at a time."""
    for start in range(0, update.bags.ids.shape[0], scanned):
        ids = update.bags.ids[start : start + scanned]
        at = ((ids >= first) & (ids < end)).nonzero()[:, 0]
        if at.numel():
            yield at + start


def _parts(
    updates: Sequence[HeldUpdate], first: int, end: int, *, num_pairs: int, scanned: int
) -> Iterator[list[tuple[HeldUpdate, Tensor]]]:
    """The pairs of a range in canonical order, cut after every ``num_pairs`` of them: positions by update."""
    part: list[tuple[HeldUpdate, Tensor]] = []
    free = num_pairs
    for update in updates:
        for at in _within(update, first, end, scanned):
            while at.numel():
                if not free:
                    yield part
                    part, free = [], num_pairs
                taken, at = at[:free], at[free:]
                part.append((update, taken))
                free -= taken.shape[0]
    if part:
        yield part


def _joined(lane: Lane, part: list[tuple[HeldUpdate, Tensor]]) -> Pairs:
    """Pairs of a part and the gradients of their bags, the lane's columns. Whole ones of one update are not copied."""
    updates: dict[int, tuple[HeldUpdate, list[Tensor]]] = {}
    for update, at in part:
        updates.setdefault(id(update), (update, []))[1].append(at)
    alone = len(updates) == 1
    weighted = any(update.bags.weights is not None for update, _ in updates.values())
    ids, weights, bags, grads, num_bags = [], [], [], [], 0
    for update, positions in updates.values():
        at = positions[0] if len(positions) == 1 else torch.cat(positions)
        ids.append(update.bags.ids[at])
        if weighted:
            given = update.bags.weights
            weights.append(torch.ones_like(at, dtype=torch.float32) if given is None else given[at])
        # Of empty bags with the same offset, the last is the one that is not empty.
        bag = torch.searchsorted(update.bags.offsets, at, right=True) - 1
        gradients = update.grads
        if not alone or lane.columns is not None:
            used, bag = torch.unique_consecutive(bag, return_inverse=True)
            gradients = gradients[used] if lane.columns is None else gradients[used[:, None], lane.columns]
        bags.append(bag + num_bags)
        grads.append(gradients)
        num_bags += gradients.shape[0]
    if alone:
        return Pairs(ids[0], weights[0] if weighted else None, bags[0], grads[0])
    return Pairs(torch.cat(ids), torch.cat(weights) if weighted else None, torch.cat(bags), torch.cat(grads))


def _summed(lane: Lane, pairs: Pairs, *, reached: tuple[int, int]) -> Reduction:
    in_order = kernels.sort_pairs(lane.arena.paged(), pairs.ids)
    sums = kernels.segment_sum(in_order, pairs.weights, pairs.bags, pairs.grads)
    return Reduction.of(lane, in_order, sums, reached=reached)


def _add(lane: Lane, pairs: Pairs, sums: Tensor) -> None:
    """Add the gradients of more pairs of one slot; sums: [1, W], or [0, W] where it is not here."""
    in_order = kernels.sort_pairs(lane.arena.paged(), pairs.ids)
    places = torch.arange(sums.shape[0], device=sums.device)
    kernels.add_segments(sums, places, in_order, pairs.weights, pairs.bags, pairs.grads)


def _ranges(
    updates: Sequence[HeldUpdate], first: int, end: int, *, max_pairs: int, max_rows: int, scanned: int
) -> Iterator[tuple[int, int]]:
    """Cut slots into ranges, ascending, each with pairs, but at most so many, of at most so many slots. A slot with
    more pairs is a range of its own."""
    shift = max(0, (end - first - 1).bit_length() - (_BUCKETS.bit_length() - 1))
    width = 1 << shift
    counts = np.zeros(-(-(end - first) // width), dtype=np.int64)
    for update in updates:
        for at in _within(update, first, end, scanned):
            buckets = (update.bags.ids[at] - first) >> shift
            counts += torch.bincount(buckets, minlength=len(counts)).cpu().numpy()
    start, pairs, rows = first, 0, 0
    for bucket in np.flatnonzero(counts).tolist():
        count, begins = int(counts[bucket]), first + bucket * width
        if pairs and (pairs + count > max_pairs or rows + min(count, width) > max_rows):
            yield start, begins
            start, pairs, rows = begins, 0, 0
        if count <= max_pairs and min(count, width) <= max_rows:
            pairs, rows = pairs + count, rows + min(count, width)
            continue
        if width == 1:
            yield begins, begins + 1
        else:
            yield from _ranges(
                updates,
                begins,
                min(begins + width, end),
                max_pairs=max_pairs,
                max_rows=max_rows,
                scanned=scanned,
            )
        start = begins + width
    if pairs:
        yield start, end
