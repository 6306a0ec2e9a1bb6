"""Owners as runs of equal row pages, so that planning costs by the number of cuts and not by the number of pages.

Shapes: P row pages, C column blocks, R runs, S shards.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mempool.placement.assignment import Int32Array

__all__ = ["Int64Array", "Runs", "compress", "count_pages", "distinct", "positions", "refine"]

Int64Array = npt.NDArray[np.int64]

_CHUNK_ROWS = 8192
_MAX_TABLE_ID = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Row pages ``starts[i]`` to ``starts[i + 1]`` have the owners ``owners_RC[i]``.

    ``starts`` is ``[R + 1]`` int64, strictly ascending from 0 to P. Neighbouring runs may be equal.
    """

    starts: Int64Array
    owners_RC: Int32Array

    @property
    def lengths(self) -> Int64Array:
        return np.diff(self.starts)

    @property
    def num_row_pages(self) -> int:
        return int(self.starts[-1])

    def expand(self) -> Int32Array:
        """The owners of every row page, ``[P, C]``."""
        return np.repeat(self.owners_RC, self.lengths, axis=0)


def compress(owners_PC: Int32Array) -> Runs:
    """Joins neighbouring row pages with the same owners into runs."""
    num_row_pages = owners_PC.shape[0]
    changed = np.zeros(num_row_pages, dtype=np.bool_)
    changed[0] = True
    # In chunks, so that the comparison stays in the processor's cache.
    for begin in range(1, num_row_pages, _CHUNK_ROWS):
        end = min(begin + _CHUNK_ROWS, num_row_pages)
        changed[begin:end] = (owners_PC[begin:end] != owners_PC[begin - 1 : end - 1]).any(axis=1)
    first = np.flatnonzero(changed)
    starts = np.append(first, num_row_pages).astype(np.int64)
    return Runs(starts=starts, owners_RC=owners_PC[first])


def refine(runs: Runs, cuts: Int64Array) -> Runs:
    """The same owners, with a run starting at every one of ``cuts`` as well."""
    starts = np.union1d(runs.starts, cuts)
    source = np.searchsorted(runs.starts, starts[:-1], side="right") - 1
    return Runs(starts=starts, owners_RC=runs.owners_RC[source])


def positions(owners: Int32Array, *, ids: Int32Array) -> Int32Array:
    """Positions of owners in the ascending ``ids``, in the same shape; -1 for owners that are not there."""
    highest = max(int(ids[-1]), int(owners.max(initial=0)))
    if highest < _MAX_TABLE_ID:  # a look-up is several times faster than a search
        position_of = np.full(highest + 1, -1, dtype=np.int32)
        position_of[ids] = np.arange(ids.size)
        return position_of[owners]
    position = np.minimum(np.searchsorted(ids, owners), ids.size - 1).astype(np.int32)
    position[ids[position] != owners] = -1
    return position


def distinct(runs: Runs) -> Int32Array:
    """The shard ids that own anything, ascending."""
    chunks = range(0, len(runs.owners_RC), _CHUNK_ROWS)
    return np.unique(np.concatenate([np.unique(runs.owners_RC[begin : begin + _CHUNK_ROWS]) for begin in chunks]))


def count_pages(runs: Runs, *, num_shards: int) -> Int64Array:
    """Pages by shard and block, ``[S, C]``; owners are indices below ``num_shards``, -1 counts for nobody."""
    num_blocks = runs.owners_RC.shape[1]
    lengths = runs.lengths
    counts = np.zeros((num_shards + 1) * num_blocks, dtype=np.int64)
    for begin in range(0, len(runs.owners_RC), _CHUNK_ROWS):
        chunk = slice(begin, begin + _CHUNK_ROWS)
        cell = (runs.owners_RC[chunk].astype(np.int64) + 1) * num_blocks + np.arange(num_blocks)
        weights = np.broadcast_to(lengths[chunk, None], cell.shape)
        counts += np.bincount(cell.ravel(), weights=weights.ravel(), minlength=counts.size).astype(np.int64)
    return counts.reshape(num_shards + 1, num_blocks)[1:]
