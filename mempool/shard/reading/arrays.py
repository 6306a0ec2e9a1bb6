"""Rows of a pinned moment for gathers of arrays: as ``pinned``, of a table whose rows lie in one arena of the CPU."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mempool import kernels
from mempool.agreement.readers.pins import Moment
from mempool.shard.pages.storage import Storage

_Array = npt.NDArray[Any]


def rows_then(storage: Storage, moment: Moment, ids: _Array) -> tuple[kernels.Paged, _Array] | None:
    """Rows as they were at a moment, and the ids by which those of ``ids`` are found there.

    Args:
        storage: Of a table that has ``array_rows``.
        ids: [L] uint32 or int32 slot ids, none below 0, L at least 1, which nobody else writes to.

    Returns:
        The rows, where they lie if none of these was written to since, else copies; ids [L] of the same dtype. None
        where an id is no slot's, or its row is not here.
    """
    now, schema = storage.array_rows, storage.schema
    if now is None or ids.max() >= schema.num_slots:
        return None
    (arena,) = storage.arenas.values()
    pages = arena.page_of[ids >> schema.page_shift]
    if pages.min() < 0:
        return None
    rows = (pages.astype(np.int64) << schema.page_shift) | (ids & (schema.page_slots - 1))
    laid = storage.moments.kept(arena).values_at(moment.number, rows)
    if laid is None:
        return now, ids
    places = np.arange(len(ids), dtype=np.int32)
    return kernels.Paged(laid, torch.from_numpy(places), 0, now.packed), places.view(ids.dtype)
