"""The plan of moves from one assignment to another, cut into rounds of bounded size: arrays, whatever their number.

Pure: who sends the bytes, and when the epoch rises, is left to the controller.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mempool.errors import InvalidRequest
from mempool.placement.assignment import Assignment, Int32Array

__all__ = ["Moves", "apply_moves", "moves", "rounds"]

Int64Array = npt.NDArray[np.int64]


def _none() -> Int64Array:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moves:
    """Pages that change their owner: the i-th goes from shard ``sources[i]`` to shard ``dests[i]``.

    Attributes:
        row_pages, blocks, sources, dests: [M] int64, by row page, then block.
        heads, key_sources, key_dests: [K] int64, key pages by head.
    """

    row_pages: Int64Array = field(default_factory=_none)
    blocks: Int64Array = field(default_factory=_none)
    sources: Int64Array = field(default_factory=_none)
    dests: Int64Array = field(default_factory=_none)
    heads: Int64Array = field(default_factory=_none)
    key_sources: Int64Array = field(default_factory=_none)
    key_dests: Int64Array = field(default_factory=_none)

    @property
    def num_pages(self) -> int:
        """Pages that move, key pages too."""
        return self.row_pages.size + self.heads.size

    def part(self, pages: slice, keys: slice) -> "Moves":
        """Some of these moves."""
        return Moves(
            row_pages=self.row_pages[pages],
            blocks=self.blocks[pages],
            sources=self.sources[pages],
            dests=self.dests[pages],
            heads=self.heads[keys],
            key_sources=self.key_sources[keys],
            key_dests=self.key_dests[keys],
        )


def moves(present: Assignment, target: Assignment) -> Moves:
    """Every page whose owner differs, by row page and then block, so that ranges of row pages go together.

    Raises:
        InvalidRequest: the two are of different tables: their numbers of pages differ.
    """
    if present.owners.shape != target.owners.shape or present.key_owners.shape != target.key_owners.shape:
        raise InvalidRequest(
            f"present has {present.owners.shape} pages and {present.num_key_pages} key pages, target "
            f"{target.owners.shape} and {target.num_key_pages}: they are not of the same table."
        )
    row_page, block = np.nonzero(present.owners != target.owners)
    head = np.flatnonzero(present.key_owners != target.key_owners)
    return Moves(
        row_pages=row_page.astype(np.int64, copy=False),
        blocks=block.astype(np.int64, copy=False),
        sources=present.owners[row_page, block].astype(np.int64),
        dests=target.owners[row_page, block].astype(np.int64),
        heads=head.astype(np.int64, copy=False),
        key_sources=present.key_owners[head].astype(np.int64),
        key_dests=target.key_owners[head].astype(np.int64),
    )


def rounds(
    moves: Moves, *, page_bytes: int, max_bytes: int | Callable[[], int], key_page_bytes: int | None = None
) -> Iterator[Moves]:
    """Cuts moves into rounds of at most ``max_bytes``; row pages first, then the key pages.

    The moves of one row page stay together, so that a round is never of less than one row page (or one key page), even
    where that alone is more than ``max_bytes``. Each round is carried out together, between two epochs.

    Args:
        moves: by row page, then block, as the function ``moves`` gives them.
        page_bytes: bytes of one page with everything it holds.
        max_bytes: most bytes of a round; a function is asked before each, so that it may follow what was measured.
        key_page_bytes: bytes of one key page; None takes it to be as large as any other page.

    Raises:
        InvalidRequest: a number of bytes is below 1.
    """
    key_bytes = page_bytes if key_page_bytes is None else key_page_bytes
    most = max_bytes if callable(max_bytes) else None
    fixed = 1 if callable(max_bytes) else max_bytes
    for name, value in (("page_bytes", page_bytes), ("max_bytes", fixed), ("key_page_bytes", key_bytes)):
        if value < 1:
            raise InvalidRequest(f"{name} = {value}: must be at least 1.")
    return _rounds(moves, page_bytes, key_bytes, most or (lambda: fixed))


def _rounds(moves: Moves, page_bytes: int, key_bytes: int, most: Callable[[], int]) -> Iterator[Moves]:
    num_pages, num_keys = moves.row_pages.size, moves.heads.size
    # Groups that stay together: the moves of one row page, then each key page. Where each ends, and in bytes.
    group_ends = np.flatnonzero(np.diff(moves.row_pages, append=-1)) + 1
    bytes_ends = np.concatenate(
        [group_ends * page_bytes, num_pages * page_bytes + np.arange(1, num_keys + 1) * key_bytes]
    ).astype(np.int64)
    pages_at = np.concatenate([group_ends, np.full(num_keys, num_pages)]).astype(np.int64)
    done = page = key = 0
    while done < bytes_ends.size:
        begun = int(bytes_ends[done - 1]) if done else 0
        done = max(done + 1, int(np.searchsorted(bytes_ends, begun + most(), side="right")))
        page_end, key_end = int(pages_at[done - 1]), max(done - group_ends.size, 0)
        yield moves.part(slice(page, page_end), slice(key, key_end))
        page, key = page_end, key_end


def apply_moves(assignment: Assignment, moves: Moves) -> Assignment:
    """The assignment after these moves; the one given is not changed.

    Raises:
        InvalidRequest: a move's page does not exist, or is not owned by the move's source.
    """
    owners, key_owners = assignment.owners.copy(), assignment.key_owners.copy()
    _apply(owners, (moves.row_pages, moves.blocks), moves.sources, moves.dests, what="page")
    _apply(key_owners, (moves.heads,), moves.key_sources, moves.key_dests, what="key page")
    owners.flags.writeable = False
    return Assignment(owners=owners, key_owners=key_owners)


def _apply(
    owners: Int32Array, places: tuple[Int64Array, ...], sources: Int64Array, dests: Int64Array, *, what: str
) -> None:
    if not sources.size:
        return

    def place(number: Any) -> tuple[int, ...]:
        return tuple(int(axis[number]) for axis in places)

    outside = np.zeros(sources.shape, dtype=np.bool_)
    for axis, size in zip(places, owners.shape, strict=True):
        outside |= (axis < 0) | (axis >= size)
    if outside.any():
        raise InvalidRequest(
            f"a move names {what} {place(outside.argmax())}, which does not exist: the table has {owners.shape}."
        )
    found = owners[places]
    wrong = found != sources
    if wrong.any():
        first = int(wrong.argmax())
        raise InvalidRequest(
            f"a move takes {what} {place(first)} from shard {sources[first]}, but shard {found[first]} owns it; "
            "plan the moves again from the present assignment."
        )
    owners[places] = dests
