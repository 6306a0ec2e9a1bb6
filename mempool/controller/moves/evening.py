"""The heat of a table's pages, of what its shards say of them, and what a plan makes of the shards' load: pure."""

from collections.abc import Iterable, Sequence

import numpy as np

from mempool.placement.assignment import Int32Array
from mempool.placement.heat import FloatArray
from mempool.types import PageHeat, ShardLoad, TableSchema, TableView
from mempool.types.schema import ELEMENT_BYTES

LEAST_SEEN = 4096
"""Pairs for each owner, of which fewer tell nothing: a share of so many is known to a few per cent."""


def heat_of(view: TableView, told: Iterable[PageHeat]) -> FloatArray | None:
    """The heat of each row page [P]; None where too few pairs were seen to tell.

    Args:
        view: The table.
        told: What shards say of it, in whatever order: also those that have had pages of it, as a page that has moved
            lately was counted there.
    """
    owners = view.placement.owners
    told = [each for each in told if each.heat.shape == owners.shape[:1]]
    if sum(each.seen for each in told) < LEAST_SEEN * len(view.placement.shards):
        return None
    heat = np.sum([each.heat.astype(np.float64) for each in told], axis=0)
    if not np.isfinite(heat).all() or (heat < 0).any():
        return None
    # A pair is asked of every shard that owns any block of its row page, and is counted at each.
    in_order = np.sort(owners, axis=1)
    counted: FloatArray = heat / (1 + (np.diff(in_order, axis=1) != 0).sum(axis=1))
    return counted


def loads_of(plans: Sequence[tuple[TableSchema, FloatArray, Int32Array, Int32Array]]) -> tuple[ShardLoad, ...]:
    """Each shard's part of the load, before and after, ascending by shard; () where nothing was read or written.

    Args:
        plans: Of each table whose heat is known: its schema, the heat of its row pages, their owners before and after.
    """
    loads: dict[int, list[float]] = {}
    for schema, heat, *both in plans:
        columns = [schema.block_columns(block) for block in range(schema.num_blocks)]
        bytes_C = np.array([(stop - start) * ELEMENT_BYTES[schema.dtype] for start, stop in columns], dtype=np.float64)
        for moment, owners in enumerate(both):
            shards, place = np.unique(owners, return_inverse=True)
            load = np.bincount(place.reshape(-1), weights=np.outer(heat, bytes_C).reshape(-1), minlength=shards.size)
            for shard, bytes_read in zip(shards.tolist(), load.tolist(), strict=True):
                loads.setdefault(shard, [0.0, 0.0])[moment] += bytes_read
    whole = sum(before for before, _ in loads.values())
    if not whole:
        return ()
    return tuple(
        ShardLoad(shard=shard, before=before / whole, after=after / whole)
        for shard, (before, after) in sorted(loads.items())
    )
