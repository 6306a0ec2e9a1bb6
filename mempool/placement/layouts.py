"""Owners by whole block columns, by whole row pages, or by both (grid); single pages are left to ``pages``.

Shapes: P row pages, C column blocks, R runs of row pages, K kinds of units, S shards, G column groups.
"""

import math

import numpy as np

from mempool.placement.assignment import Int32Array
from mempool.placement.balance import assign, bounds, transport
from mempool.placement.runs import Int64Array, Runs, count_pages

__all__ = ["by_columns", "by_grid", "by_rows"]

# Above this many kinds of row pages only each one's main owner counts: an exact answer would take seconds.
_MAX_KINDS = 1024
_CHUNK_RUNS = 8192
# More rounds moved no fewer pages in trials.
_GRID_ROUNDS = 2


def by_columns(runs: Runs, *, num_shards: int) -> Runs:
    """Block columns on one shard each, balanced to one column, with the fewest moved pages.

    Args:
        runs: present owners as indices below ``num_shards``, -1 where the owner is none of the shards.
        num_shards: S; where it exceeds the number of blocks, S - C shards own nothing.
    """
    low, high = bounds(runs.owners_RC.shape[1], num_shards)
    owner_C = assign(count_pages(runs, num_shards=num_shards).T, low=low, high=high)
    return Runs(starts=runs.starts[[0, -1]], owners_RC=owner_C[None, :].astype(np.int32))


def by_rows(runs: Runs, *, num_shards: int) -> Runs:
    """Row pages on one shard each, balanced to one row page, with the fewest moved pages.

    From nothing every shard gets one contiguous range. Minimal for up to 1,024 kinds of row pages (row pages are of one
    kind when every shard owns as many of their blocks), near to it above.
    """
    starts, owner_R = _rows(runs, num_shards=num_shards)
    num_blocks = runs.owners_RC.shape[1]
    return Runs(starts=starts, owners_RC=np.repeat(owner_R[:, None], num_blocks, axis=1))


def by_grid(runs: Runs, *, num_shards: int) -> Runs:
    """G = gcd(S, C) column groups of C / G blocks, each owned by its own S / G shards by rows.

    G divides both numbers, so that every shard owns equally many blocks and the balance is one row page of a column
    group; where S divides C this is ``columns``, where the two have no common divisor it is ``rows``. Which blocks and
    which shards make a group is chosen to keep much of the present (shards for the blocks and blocks for the shards in
    turn, not exact); the rows within the groups are then exact as in ``by_rows``.
    """
    num_blocks = runs.owners_RC.shape[1]
    num_groups = math.gcd(num_shards, num_blocks)
    group_of_block, group_of_shard = _grid_groups(runs, num_shards=num_shards, num_groups=num_groups)
    parts: list[tuple[Int64Array, Int64Array, Int32Array]] = []
    for group in range(num_groups):
        blocks = np.flatnonzero(group_of_block == group)
        shards = np.flatnonzero(group_of_shard == group)
        local = np.full(num_shards + 1, -1, dtype=np.int32)  # the last entry is what index -1 reads
        local[shards] = np.arange(shards.size)
        starts, owner_R = _rows(Runs(runs.starts, local[runs.owners_RC[:, blocks]]), num_shards=shards.size)
        parts.append((blocks, starts, shards[owner_R].astype(np.int32)))
    starts = np.unique(np.concatenate([starts for _, starts, _ in parts]))
    owners_RC = np.empty((starts.size - 1, num_blocks), dtype=np.int32)
    for blocks, part_starts, owner_R in parts:
        owners_RC[:, blocks] = owner_R[np.searchsorted(part_starts, starts[:-1], side="right") - 1, None]
    return Runs(starts=starts, owners_RC=owners_RC)


def _rows(runs: Runs, *, num_shards: int) -> tuple[Int64Array, Int32Array]:
    """Row pages balanced over shards: (starts [R' + 1], the owner of each range [R'])."""
    kind_R, keep_KS = _row_kinds(runs, num_shards=num_shards)
    lengths = runs.lengths
    counts_K = np.bincount(kind_R, weights=lengths).astype(np.int64)
    low, high = bounds(runs.num_row_pages, num_shards)
    units_KS = transport(keep_KS, counts_K, low=low, high=high)

    # Row pages in the order of (kind, row page) meet the flows in the order of (kind, shard): cut where either changes.
    order = np.argsort(kind_R, kind="stable")
    run_ends = np.cumsum(lengths[order])
    flow_ends = np.cumsum(units_KS.ravel())
    ends = np.union1d(run_ends, flow_ends[flow_ends > 0])
    begins = np.concatenate([[0], ends[:-1]])
    run = np.searchsorted(run_ends, begins, side="right")
    owner = np.searchsorted(flow_ends, begins, side="right") % num_shards
    first_row = runs.starts[order[run]] + begins - (run_ends - lengths[order])[run]
    by_row = np.argsort(first_row)
    return np.append(first_row[by_row], runs.num_row_pages), owner[by_row].astype(np.int32)


def _row_kinds(runs: Runs, *, num_shards: int) -> tuple[Int64Array, Int64Array]:
    """Kinds of row pages: (kind of each run [R], blocks of such a row page that each shard owns [K, S])."""
    # Equal patterns of owners are found by a 64-bit hash. Were two patterns ever to collide, their row pages would be
    # planned as one kind: balanced all the same, with perhaps a needless move.
    factors_C = np.random.default_rng(0).integers(1 << 62, size=runs.owners_RC.shape[1], dtype=np.int64)
    hash_R = np.empty(len(runs.owners_RC), dtype=np.int64)
    for begin in range(0, len(hash_R), _CHUNK_RUNS):
        hash_R[begin : begin + _CHUNK_RUNS] = runs.owners_RC[begin : begin + _CHUNK_RUNS].astype(np.int64) @ factors_C
    _, first, pattern_R = np.unique(hash_R, return_index=True, return_inverse=True)
    if len(first) <= 8 * _MAX_KINDS:
        keep_KS, kind = np.unique(
            _blocks_owned(runs.owners_RC[first], num_shards=num_shards), axis=0, return_inverse=True
        )
        if len(keep_KS) <= _MAX_KINDS:
            return kind.reshape(-1)[pattern_R], keep_KS
    main_R = np.empty(len(hash_R), dtype=np.int64)
    for begin in range(0, len(main_R), _CHUNK_RUNS):
        owned = _blocks_owned(runs.owners_RC[begin : begin + _CHUNK_RUNS], num_shards=num_shards)
        main_R[begin : begin + _CHUNK_RUNS] = owned.argmax(axis=1)
    main_K, kind_R = np.unique(main_R, return_inverse=True)
    return kind_R.reshape(-1), np.eye(num_shards, dtype=np.int64)[main_K]


def _blocks_owned(owners_RC: Int32Array, *, num_shards: int) -> Int64Array:
    num_runs = len(owners_RC)
    cell = np.arange(num_runs)[:, None] * (num_shards + 1) + owners_RC + 1
    counts = np.bincount(cell.ravel(), minlength=num_runs * (num_shards + 1))
    return counts.astype(np.int64).reshape(num_runs, num_shards + 1)[:, 1:]


def _grid_groups(runs: Runs, *, num_shards: int, num_groups: int) -> tuple[Int64Array, Int64Array]:
    """Which column group each block [C] and each shard [S] belongs to."""
    pages_SC = count_pages(runs, num_shards=num_shards)
    num_blocks = pages_SC.shape[1]
    blocks_each, shards_each = num_blocks // num_groups, num_shards // num_groups
    # No shard can keep more pages of a group than its share of the group.
    share = bounds(runs.num_row_pages, shards_each)[1] * blocks_each

    # Blocks of the same owners side by side, those of the first shard first: this finds the groups of a present grid,
    # wherever its blocks lie.
    group_of_block = np.empty(num_blocks, dtype=np.int64)
    group_of_block[np.lexsort(-pages_SC[::-1])] = np.arange(num_blocks) // blocks_each
    best: tuple[int, Int64Array, Int64Array] | None = None
    for _ in range(_GRID_ROUNDS):
        owned_SG = np.stack([pages_SC[:, group_of_block == group].sum(axis=1) for group in range(num_groups)], axis=1)
        keep_SG = np.minimum(owned_SG, share)
        group_of_shard = assign(keep_SG, low=shards_each, high=shards_each)
        kept = int(keep_SG[np.arange(num_shards), group_of_shard].sum())
        if best is None or kept > best[0]:
            best = (kept, group_of_block, group_of_shard)
        keep_CG = np.stack([pages_SC[group_of_shard == group].sum(axis=0) for group in range(num_groups)], axis=1)
        group_of_block = assign(keep_CG, low=blocks_each, high=blocks_each)
    assert best is not None
    return best[1], best[2]
