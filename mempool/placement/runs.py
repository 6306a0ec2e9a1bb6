"""Owners as runs of equal row pages, so that planning costs by the number of cuts and not by the number of pages.

Shapes: P row pages, C column blocks, R runs, S shards.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mempool.placement.assignment import Int32Array

__all__ = ["Int64Array", "Runs", "compress", "count_pages", "refine"]

Int64Array = npt.NDArray[np.int64]

_CHUNK_ROWS = 8192


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


def count_pages(runs: Runs, *, num_shards: int) -> Int64Array:
    """Pages by shard and block, ``[S, C]``; owners are indices below ``num_shards``, -1 counts for nobody."""
    num_blocks = runs.owners_RC.shape[1]
    cell = (runs.owners_RC.astype(np.int64) + 1) * num_blocks + np.arange(num_blocks)
    weights = np.broadcast_to(runs.lengths[:, None], cell.shape)
    counts = np.bincount(cell.ravel(), weights=weights.ravel(), minlength=(num_shards + 1) * num_blocks)
    return counts.astype(np.int64).reshape(num_shards + 1, num_blocks)[1:]
