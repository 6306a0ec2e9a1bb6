"""What a shard says of how often its slots are used: a tally of some row pages at a time."""

import numpy as np
import torch

from mempool.errors import InvalidRequest
from mempool.shard.pages.named_arrays import LAST_USE, USES
from mempool.shard.pages.storage import Storage
from mempool.types.usage import Tally

_AT_ONCE = 2**16
"""Slots, about: a millisecond or two."""


def count_pieces(table: Storage) -> list[range]:
    """The row pages of the table, here or not, some at a time.

    Raises:
        InvalidRequest: It counts no uses.
    """
    schema = table.schema
    if not schema.usage:
        raise InvalidRequest(
            f"table {schema.name!r} does not count how often its slots are used; make it with usage=True. Nothing was "
            "changed."
        )
    step = max(1, _AT_ONCE >> schema.page_shift)
    here = np.flatnonzero(table.owned[:, 0])
    if not len(here):
        return []
    first, end = int(here[0]), int(here[-1]) + 1
    return [range(start, min(start + step, end)) for start in range(first, end, step)]


def tallied(table: Storage, row_pages: range, *, version: int, older_than: int) -> Tally:
    """Of the slots of these pages that are here."""
    schema, tally = table.schema, Tally.none()
    for lane in table.lanes:
        arena = lane.arena
        if not arena.has(USES):
            continue
        pages = row_pages.start + np.flatnonzero(arena.page_of[row_pages.start : row_pages.stop] >= 0)
        slots = ((pages[:, None] << schema.page_shift) + np.arange(schema.page_slots)).reshape(-1)
        rows = arena.locate(torch.from_numpy(slots[slots < schema.num_slots]).to(arena.device))[1]
        uses, last_use = (arena.stores[name].view(-1)[rows].cpu().numpy() for name in (USES, LAST_USE))
        before = max(0, version - older_than + 1) if older_than else 0
        tally += Tally.of(uses, last_use, before=before)
    return tally
