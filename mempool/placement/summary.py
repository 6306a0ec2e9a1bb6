"""An assignment in a few lines for people: pages and blocks of every shard, and the kind of layout it turned out as."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mempool.placement.assignment import Assignment, Int32Array
from mempool.placement.runs import Int64Array, Runs, compress, count_pages, distinct, positions

__all__ = ["LayoutKind", "ShardSummary", "describe", "layout_kind"]

LayoutKind = Literal["columns", "rows", "grid", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSummary:
    """One line of the table that ``describe`` makes.

    Attributes:
        pages: (row page, block) pages the shard owns.
        share: those pages over all pages of the table, 0 to 1.
        blocks: the blocks it owns pages of, as text: ``"0-2, 5 (40%)"`` is all of blocks 0 to 2 and 40 % of block 5.
        key_pages: key pages it owns.
        layout: the kind of layout of the whole assignment, see ``layout_kind``.
    """

    shard: int
    pages: int
    share: float
    blocks: str
    key_pages: int
    layout: LayoutKind


def describe(assignment: Assignment, *, shards: Sequence[int] = ()) -> list[ShardSummary]:
    """One line for every shard that owns something and for every one of ``shards``, by shard id ascending."""
    runs, ids = _indexed(assignment, shards=shards)
    pages_SC = count_pages(runs, num_shards=ids.size)
    kind = _kind(runs, pages_SC)
    return [
        ShardSummary(
            shard=shard,
            pages=int(pages_C.sum()),
            share=int(pages_C.sum()) / assignment.owners.size,
            blocks=_blocks_text(pages_C, num_row_pages=assignment.num_row_pages),
            key_pages=int((assignment.key_owners == shard).sum()),
            layout=kind,
        )
        for shard, pages_C in zip(ids.tolist(), pages_SC, strict=True)
    ]


def layout_kind(assignment: Assignment) -> LayoutKind:
    """What the assignment is, whatever layout was asked for.

    The first that fits of ``columns``: every block has one owner; ``rows``: every row page has one owner; ``grid``:
    blocks that share an owner have the same owner in every row page; ``mixed``.
    """
    runs, ids = _indexed(assignment, shards=())
    return _kind(runs, count_pages(runs, num_shards=ids.size))


def _indexed(assignment: Assignment, *, shards: Sequence[int]) -> tuple[Runs, Int32Array]:
    runs = compress(assignment.owners)
    named = np.array(shards, dtype=np.int32)
    ids = np.unique(np.concatenate([distinct(runs), assignment.key_owners, named]))
    return Runs(starts=runs.starts, owners_RC=positions(runs.owners_RC, ids=ids)), ids


def _kind(runs: Runs, pages_SC: Int64Array) -> LayoutKind:
    owners_RC = runs.owners_RC
    if len(owners_RC) == 1 or (owners_RC == owners_RC[:1]).all():
        return "columns"
    if (owners_RC == owners_RC[:, :1]).all():
        return "rows"
    # A grid: blocks that share an owner have the same owner in every row page.
    for pages_C in pages_SC:
        blocks = np.flatnonzero(pages_C)
        if blocks.size and (owners_RC[:, blocks] != owners_RC[:, blocks[:1]]).any():
            return "mixed"
    return "grid"


def _blocks_text(pages_C: Int64Array, *, num_row_pages: int) -> str:
    parts: list[str] = []
    block = 0
    while block < pages_C.size:
        last = block
        while last + 1 < pages_C.size and pages_C[last + 1] == pages_C[block]:
            last += 1
        if pages_C[block]:
            name = f"{block}-{last}" if last > block else f"{block}"
            part = "" if pages_C[block] == num_row_pages else f" ({pages_C[block] / num_row_pages:.0%})"
            parts.append(name + part)
        block = last + 1
    return ", ".join(parts)
