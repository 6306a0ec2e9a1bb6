"""Pulling pages from their present owner, in batches that hold up neither shard for long."""

from collections.abc import Awaitable, Callable

import numpy as np
import numpy.typing as npt

from mempool.errors import Internal
from mempool.shard.arena import pieces
from mempool.types import ExportPages, PageBatch, PullPages, PullReport, ShardHost


async def pull(
    request: PullPages, *, source: ShardHost, page_bytes: int, stage: Callable[[PageBatch], Awaitable[int]]
) -> PullReport:
    """Read the pages of ``request`` from ``source`` and stage them.

    Args:
        request: What to pull.
        source: The shard that owns the pages.
        page_bytes: Bytes of one row page with the blocks asked for; a batch is about 16 MiB.
        stage: Stages a batch and returns its bytes.

    Raises:
        Internal: The source answered other pages than it was asked for.
    """
    batches = [_export(request, rows=request.row_pages[piece]) for piece in pieces(len(request.row_pages), page_bytes)]
    batches += [_export(request, head=head) for head in request.key_pages]
    num_bytes = 0
    for asked in batches:
        batch = await source.export_pages(asked)
        if (
            batch.table_id != asked.table_id
            or not np.array_equal(batch.row_pages, asked.row_pages)
            or (batch.blocks, batch.key_pages) != (asked.blocks, asked.key_pages)
        ):
            raise Internal(f"shard {request.source.shard} answered other pages than it was asked for")
        num_bytes += await stage(batch)
    pages = len(request.row_pages) * len(request.blocks) + len(request.key_pages)
    return PullReport(pages=pages, num_bytes=num_bytes)


def _export(request: PullPages, *, rows: npt.NDArray[np.int64] | None = None, head: int | None = None) -> ExportPages:
    return ExportPages(
        table_id=request.table_id,
        row_pages=np.empty(0, dtype=np.int64) if rows is None else rows,
        blocks=() if rows is None else request.blocks,
        key_pages=() if head is None else (head,),
    )
