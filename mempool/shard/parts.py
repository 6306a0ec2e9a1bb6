"""A step's gradient summed per row in parts, so that its temporary memory stays within a budget whatever the batch.

The step's slots are cut into ranges whose sums fit; for each range, the pairs of every held update are read in order, a
part at a time, and added to the range's sums. No update is copied whole, none are joined. A row of less than
``kernels.RUN_PIECE`` pairs gets the bits that it gets when all is summed at once.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mempool import kernels
from mempool.kernels import SortedPairs
from mempool.shard.held import HeldUpdate, Reduction
from mempool.shard.table import Lane, Table

SORT_BYTES = 64
"""Temporary bytes of a pair while it is sorted, besides what sorting answers."""
SORTED_BYTES = 32
"""Bytes of a sorted pair, where each is of another row: order, row, slot, start."""

_SCANNED_BYTES = 32  # of a pair of which it is found whether its slot lies in a range: masks and positions
_PAIR_BYTES = 64 + SORTED_BYTES + SORT_BYTES  # of a pair in that range: id, weight, bag, gradient's row
_ROW_BYTES = 64 + SORTED_BYTES + SORT_BYTES  # of a distinct row besides its sum: its slot, found and located
_BUCKETS = 4096


def pairs_bytes(table: Table, updates: Sequence[HeldUpdate]) -> int:
    """Bytes that joining all pairs of these updates and sorting them takes at most, in all lanes at once."""
    pairs, bags = _count(updates)
    width = table.schema.width(table.blocks)
    joined = 0 if len(updates) == 1 else 28 * pairs + 4 * width * bags
    in_lanes = sum(
        SORTED_BYTES * pairs + (0 if lane.columns is None else 4 * len(lane.arena.columns) * bags)
        for lane in table.lanes
    )
    missed = 0 if table.schedule is None else (48 + 4 * len(table.blocks)) * pairs
    return 16 * bags + (8 + SORT_BYTES) * pairs + joined + in_lanes + missed


def reduce_in_parts(table: Table, updates: Sequence[HeldUpdate], room_bytes: int) -> Iterator[Reduction]:
    """The sums of all rows of a step, range after range; what is yielded is overwritten with the next.

    Args:
        table: Where the rows are.
        updates: In canonical order.
        room_bytes: What this may take, with what the optimizer needs of one part. The floor is a few rows and the
            gradient of one pair: some 100 bytes and the width of a row in float32.
    """
    num_pairs, _ = _count(updates)
    for lane in table.lanes:
        width = len(lane.arena.columns)
        missed = 0 if table.schedule is None else 48 + 4 * len(lane.arena.blocks)
        max_rows = max(1, min(num_pairs, room_bytes // 2 // (4 * width + _ROW_BYTES + missed)))
        cut = _Cut(
            scanned=max(1, room_bytes // 8 // _SCANNED_BYTES),
            taken=max(1, room_bytes // 4 // (_PAIR_BYTES + (0 if lane.columns is None else 4 * width))),
        )
        buffer = torch.empty(max_rows, width, device=table.device)
        for first, end in _ranges(updates, 0, table.schema.num_slots, max_rows=max_rows, cut=cut):
            slots = _distinct(updates, first, end, max_rows=max_rows, cut=cut)
            here = kernels.sort_pairs(lane.arena.paged(), slots)
            sums = buffer[: here.rows.shape[0]].zero_()
            for update in updates:
                for at in _pairs_within(update, first, end, cut):
                    _add(lane, update, at, here, sums)
            yield Reduction(lane, here, sums)


class _Cut:
    """How many pairs are looked at at once, and of how many gradients are added at once."""

    def __init__(self, *, scanned: int, taken: int) -> None:
        self.scanned = scanned
        self.taken = taken


def _count(updates: Sequence[HeldUpdate]) -> tuple[int, int]:
    """Pairs and bags."""
    return sum(update.bags.ids.shape[0] for update in updates), sum(update.bags.num_bags for update in updates)


def _pairs_within(update: HeldUpdate, first: int, end: int, cut: _Cut) -> Iterator[Tensor]:
    """Positions of an update's pairs whose slots lie in ``first`` to ``end``, ascending, some at a time."""
    for start in range(0, update.bags.ids.shape[0], cut.scanned):
        ids = update.bags.ids[start : start + cut.scanned]
        at = ((ids >= first) & (ids < end)).nonzero()[:, 0]
        at += start
        if at.numel():
            yield from torch.split(at, cut.taken)


def _add(lane: Lane, update: HeldUpdate, at: Tensor, here: SortedPairs, sums: Tensor) -> None:
    """Add the gradients of some pairs of an update to the sums of their rows, which are those of ``here``."""
    pairs = kernels.sort_pairs(lane.arena.paged(), update.bags.ids[at])
    weights = None if update.bags.weights is None else update.bags.weights[at]
    # Of empty bags with the same offset, the last is the one that is not empty.
    bags, grads = torch.searchsorted(update.bags.offsets, at, right=True) - 1, update.grads
    if lane.columns is not None:
        used, bags = torch.unique_consecutive(bags, return_inverse=True)
        grads = grads[used[:, None], lane.columns]
    kernels.add_segments(sums, torch.searchsorted(here.slots, pairs.slots), pairs, weights, bags, grads)


def _ranges(
    updates: Sequence[HeldUpdate], first: int, end: int, *, max_rows: int, cut: _Cut
) -> Iterator[tuple[int, int]]:
    """Cut slots into ranges, ascending, each of at least one pair and at most ``max_rows`` distinct slots of pairs."""
    shift = max(0, (end - first - 1).bit_length() - (_BUCKETS.bit_length() - 1))
    width = 1 << shift
    counts = np.zeros(-(-(end - first) // width), dtype=np.int64)
    for update in updates:
        for at in _pairs_within(update, first, end, cut):
            buckets = (update.bags.ids[at] - first) >> shift
            counts += torch.bincount(buckets, minlength=len(counts)).cpu().numpy()
    start, rows = first, 0
    for bucket in np.flatnonzero(counts).tolist():
        more, begins = min(int(counts[bucket]), width), first + bucket * width
        if rows and rows + more > max_rows:
            yield start, begins
            start, rows = begins, 0
        if more > max_rows:
            yield from _ranges(updates, begins, min(begins + width, end), max_rows=max_rows, cut=cut)
            start = begins + width
        else:
            rows += more
    if rows:
        yield start, end


def _distinct(updates: Sequence[HeldUpdate], first: int, end: int, *, max_rows: int, cut: _Cut) -> Tensor:
    """The slots of a range that pairs name, ascending."""
    found = [updates[0].bags.ids[:0]]
    for update in updates:
        for at in _pairs_within(update, first, end, cut):
            found.append(torch.unique(update.bags.ids[at]))
            if sum(map(len, found)) > 2 * max_rows:
                found = [torch.unique(torch.cat(found))]
    slots: Tensor = torch.unique(torch.cat(found))
    return slots
