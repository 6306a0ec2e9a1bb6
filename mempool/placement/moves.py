"""The plan of moves from one assignment to another, cut into rounds of bounded size.

Pure: who sends the bytes, and when the epoch rises, is left to ``control``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import numpy as np

from mempool.errors import InvalidRequest
from mempool.placement.assignment import Assignment, Int32Array

__all__ = ["KeyMove", "Move", "Round", "apply_round", "moves", "rounds"]


@dataclass(frozen=True, slots=True)
class Move:
    """The page (row_page, block) goes from shard ``source`` to shard ``dest``."""

    row_page: int
    block: int
    source: int
    dest: int


@dataclass(frozen=True, slots=True)
class KeyMove:
    """The key page of ``head`` goes from shard ``source`` to shard ``dest``."""

    head: int
    source: int
    dest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Moves carried out together, between two epochs; all moves of a row page are in the same round.

    Attributes:
        moves: by row page, then block.
        key_moves: by head.
        num_bytes: bytes of the pages that move.
    """

    moves: tuple[Move, ...]
    key_moves: tuple[KeyMove, ...]
    num_bytes: int

    @property
    def num_pages(self) -> int:
        """Pages that move, key pages too."""
        return len(self.moves) + len(self.key_moves)


def moves(present: Assignment, target: Assignment) -> list[Move | KeyMove]:
    """Every page whose owner differs, by row page and then block, so that ranges of row pages go together.

    Key pages follow, by head.

    Raises:
        InvalidRequest: the two are of different tables: their numbers of pages differ.
    """
    if present.owners.shape != target.owners.shape or present.key_owners.shape != target.key_owners.shape:
        raise InvalidRequest(
            f"present has {present.owners.shape} pages and {present.num_key_pages} key pages, target "
            f"{target.owners.shape} and {target.num_key_pages}: they are not of the same table."
        )
    row_page, block = np.nonzero(present.owners != target.owners)
    columns = (row_page, block, present.owners[row_page, block], target.owners[row_page, block])
    head = np.flatnonzero(present.key_owners != target.key_owners)
    key_columns = (head, present.key_owners[head], target.key_owners[head])
    return [
        *(Move(*fields) for fields in zip(*(column.tolist() for column in columns), strict=True)),
        *(KeyMove(*fields) for fields in zip(*(column.tolist() for column in key_columns), strict=True)),
    ]


def rounds(
    moves: Iterable[Move | KeyMove], *, page_bytes: int, max_bytes: int, key_page_bytes: int | None = None
) -> list[Round]:
    """Splits moves into rounds of at most ``max_bytes``; row pages ascending, then the key pages.

    The moves of one row page stay together, so that a round is never of less than one row page (or one key page), even
    where that alone is more than ``max_bytes``.

    Args:
        moves: in any order.
        page_bytes: bytes of one page with everything it holds.
        max_bytes: most bytes of a round.
        key_page_bytes: bytes of one key page; None takes it to be as large as any other page.

    Raises:
        InvalidRequest: a number of bytes is below 1.
    """
    key_bytes = page_bytes if key_page_bytes is None else key_page_bytes
    for name, value in (("page_bytes", page_bytes), ("max_bytes", max_bytes), ("key_page_bytes", key_bytes)):
        if value < 1:
            raise InvalidRequest(f"{name} = {value}: must be at least 1.")
    page_moves: list[Move] = []
    key_moves: list[KeyMove] = []
    for move in moves:
        if isinstance(move, KeyMove):
            key_moves.append(move)
        else:
            page_moves.append(move)
    page_moves.sort(key=attrgetter("row_page", "block"))
    key_moves.sort(key=attrgetter("head"))

    # (moves that stay together, their bytes), in order
    groups: list[tuple[list[Move], list[KeyMove], int]] = []
    for _, group in groupby(page_moves, key=attrgetter("row_page")):
        together = list(group)
        groups.append((together, [], len(together) * page_bytes))
    groups += [([], [move], key_bytes) for move in key_moves]

    batches: list[tuple[list[Move], list[KeyMove], int]] = []
    for pages, keys, num_bytes in groups:
        if batches and batches[-1][2] + num_bytes <= max_bytes:
            before = batches.pop()
            before[0].extend(pages)
            before[1].extend(keys)
            batches.append((before[0], before[1], before[2] + num_bytes))
        else:
            batches.append((pages, keys, num_bytes))
    return [Round(moves=tuple(pages), key_moves=tuple(keys), num_bytes=size) for pages, keys, size in batches]


def apply_round(assignment: Assignment, round: Round) -> Assignment:
    """The assignment after one round; the one given is not changed.

    Raises:
        InvalidRequest: a move's page does not exist, or is not owned by the move's source.
    """
    owners, key_owners = assignment.owners.copy(), assignment.key_owners.copy()
    _apply(owners, [((move.row_page, move.block), move.source, move.dest) for move in round.moves], what="page")
    _apply(key_owners, [((move.head,), move.source, move.dest) for move in round.key_moves], what="key page")
    owners.flags.writeable = False
    return Assignment(owners=owners, key_owners=key_owners)


def _apply(owners: Int32Array, steps: Sequence[tuple[tuple[int, ...], int, int]], *, what: str) -> None:
    if not steps:
        return
    places, sources, dests = zip(*steps, strict=True)
    index_NM = np.array(places, dtype=np.int64).T
    outside = (index_NM < 0) | (index_NM >= np.array(owners.shape)[:, None])
    if outside.any():
        place = places[int(outside.any(axis=0).argmax())]
        raise InvalidRequest(f"a move names {what} {place}, which does not exist: the table has {owners.shape}.")
    index = tuple(index_NM)
    found = owners[index]
    wrong = found != np.array(sources)
    if wrong.any():
        first = int(wrong.argmax())
        raise InvalidRequest(
            f"a move takes {what} {places[first]} from shard {sources[first]}, but shard {found[first]} owns it; "
            "plan the moves again from the present assignment."
        )
    owners[index] = dests
