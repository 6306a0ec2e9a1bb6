"""Forks in a snapshot: what of their pages is other than in the table that they are forks of, so that they share again.

A fork's row that is as that table's is not written: its memory stays that table's.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from mempool.journal import Snapshots
from mempool.shard.durable.pages import Places, Rows, page_key
from mempool.shard.hosted import HostedTable
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.named_arrays import Blocks

_PIECE_BYTES = 2**30
Forks = dict[int, HostedTable]
"""Of each fork whose family is here: the table that it is to share with."""


def forks_of(tables: Mapping[int, HostedTable]) -> Forks:
    """The forks among these tables, each after what it shares with: the table that it is a fork of; where that is gone,
    the first fork of it."""
    found: Forks = {}
    for table_id, table in sorted(tables.items()):
        if table.fork_of is None or table.storage.num_lost:
            continue
        family = [other for other in sorted(tables) if other < table_id and tables[other].fork_of == table.fork_of]
        base = tables.get(table.fork_of) or next((tables[other] for other in family), None)
        if base is not None and base.table_id < table_id and not base.storage.num_lost:
            found[table_id] = base
    return found


def restore_forks(
    snapshots: Snapshots, tables: Mapping[int, HostedTable], forks: Forks, rows: Rows
) -> dict[Arena, int]:
    """Place and fill the pages of forks, once those of all other tables are filled. Returns each arena with its
    ``writes`` then.

    Raises:
        DataLoss: A page is damaged.
        InvalidRequest: There is not so much memory.
    """
    filled: dict[Arena, int] = {}
    for table_id, base in forks.items():
        table = tables[table_id]
        places: Places = {}
        for (of, blocks), row_pages in rows.items():
            if of == table_id:
                places |= _place(snapshots, table, base, blocks, row_pages)
        for key, arrays in snapshots.pages(places):
            arena, place = places[key]
            _fill(arena, place, arrays)
        filled |= {arena: arena.writes for arena in table.storage.arenas.values()}
    return filled


def _place(
    snapshots: Snapshots, table: HostedTable, base: HostedTable, blocks: Blocks, row_pages: npt.NDArray[np.int64]
) -> Places:
    """Where the pages lie, of those that may be other than what lies there."""
    storage = table.storage
    lender = base.storage.arenas.get(blocks)
    if lender is None or not np.array_equal(np.flatnonzero(lender.page_of >= 0), row_pages):  # one of them has moved
        arena = storage.arena(blocks)
        taken = arena.take(len(row_pages))
        arena.publish(row_pages, taken)
    else:
        while lender.share(_PIECE_BYTES):
            pass
        arrays = tuple(storage.arrays.values())
        arena = Arena(schema=storage.schema, blocks=blocks, arrays=arrays, device=storage.device, of=lender)
        storage.arenas[blocks] = arena
    assert snapshots.newest is not None, "its pages are placed"
    pages = snapshots.newest.pages
    keys = {row_page: page_key(table.table_id, row_page, blocks) for row_page in row_pages.tolist()}
    return {
        key: (arena, int(arena.page_of[row_page]))
        for row_page, key in keys.items()
        if arena.forked is None or pages[key] != pages[page_key(base.table_id, row_page, blocks)]
    }


def _fill(arena: Arena, place: int, arrays: Mapping[str, memoryview]) -> None:
    """Write the rows of an arena's page that are other than those of these bytes."""
    stored = {name: pages[place].view(torch.uint8) for name, pages in arena.raw.items() if pages.shape[2]}
    read = {name: np.frombuffer(arrays[name], dtype=np.uint8).reshape(rows.shape) for name, rows in stored.items()}
    if arena.forked is None:
        other = np.arange(len(next(iter(read.values()))))
    else:
        other = np.flatnonzero(
            np.any([_other(read[name], rows.cpu().numpy()) for name, rows in stored.items()], axis=0)
        )
    if len(other):
        rows = torch.from_numpy(other).to(arena.device)
        with arena.writing(rows + place * len(next(iter(read.values())))):
            for name, found in read.items():
                stored[name][rows] = torch.from_numpy(found[other]).to(arena.device)


def _other(one: npt.NDArray[np.uint8], two: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which rows are not the same."""
    wide = np.uint64 if not one.shape[1] % 8 else np.uint8
    found: npt.NDArray[np.bool_] = (one.view(wide) != two.view(wide)).any(axis=1)
    return found
