"""Masks of pages: which (row page, block)s, as a shard owns, lacks or stages them, grouped by the blocks of a page."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mempool.shard.pages.named_arrays import Blocks

Mask = npt.NDArray[np.bool_]
"""[P, num_blocks]: row pages by blocks."""

RowPages = npt.NDArray[np.int64]


def by_blocks(mask: Mask) -> dict[Blocks, RowPages]:
    """Row pages by their set of blocks, those of no block under (); ascending. Linear where neighbours are alike."""
    if not mask.size:
        return {}
    # Owners change seldom from one row page to the next: only one of each run of pages that are alike is sorted.
    starts = np.append(0, np.flatnonzero((mask[1:] != mask[:-1]).any(axis=1)) + 1)
    patterns, group = np.unique(np.packbits(mask[starts], axis=1), axis=0, return_inverse=True)
    group_of = np.repeat(group.reshape(-1), np.diff(np.append(starts, len(mask))))
    order = np.argsort(group_of, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(group_of, minlength=len(patterns)))[:-1])
    masks = np.unpackbits(patterns, axis=1, count=mask.shape[1])
    return {tuple(np.flatnonzero(blocks).tolist()): part for blocks, part in zip(masks, parts, strict=True)}


def cells(row_pages: Iterable[int] | RowPages, blocks: Blocks) -> tuple[npt.NDArray[np.int64], ...]:
    """Index of all (row page, block)s of these."""
    return np.ix_(np.fromiter(row_pages, dtype=np.int64), np.array(blocks, dtype=np.int64))


def runs(row_pages: RowPages) -> list[RowPages]:
    """Ascending row pages, cut where they are not neighbours."""
    return np.split(row_pages, np.flatnonzero(np.diff(row_pages) != 1) + 1)
