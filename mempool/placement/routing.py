"""What a client has to know of an assignment to send each shard no more than it needs.

Shapes: P row pages, C column blocks, R runs of row pages, S shards.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mempool.placement.assignment import Assignment
from mempool.placement.runs import Runs, compress, count_pages, distinct, positions

__all__ = ["Route", "routes"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Route:
    """What one shard answers of a gather.

    Attributes:
        blocks: the blocks of which the shard owns any page, ascending; its reply holds these.
        row_mask: ``[P]`` bool, the row pages of which it owns any block: pairs of other row pages need not be sent.
            None where that is every row page, as it is where ``sole`` is not empty: it needs all pairs. Read-only.
        sole: those of ``blocks`` of which it owns every row page, so that its answer is the sum; the answers for its
            other blocks are partial sums, to be added over shards.
    """

    blocks: tuple[int, ...]
    row_mask: npt.NDArray[np.bool_] | None
    sole: tuple[int, ...]


def routes(assignment: Assignment) -> dict[int, Route]:
    """The route of every shard that owns a page, by shard id ascending; owners of key pages alone have none."""
    runs = compress(assignment.owners)
    ids = distinct(runs)
    index_RC = positions(runs.owners_RC, ids=ids)
    runs = Runs(starts=runs.starts, owners_RC=index_RC)
    pages_SC = count_pages(runs, num_shards=ids.size)
    needs_SR = np.zeros((ids.size, len(index_RC)), dtype=np.bool_)
    every_run = np.arange(len(index_RC))
    for block in range(assignment.num_blocks):
        needs_SR[index_RC[:, block], every_run] = True

    result: dict[int, Route] = {}
    for position, shard in enumerate(ids.tolist()):
        row_mask = None if needs_SR[position].all() else np.repeat(needs_SR[position], runs.lengths)
        if row_mask is not None:
            row_mask.flags.writeable = False
        result[shard] = Route(
            blocks=tuple(np.flatnonzero(pages_SC[position]).tolist()),
            row_mask=row_mask,
            sole=tuple(np.flatnonzero(pages_SC[position] == runs.num_row_pages).tolist()),
        )
    return result
