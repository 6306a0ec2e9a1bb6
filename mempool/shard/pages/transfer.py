"""Pages and what was applied to them, from one shard to another: read out here, fetched there, in bounded batches.

A pull holds one batch of about 16 MiB (or a single page) at a time, and neither shard is kept from others for longer.
"""

from collections.abc import Awaitable, Callable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mempool.agreement.ledger import MAX_ENTRIES, generations
from mempool.errors import DataLoss, Internal, InvalidRequest, StalePlacement
from mempool.shard.pages.arena import pieces
from mempool.shard.pages.masks import RowPages, cells
from mempool.shard.pages.named_arrays import HEAD_KEYS
from mempool.shard.pages.staging import check_pages
from mempool.shard.pages.storage import Storage
from mempool.types import (
    ExportLedger,
    ExportPages,
    Ledger,
    LedgerEntry,
    LedgerPart,
    PageBatch,
    PullPages,
    PullReport,
    ShardHost,
)

if TYPE_CHECKING:
    from mempool.shard.hosted import HostedTable

_PART_BYTES = 256 * 2**10
"""Of a ledger's entries that travel in one message, about."""

_ENTRY_BYTES = 24
"""Of an entry, besides its group's name."""
PULL_LEASE_S = 60.0
"""How long a shard that owns nothing yet keeps what it was sent for a round, unless more comes."""


def check_round(table: "HostedTable", token: str, *, join: bool = False) -> None:
    """Raises StalePlacement where a page goes, or comes (``join``), for a round that is not the present one."""
    table.let_go()
    if token:
        table.rounds.join(token, PULL_LEASE_S) if join else table.rounds.check(token)


def check_version(table: "HostedTable", version: int) -> None:
    """Raises StalePlacement where pages of a round come at another version than those that are here: in a round all
    owners stand still at one, or one of them has not applied what the others have."""
    here = table.ledger.version if table.owns else table.staging.version
    if here is not None and version != here:
        raise StalePlacement(
            f"pages of table {table.view.schema.name!r} come at version {version}, and shard {table.info.shard} has it "
            f"at {here}: the owner that is at the lower one has not applied a step that is decided. Nothing was "
            "changed; move them again once it has"
        )


def export(table: Storage, request: ExportPages, *, version: int) -> PageBatch:
    """Copy pages out, to the CPU. version: the table's.

    Raises:
        InvalidRequest: A page does not exist or is not owned here.
        DataLoss: A page is owned here and lost.
    """
    check_pages(table, request.row_pages, request.blocks, request.key_pages)
    wanted = cells(request.row_pages, request.blocks)
    heads = list(request.key_pages)
    if not table.owned[wanted].all() or not table.key_owned[heads].all():
        raise InvalidRequest(
            f"shard {table.shard} does not own all of the {table.owned[wanted].size} row pages and {len(heads)} "
            f"key pages of table {table.schema.name!r} that were asked of it; ask their owners of the newest placement",
            shard=table.shard,
        )
    if table.lost[wanted].any() or table.key_lost[heads].any():
        raise DataLoss(f"shard {table.shard} lost pages of table {table.schema.name!r} that were asked of it")
    return PageBatch(
        table_id=request.table_id,
        row_pages=request.row_pages,
        blocks=request.blocks,
        key_pages=request.key_pages,
        arrays=_exported(table, request),
        version=version,
    )


def _exported(table: Storage, request: ExportPages) -> dict[str, Tensor]:
    page_slots, count = table.schema.page_slots, len(request.row_pages)
    table.catch_up_pages(request.row_pages)  # so that the new owner need not know what steps there were
    arrays: dict[str, Tensor] = {}
    for array in table.arrays.values():
        width = array.width(request.blocks)
        if not width or not count:
            continue
        out = torch.empty((count, page_slots, width), dtype=array.dtype)
        for arena in table.arenas.values():
            at = np.flatnonzero(arena.page_of[request.row_pages] >= 0)
            blocks = tuple(sorted(set(arena.blocks).intersection(request.blocks)))
            if not len(at) or not blocks or not arena.has(array.name):
                continue
            places = torch.from_numpy(at)
            lies = torch.from_numpy(arena.page_of[request.row_pages[at]].astype(np.int64)).to(table.device)
            held = arena.pages(array.name)
            for to, out_of in array.copies(blocks, into=request.blocks, out_of=arena.blocks):
                out[places, :, to] = held[lies, :, out_of].cpu()
        arrays[array.name] = out.view(count * page_slots, width)
    if request.key_pages:
        places_of_heads = [table.heads.index(head) for head in request.key_pages]
        arrays[HEAD_KEYS] = table.head_keys[places_of_heads].cpu()
    return arrays


def ledger_part(ledger: Ledger, request: ExportLedger) -> LedgerPart:
    """Entries of a ledger from ``request.first`` on, as many as travel in one message."""
    entries: dict[tuple[str, int], LedgerEntry] = {}
    num_bytes = 0
    first = min(request.first, len(ledger.entries))  # a number from outside may be beyond what islice takes
    for rank, entry in islice(ledger.entries.items(), first, None):
        num_bytes += len(rank[0].encode()) + sum(_ENTRY_BYTES * (1 + len(each.others)) for each in generations(entry))
        if entries and num_bytes > _PART_BYTES:
            break
        entries[rank] = entry
    return LedgerPart(
        version=ledger.version,
        updates_applied=ledger.updates_applied,
        num_entries=len(ledger.entries),
        entries=entries,
        step_offset=ledger.step_offset,
    )


async def read_ledger(table_id: int, source: ShardHost) -> Ledger:
    """A table's ledger at another shard, part after part.

    Raises:
        Internal: The parts do not fit together: the table does not stand still there.
    """
    entries: dict[tuple[str, int], LedgerEntry] = {}
    head: LedgerPart | None = None
    while head is None or len(entries) < head.num_entries:
        part = await source.export_ledger(ExportLedger(table_id=table_id, first=len(entries)))
        head, before = head or part, len(entries)
        entries.update(part.entries)
        if (part.version, part.num_entries) != (head.version, head.num_entries):
            raise Internal(
                f"the ledger of table {table_id} went from version {head.version} ({head.num_entries:,} entries) to "
                f"{part.version} ({part.num_entries:,}) while it was read; is the table frozen there?"
            )
        if len(entries) == before < head.num_entries or not before <= len(entries) <= head.num_entries <= MAX_ENTRIES:
            raise Internal(
                f"the ledger of table {table_id} says that it has {head.num_entries:,} entries; {len(entries):,} came"
            )
    return Ledger(
        version=head.version,
        updates_applied=head.updates_applied,
        entries=entries,
        step_offset=head.step_offset,
    )


async def pull(
    request: PullPages,
    *,
    source: ShardHost,
    page_bytes: int,
    stage: Callable[[PageBatch], Awaitable[int]],
    lacks_ledger: Callable[[], Awaitable[bool]],
    stage_ledger: Callable[[Ledger], Awaitable[None]],
) -> PullReport:
    """Read the pages of ``request`` from ``source`` and stage them, then, once a move, what was applied to them; where
    it names no page, what the source has decided.

    Args:
        request: What to pull.
        source: The shard that owns the pages.
        page_bytes: Bytes of one row page with the blocks asked for; a batch is about 16 MiB.
        stage: Stages a batch and returns its bytes.
        lacks_ledger: Whether this shard does not know what was applied to the pages.
        stage_ledger: Stages their ledger.

    Raises:
        Internal: The source answered other pages than it was asked for.
    """
    num_bytes = 0
    for piece in pieces(len(request.row_pages), page_bytes):
        num_bytes += await _pull_batch(_asked(request, rows=request.row_pages[piece]), request, source, stage)
    for head in request.key_pages:
        num_bytes += await _pull_batch(_asked(request, head=head), request, source, stage)
    if request.of_decisions or await lacks_ledger():
        await stage_ledger(await read_ledger(request.table_id, source))
    pages = len(request.row_pages) * len(request.blocks) + len(request.key_pages)
    return PullReport(pages=pages, num_bytes=num_bytes)


async def _pull_batch(
    asked: ExportPages, request: PullPages, source: ShardHost, stage: Callable[[PageBatch], Awaitable[int]]
) -> int:
    batch = await source.export_pages(asked)
    if (
        batch.table_id != asked.table_id
        or not np.array_equal(batch.row_pages, asked.row_pages)
        or (batch.blocks, batch.key_pages) != (asked.blocks, asked.key_pages)
    ):
        raise Internal(f"shard {request.source.shard} answered other pages than it was asked for")
    return await stage(batch)


def _asked(request: PullPages, *, rows: RowPages | None = None, head: int | None = None) -> ExportPages:
    return ExportPages(
        table_id=request.table_id,
        row_pages=np.empty(0, dtype=np.int64) if rows is None else rows,
        blocks=() if rows is None else request.blocks,
        key_pages=() if head is None else (head,),
        token=request.token,
    )
