"""Pages on their way to this shard: staged beside those that answer, adopted with the view that gives them to it.

Pulling them is done in batches that hold up neither shard for long.
"""

from collections.abc import Awaitable, Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mempool.errors import DataLoss, Internal, InvalidRequest
from mempool.shard.pages.arena import HEAD_KEYS, Blocks, pieces
from mempool.shard.pages.storage import Mask, Storage
from mempool.types import ExportPages, Ledger, PageBatch, Placement, PullPages, PullReport, ShardHost

RowPages = npt.NDArray[np.int64]


class Staging:
    """Staged pages of one table. Row pages lie in the arena of the blocks they came with, published nowhere."""

    def __init__(self, table: Storage) -> None:
        self._table = table
        self._places: dict[Blocks, dict[int, int]] = {}
        self._heads: dict[int, Tensor] = {}
        self.ledger: Ledger | None = None

    @property
    def mask(self) -> Mask:
        """[P, num_blocks]: what is staged."""
        staged = np.zeros_like(self._table.owned)
        for blocks, places in self._places.items():
            staged[_cells(places, blocks)] = True
        return staged

    def check_pull(self, row_pages: RowPages, blocks: Blocks, key_pages: tuple[int, ...]) -> None:
        """Refuse to pull what does not exist or is here already.

        Raises:
            InvalidRequest: With the first such page.
        """
        table = self._table
        _check_pages(table, row_pages, blocks, key_pages)
        here = np.argwhere(table.owned[_cells(row_pages, blocks)])
        if len(here):
            page, block = int(row_pages[here[0][0]]), blocks[int(here[0][1])]
            raise InvalidRequest(
                f"shard {table.shard} owns block {block} of row page {page} of table {table.schema.name!r} already"
            )
        if table.key_owned[list(key_pages)].any():
            raise InvalidRequest(
                f"shard {table.shard} owns one of the key pages {key_pages} of table {table.schema.name!r} already"
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of what is staged beside the arenas: keys of heads."""
        return sum(keys.nbytes for keys in self._heads.values())

    def new_bytes(self, row_pages: RowPages, blocks: Blocks, key_pages: tuple[int, ...]) -> int:
        """Bytes that these would take beside what is here and staged."""
        heads = sum(head not in self._heads for head in key_pages)
        count = self._count_new(row_pages, blocks)
        return self._table.new_bytes({blocks: count} if count else {}, heads=heads)

    def _count_new(self, row_pages: RowPages, blocks: Blocks) -> int:
        places = self._places.get(blocks, {})
        return sum(page not in places for page in row_pages.tolist())

    def reserve(self, row_pages: RowPages, blocks: Blocks) -> None:
        """Make room for row pages that are to come in batches."""
        new = self._count_new(row_pages, blocks)
        if new:
            self._table.arena(blocks).reserve(new)

    def put(self, batch: PageBatch) -> int:
        """Stage a batch; pages staged before are overwritten. Returns its bytes.

        Raises:
            InvalidRequest: A page of it is owned here already.
            Internal: The batch is not what the table's schema says. Nothing was changed in either case.
        """
        table = self._table
        self.check_pull(batch.row_pages, batch.blocks, batch.key_pages)
        _check_batch(table, batch)
        row_pages = [int(page) for page in batch.row_pages]
        if row_pages:
            arena = table.arena(batch.blocks)
            places = self._places.setdefault(batch.blocks, {})
            new = [page for page in row_pages if page not in places]
            places.update(zip(new, arena.take(len(new)).tolist(), strict=True))
            at = torch.tensor([places[page] for page in row_pages])
            for array in arena.arrays:
                pages = arena.pages(array.name)
                pages[at] = batch.arrays[array.name].view(len(row_pages), *pages.shape[1:]).to(table.device)
        for head, keys in zip(batch.key_pages, batch.arrays.get(HEAD_KEYS, ()), strict=True):
            # Copied: a view would keep the whole frame in memory.
            self._heads[head] = keys.to(table.device, copy=True)
        if self.ledger is None or batch.ledger.version > self.ledger.version:
            self.ledger = batch.ledger
        return sum(rows.nbytes for rows in batch.arrays.values())

    def drop(self) -> None:
        """Forget what is staged and free its memory."""
        for blocks, places in self._places.items():
            self._table.arenas[blocks].give_back(np.array(list(places.values()), dtype=np.int64))
        self._clear()
        self._table.drop_idle_arenas()

    def adopt(self, placement: Placement) -> None:
        """Own what ``placement`` gives this shard: staged pages come alive, pages not owned any more are freed.

        Raises:
            Internal: It gives pages that are neither here nor staged. Nothing was changed.
        """
        table = self._table
        owned = placement.owners == table.shard
        self._check_complete(placement, owned)
        whole = owned & ~table.lost
        homes = _Homes(table, self._places)
        changed = np.flatnonzero((whole != (table.owned & ~table.lost)).any(axis=1))
        for blocks, row_pages in _by_pattern(whole, changed).items():
            homes.move(row_pages, blocks)
        homes.finish()
        heads = [int(head) for head in np.flatnonzero((placement.key_owners == table.shard) & ~table.key_lost)]
        if tuple(heads) != table.heads:
            present = dict(zip(table.heads, table.head_keys, strict=True))
            table.set_head_keys({head: self._heads.get(head, present.get(head)) for head in heads})  # type: ignore[misc]
        self._clear()
        table.drop_idle_arenas()
        table.shrink_arenas()
        table.own(placement)

    def _clear(self) -> None:
        self._places.clear()
        self._heads.clear()
        self.ledger = None

    def _check_complete(self, placement: Placement, owned: Mask) -> None:
        table = self._table
        lacking = np.argwhere(owned & ~table.owned & ~self.mask)
        if len(lacking):
            page, block = lacking[0]
            raise Internal(
                f"epoch {placement.epoch} gives shard {table.shard} {len(lacking)} pages of table "
                f"{table.schema.name!r} that it neither has nor has staged, the first being block {block} of row page "
                f"{page}; pull them first. Nothing was changed."
            )
        keys_here = table.key_owned.copy()
        keys_here[list(self._heads)] = True
        lacking_keys = np.flatnonzero((placement.key_owners == table.shard) & ~keys_here)
        if len(lacking_keys):
            raise Internal(
                f"epoch {placement.epoch} gives shard {table.shard} the keys of heads {lacking_keys.tolist()} of table "
                f"{table.schema.name!r}, which it neither has nor has staged; pull them first. Nothing was changed."
            )


class _Homes:
    """Where pages lie before an adoption (owned or staged) and where they go."""

    def __init__(self, table: Storage, staged: dict[Blocks, dict[int, int]]) -> None:
        self._table = table
        self._staged = staged
        self._adopted: dict[Blocks, set[int]] = {blocks: set() for blocks in staged}

    def move(self, row_pages: RowPages, blocks: Blocks) -> None:
        """Bring pages into the arena of ``blocks``; pages of no blocks are freed."""
        by_sources: dict[tuple[tuple[Blocks, bool], ...], list[int]] = {}
        owned_in = [(key, arena.page_of) for key, arena in self._table.arenas.items()]
        for page in row_pages.tolist():
            owned = [(key, False) for key, page_of in owned_in if page_of[page] >= 0]
            staged = [(key, True) for key, places in self._staged.items() if page in places]
            by_sources.setdefault((*owned, *staged), []).append(page)
        for sources, pages in by_sources.items():
            self._move_alike(np.array(pages, dtype=np.int64), blocks, sources)

    def _move_alike(self, pages: RowPages, blocks: Blocks, sources: tuple[tuple[Blocks, bool], ...]) -> None:
        """Move pages whose columns come from the same arenas."""
        arenas = self._table.arenas
        if blocks and (blocks, True) in sources:
            # They lie where they belong already; what is owned of them besides is not wanted any more.
            taken = np.array([self._staged[blocks][page] for page in pages.tolist()], dtype=np.int64)
            self._adopted[blocks].update(pages.tolist())
            wanted: set[int] = set()
        elif blocks:
            taken = self._table.arena(blocks).take(len(pages))
            wanted = set(blocks)
        else:
            taken, wanted = np.empty(0, dtype=np.int64), set()
        for key, is_staged in sources:
            part = tuple(sorted(wanted.intersection(key)))
            if part:
                at = [self._staged[key][page] if is_staged else arenas[key].page_of[page] for page in pages.tolist()]
                arenas[blocks].copy_from(
                    arenas[key], blocks=part, source_pages=np.array(at, dtype=np.int64), arena_pages=taken
                )
                wanted.difference_update(part)
        for key, is_staged in sources:
            if not is_staged:
                arenas[key].give_back(arenas[key].withdraw(pages))
        if blocks:
            arenas[blocks].publish(pages, taken)

    def finish(self) -> None:
        """Free the staged pages that were copied from, or not wanted."""
        for blocks, places in self._staged.items():
            rest = [place for page, place in places.items() if page not in self._adopted[blocks]]
            self._table.arenas[blocks].give_back(np.array(rest, dtype=np.int64))


def export(table: Storage, request: ExportPages, ledger: Ledger) -> PageBatch:
    """Copy pages out, to the CPU.

    Raises:
        InvalidRequest: A page does not exist or is not owned here.
        DataLoss: A page is owned here and lost.
    """
    _check_pages(table, request.row_pages, request.blocks, request.key_pages)
    wanted = np.zeros_like(table.owned)
    wanted[_cells(request.row_pages, request.blocks)] = True
    if not table.owned[wanted].all() or not table.key_owned[list(request.key_pages)].all():
        raise InvalidRequest(
            f"shard {table.shard} does not own all of the {int(wanted.sum())} row pages and {len(request.key_pages)} "
            f"key pages of table {table.schema.name!r} that were asked of it; ask their owners of the newest placement",
            shard=table.shard,
        )
    if table.lost[wanted].any() or table.key_lost[list(request.key_pages)].any():
        raise DataLoss(f"shard {table.shard} lost pages of table {table.schema.name!r} that were asked of it")
    return PageBatch(
        table_id=request.table_id,
        row_pages=request.row_pages,
        blocks=request.blocks,
        key_pages=request.key_pages,
        arrays=_exported(table, request),
        ledger=ledger,
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
            if not len(at) or not arena.has(array.name):
                continue
            pages = arena.pages(array.name)[torch.from_numpy(arena.page_of[request.row_pages[at]].astype(np.int64))]
            for block in request.blocks:
                if block in arena.blocks and array.width((block,)):
                    into, out_of = array.columns(request.blocks, block), array.columns(arena.blocks, block)
                    out[torch.from_numpy(at), :, into] = pages[:, :, out_of].cpu()
        arrays[array.name] = out.view(count * page_slots, width)
    if request.key_pages:
        places = [table.heads.index(head) for head in request.key_pages]
        arrays[HEAD_KEYS] = table.head_keys[places].cpu()
    return arrays


def _cells(row_pages: Iterable[int] | RowPages, blocks: Blocks) -> tuple[npt.NDArray[np.int64], ...]:
    """Index of all (row page, block)s of these."""
    return np.ix_(np.fromiter(row_pages, dtype=np.int64), np.array(blocks, dtype=np.int64))


def _by_pattern(mask: Mask, row_pages: RowPages) -> dict[Blocks, RowPages]:
    """Row pages by what the mask says of them, () included; those that free come last, as others copy from them."""
    groups: dict[Blocks, list[int]] = {}
    for page in row_pages.tolist():
        groups.setdefault(tuple(int(block) for block in np.flatnonzero(mask[page])), []).append(page)
    return {blocks: np.array(groups[blocks], dtype=np.int64) for blocks in sorted(groups, reverse=True)}


def _check_pages(table: Storage, row_pages: RowPages, blocks: Blocks, key_pages: tuple[int, ...]) -> None:
    schema = table.schema
    for what, asked, limit in (
        ("row page", row_pages.tolist(), schema.num_row_pages),
        ("block", list(blocks), schema.num_blocks),
        ("key page", list(key_pages), schema.num_key_pages),
    ):
        bad = [number for number in asked if not 0 <= number < limit]
        if bad:
            raise InvalidRequest(f"table {schema.name!r} has no {what} {bad[0]}: it has {limit} (0 to {limit - 1})")
        if len(set(asked)) != len(asked):
            raise InvalidRequest(f"a {what} of table {schema.name!r} is named twice in {asked[:8]}")
    if list(blocks) != sorted(blocks):
        raise InvalidRequest(f"blocks {blocks} are not ascending")


def _check_batch(table: Storage, batch: PageBatch) -> None:
    rows = len(batch.row_pages) * table.schema.page_slots
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        array.name: ((rows, array.width(batch.blocks)), array.dtype)
        for array in table.arrays.values()
        if rows and array.width(batch.blocks)
    }
    if batch.key_pages:
        expected[HEAD_KEYS] = ((len(batch.key_pages), *table.head_keys.shape[1:]), torch.float32)
    got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.arrays.items()}
    if got != expected:
        raise Internal(
            f"pages of table {table.schema.name!r} came as {got}, and its schema says {expected}; do all shards run "
            "the same version of mempool?"
        )


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
    batches = [_asked(request, rows=request.row_pages[piece]) for piece in pieces(len(request.row_pages), page_bytes)]
    batches += [_asked(request, head=head) for head in request.key_pages]
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


def _asked(request: PullPages, *, rows: npt.NDArray[np.int64] | None = None, head: int | None = None) -> ExportPages:
    return ExportPages(
        table_id=request.table_id,
        row_pages=np.empty(0, dtype=np.int64) if rows is None else rows,
        blocks=() if rows is None else request.blocks,
        key_pages=() if head is None else (head,),
    )
