"""Owners page by page, balanced to one page: what ``auto`` does where the blocks do not divide evenly over the shards.

Shapes: P row pages, C column blocks, R runs of row pages, S shards, D donors (the shards, then the pages nobody owns).
"""

import numpy as np

from mempool.placement.runs import Int64Array, Runs, count_pages, refine

__all__ = ["by_pages", "quotas"]


def quotas(loads_S: Int64Array, *, num_units: int) -> Int64Array:
    """The load of every shard ``[S]``, balanced to one unit, for the fewest moves: who has most keeps most."""
    low, num_larger = divmod(num_units, loads_S.size)
    quota_S = np.full(loads_S.size, low, dtype=np.int64)
    quota_S[np.argsort(-loads_S, kind="stable")[:num_larger]] += 1
    return quota_S


def by_pages(runs: Runs, *, num_shards: int) -> Runs:
    """Pages balanced to one page, with the fewest moved pages.

    A shard above its share gives exactly what is too much, so the moves are the fewest; what it gives, and to whom, is
    a greedy choice for few (shard, block) pairs. From nothing: whole blocks first, the rest by ranges of row pages.

    Args:
        runs: present owners as indices below ``num_shards``, -1 where the owner is none of the shards.
        num_shards: S.
    """
    given_DC, taken_SC = _gifts(count_pages(runs, num_shards=num_shards), num_row_pages=runs.num_row_pages)
    changes = {
        int(block): _changes(runs, block=int(block), given_D=given_DC[:, block], taken_S=taken_SC[:, block])
        for block in np.flatnonzero(taken_SC.any(axis=0))
    }
    no_cuts = np.empty(0, dtype=np.int64)
    result = refine(
        runs, np.concatenate([no_cuts, *(edges for start, stop, _ in changes.values() for edges in (start, stop))])
    )
    row = result.starts[:-1]
    for block, (start, stop, shard) in changes.items():
        change = np.searchsorted(start, row, side="right") - 1
        inside = (change >= 0) & (row < stop[change])
        result.owners_RC[inside, block] = shard[change[inside]]
    return result


def _gifts(owned_SC: Int64Array, *, num_row_pages: int) -> tuple[Int64Array, Int64Array]:
    """How many pages of each block every donor gives ``[D, C]`` and every shard takes ``[S, C]``."""
    loads_S = owned_SC.sum(axis=1)
    nobodys_C = num_row_pages - owned_SC.sum(axis=0)
    quota_S = quotas(loads_S, num_units=num_row_pages * owned_SC.shape[1])
    left_DC = np.concatenate([owned_SC, nobodys_C[None]])
    excess_D = np.append(np.maximum(loads_S - quota_S, 0), nobodys_C.sum())
    need_S = np.maximum(quota_S - loads_S, 0)
    given_DC = np.zeros_like(left_DC)
    taken_SC = np.zeros_like(owned_SC)
    # First every gift that makes the pairs fewer, then those that keep their number, then the others.
    for most_new_pairs in (-1, 0, 1):
        for donor in np.flatnonzero(excess_D):
            while excess_D[donor]:
                new_pairs, amount, shard, block = _best_gift(
                    left_DC[donor], excess=int(excess_D[donor]), need_S=need_S, owned_SC=owned_SC + taken_SC
                )
                if new_pairs > most_new_pairs:
                    break
                left_DC[donor, block] -= amount
                given_DC[donor, block] += amount
                excess_D[donor] -= amount
                taken_SC[shard, block] += amount
                need_S[shard] -= amount
    return given_DC, taken_SC


def _best_gift(
    left_C: Int64Array, *, excess: int, need_S: Int64Array, owned_SC: Int64Array
) -> tuple[int, int, int, int]:
    """One donor's best next gift: (pairs it adds: -1, 0 or 1, pages, to which shard, of which block)."""
    shards, blocks = np.flatnonzero(need_S), np.flatnonzero(left_C)
    need, left = need_S[shards][:, None], left_C[blocks][None, :]
    amount = np.minimum(np.minimum(need, left), excess)
    new_pairs = (owned_SC[np.ix_(shards, blocks)] == 0).astype(np.int64) - (amount == left)
    # Whole holdings: the largest first. Parts: the smallest need from the smallest holding leaves the fewest.
    unit = int(left.max()) + 1
    size = np.where(new_pairs > 0, amount * unit + left, -amount * unit)
    best = int((new_pairs * (4 * unit * unit) + size).argmin())
    i, j = divmod(best, blocks.size)
    return int(new_pairs[i, j]), int(amount[i, j]), int(shards[i]), int(blocks[j])


def _changes(
    runs: Runs, *, block: int, given_D: Int64Array, taken_S: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Ranges of row pages of one block that change their owner, ascending: (first, last + 1, new owner)."""
    # A donor gives its last row pages of the block, always: so the cuts of several blocks tend to coincide.
    donor_R = runs.owners_RC[:, block].astype(np.int64) % given_D.size  # -1, nobody, is the last donor
    order = np.argsort(donor_R, kind="stable")
    lengths = runs.lengths
    after_last = np.cumsum(lengths[order])
    donor_end = np.cumsum(np.bincount(donor_R, weights=lengths, minlength=given_D.size)).astype(np.int64)
    freed_R = np.zeros_like(lengths)
    freed_R[order] = np.clip(given_D[donor_R[order]] - (donor_end[donor_R[order]] - after_last), 0, lengths[order])

    freed = np.flatnonzero(freed_R)
    freed_ends = np.cumsum(freed_R[freed])
    taken_ends = np.cumsum(taken_S)
    ends = np.union1d(freed_ends, taken_ends[taken_ends > 0])
    begins = np.concatenate([[0], ends[:-1]])
    run = np.searchsorted(freed_ends, begins, side="right")
    start = runs.starts[freed[run] + 1] - freed_ends[run] + begins
    return start, start + (ends - begins), np.searchsorted(taken_ends, begins, side="right")
