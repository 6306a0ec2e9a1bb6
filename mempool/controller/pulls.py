"""From the moves of a round to the pulls that its destinations are asked for: pure, and linear in the pages."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mempool.placement import Moves
from mempool.types import PullPages, TableView

Int64Array = npt.NDArray[np.int64]

_WORD = 64


def pulls(view: TableView, moves: Moves) -> list[tuple[int, list[PullPages]]]:
    """By destination, ascending: row pages that come in the same blocks from the same source are one pull."""
    info_of = {info.shard: info for info in view.shards}
    found: dict[int, list[PullPages]] = defaultdict(list)
    for dest, source, row_pages, blocks in _row_page_pulls(moves):
        found[dest].append(
            PullPages(table_id=view.schema.table_id, source=info_of[source], row_pages=row_pages, blocks=blocks)
        )
    order = np.lexsort((moves.heads, moves.key_sources, moves.key_dests))
    dests, sources, heads = moves.key_dests[order], moves.key_sources[order], moves.heads[order]
    for begin, end in _runs(dests, sources):
        found[int(dests[begin])].append(
            PullPages(
                table_id=view.schema.table_id,
                source=info_of[int(sources[begin])],
                row_pages=np.empty(0, dtype=np.int64),
                blocks=(),
                key_pages=tuple(heads[begin:end].tolist()),
            )
        )
    return sorted(found.items())


def pull_of_decisions(view: TableView) -> PullPages:
    """For the shard that is to be the table's gate: what the present one decided, as steps of other tables may be in
    doubt of it."""
    source = view.shard_info(view.placement.shards[0])
    return PullPages(table_id=view.schema.table_id, source=source, row_pages=np.empty(0, dtype=np.int64), blocks=())


def _row_page_pulls(moves: Moves) -> Iterator[tuple[int, int, Int64Array, tuple[int, ...]]]:
    """(destination, source, row pages ascending, blocks ascending)."""
    if not moves.row_pages.size:
        return
    order = np.lexsort((moves.blocks, moves.row_pages, moves.sources, moves.dests))
    dests, sources = moves.dests[order], moves.sources[order]
    row_pages, blocks = moves.row_pages[order], moves.blocks[order]
    # One entry for each row page that goes one way, with its blocks as bits of some words.
    begins = np.array([begin for begin, _ in _runs(dests, sources, row_pages)], dtype=np.int64)
    bits = np.uint64(1) << (blocks % _WORD).astype(np.uint64)
    words = [
        np.bitwise_or.reduceat(np.where(blocks // _WORD == word, bits, np.uint64(0)), begins)
        for word in range(int(blocks.max()) // _WORD + 1)
    ]
    dests, sources, pages = dests[begins], sources[begins], row_pages[begins]
    sizes = np.diff(begins, append=order.size)
    together = np.lexsort((pages, *words, sources, dests))
    dests, sources, pages = dests[together], sources[together], pages[together]
    for begin, end in _runs(dests, sources, *(word[together] for word in words)):
        first = int(begins[together[begin]])
        named = blocks[first : first + int(sizes[together[begin]])]
        yield int(dests[begin]), int(sources[begin]), pages[begin:end].copy(), tuple(named.tolist())


def _runs(*columns: npt.NDArray[np.generic]) -> list[tuple[int, int]]:
    """Where neighbours are equal in every column: (first, one after the last)."""
    size = columns[0].size
    if not size:
        return []
    changed = np.zeros(size - 1, dtype=np.bool_)
    for column in columns:
        changed |= column[1:] != column[:-1]
    starts = [0, *(np.flatnonzero(changed) + 1).tolist()]
    return list(zip(starts, [*starts[1:], size], strict=True))
