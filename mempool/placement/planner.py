"""The planner of placement: a pure function from the present owners and the shards to the owners to be.

Decides only; ``moves`` turns the difference into moves, others carry them out.
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from mempool.errors import InvalidRequest
from mempool.placement.assignment import MAX_SHARD, Assignment, Int32Array
from mempool.placement.balance import assign, bounds
from mempool.placement.heat import FloatArray, even
from mempool.placement.layouts import by_columns, by_grid, by_rows
from mempool.placement.pages import by_pages
from mempool.placement.runs import Int64Array, Runs, compress, count_pages, positions
from mempool.types.schema import Layout

__all__ = ["plan"]


def plan(
    present: Assignment | None,
    shards: Sequence[int],
    *,
    num_row_pages: int,
    num_blocks: int,
    num_key_pages: int,
    layout: Layout,
    heat: FloatArray | None = None,
) -> Assignment:
    """Decides which of ``shards`` owns which page of a table.

    Wants, in this order: pages balanced to one unit of the layout, no shard with more than 5 % more heat than the mean,
    the fewest moves from the present, the fewest (shard, block) pairs. The same arguments give the same result,
    whatever the order of ``shards``.

    Layouts and their unit:
        columns: a block column. Pooled values are bitwise those of one shard. Where there are more shards than blocks
            the others own no row page. Fewest moves: exact.
        rows: a row page, all its blocks. From nothing, one contiguous range a shard. Fewest moves: exact up to 1,024
            kinds of row pages in the present, near to it above.
        grid: a row page of a column group. gcd(shards, blocks) column groups, each owned by its own shards by rows; so
            ``columns`` where the shards divide the blocks, ``rows`` where there is no common divisor. Near the fewest
            moves; none where the present is such a grid already.
        auto: ``columns`` where the shards divide the blocks. Otherwise one page: whole blocks first, the rest by rows;
            fewest moves: exact; few pairs: greedy.

    Key pages are balanced among the shards to one key page, with the fewest moves; of the choices left, those shards
    take one key page more that own the fewest pages of the table (with ``columns`` these may be shards that own none).

    Args:
        present: the owners now; shards that are not in ``shards`` lose everything. None for a new table.
        shards: ids of the shards to use, at least one, each once.
        num_row_pages: P, at least 1.
        num_blocks: C, at least 1.
        num_key_pages: H, 0 where the table has no key pages.
        layout: the layout the table asks for.
        heat: ``[P]`` how much each row page is read and written, in whatever unit; see ``heat.even`` for what it does.
            None, as with the same heat everywhere: only pages are balanced.

    Raises:
        InvalidRequest: no shard, a shard named twice, an unknown layout, a present of other numbers of pages, or heat
            that is not one finite number for each row page, none negative.

    Example:
        >>> plan(None, [0, 1], num_row_pages=3, num_blocks=2, num_key_pages=1, layout="columns").owners.tolist()
        [[0, 1], [0, 1], [0, 1]]
    """
    _check_sizes(num_row_pages=num_row_pages, num_blocks=num_blocks, num_key_pages=num_key_pages)
    if layout not in get_args(Layout):
        raise InvalidRequest(f"layout {layout!r} is unknown; choose one of {', '.join(get_args(Layout))}.")
    ids = _shard_ids(shards)
    if present is None:
        nobody = np.full((1, num_blocks), -1, dtype=np.int32)
        runs = Runs(starts=np.array([0, num_row_pages], dtype=np.int64), owners_RC=nobody)
        key_owner_H = np.full(num_key_pages, -1, dtype=np.int32)
    else:
        wanted = (num_row_pages, num_blocks, num_key_pages)
        if wanted != (present.num_row_pages, present.num_blocks, present.num_key_pages):
            raise InvalidRequest(
                f"the present has {present.num_row_pages} row pages, {present.num_blocks} blocks and "
                f"{present.num_key_pages} key pages, the table {wanted[0]}, {wanted[1]} and {wanted[2]}; "
                "plan with None to place a new table."
            )
        given = compress(present.owners)
        runs = Runs(starts=given.starts, owners_RC=positions(given.owners_RC, ids=ids))
        key_owner_H = positions(present.key_owners, ids=ids)

    target = _place(runs, num_shards=ids.size, layout=layout)
    if heat is not None:
        _check_heat(heat, num_row_pages=num_row_pages)
        evened = target.expand()
        even(evened, runs.expand(), heat, layout=layout, num_shards=ids.size)
        target = compress(evened)
    loads_S = count_pages(target, num_shards=ids.size).sum(axis=1)
    key_target_H = _place_keys(key_owner_H, loads_S=loads_S)
    owners = Runs(starts=target.starts, owners_RC=ids[target.owners_RC]).expand()
    owners.flags.writeable = False  # so that Assignment takes it without a copy
    return Assignment(owners=owners, key_owners=ids[key_target_H])


def _place(runs: Runs, *, num_shards: int, layout: Layout) -> Runs:
    if layout == "rows":
        return by_rows(runs, num_shards=num_shards)
    if layout == "grid":
        return by_grid(runs, num_shards=num_shards)
    if layout == "columns" or runs.owners_RC.shape[1] % num_shards == 0:
        return by_columns(runs, num_shards=num_shards)
    return by_pages(runs, num_shards=num_shards)


def _place_keys(owner_H: Int32Array, *, loads_S: Int64Array) -> Int64Array:
    """The shard of every key page ``[H]``: balanced, then the fewest moves, then where the loads are smallest."""
    num_shards = loads_S.size
    if not owner_H.size:
        return np.empty(0, dtype=np.int64)
    rank_S = np.unique(loads_S, return_inverse=True)[1].reshape(-1).astype(np.int64)
    # One move weighs more than all ranks together.
    move = owner_H.size * num_shards + 1
    keep_HS = (owner_H[:, None] == np.arange(num_shards)) * move - rank_S
    low, high = bounds(owner_H.size, num_shards)
    return assign(keep_HS, low=low, high=high)


def _shard_ids(shards: Sequence[int]) -> Int32Array:
    if not len(shards):
        raise InvalidRequest("shards is empty; a table needs at least one shard.")
    for shard in shards:
        if not 0 <= shard <= MAX_SHARD:
            raise InvalidRequest(f"shard id {shard} is out of range; shard ids are 0 .. {MAX_SHARD}.")
    ids = np.unique(np.array(shards, dtype=np.int32))
    if ids.size != len(shards):
        raise InvalidRequest(f"shards {list(shards)} names a shard twice; name each once.")
    return ids


def _check_heat(heat: FloatArray, *, num_row_pages: int) -> None:
    if heat.shape != (num_row_pages,):
        raise InvalidRequest(f"heat has shape {heat.shape}; expected one number for each of {num_row_pages} row pages.")
    wrong = heat[~(np.isfinite(heat) & (heat >= 0))]
    if wrong.size:
        raise InvalidRequest(f"heat holds {wrong[0]}; it is finite and not negative.")


def _check_sizes(*, num_row_pages: int, num_blocks: int, num_key_pages: int) -> None:
    if num_row_pages < 1 or num_blocks < 1 or num_key_pages < 0:
        raise InvalidRequest(
            f"{num_row_pages} row pages, {num_blocks} blocks, {num_key_pages} key pages: "
            "a table has at least one row page and one block, and no fewer than 0 key pages."
        )
