"""Pages on their way to this shard: staged beside those that answer, adopted with the view that gives them to it.

How they come is ``transfer``'s, how they are adopted ``adoption``'s.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mempool.errors import Internal, InvalidRequest
from mempool.shard.pages.adoption import Adoption, StagedPages, adopted_head_keys
from mempool.shard.pages.masks import Mask, RowPages, cells
from mempool.shard.pages.named_arrays import HEAD_KEYS, Blocks
from mempool.shard.pages.storage import Storage
from mempool.types import Ledger, PageBatch, Placement


class Staging:
    """Staged pages of one table. Row pages lie in the arena of the blocks they came with, published nowhere.

    Attributes:
        version: The highest table version that pages came with; None where none are staged.
        ledger: The ledger that came with them.
        decisions: The ledger of the table's gate, where this shard is to be that instead.
        on_drop: Told that what is staged is dropped.
    """

    def __init__(self, table: Storage) -> None:
        self._table = table
        self._pages: dict[Blocks, StagedPages] = {}
        self._heads: dict[int, Tensor] = {}
        self.version: int | None = None
        self.ledger: Ledger | None = None
        self.decisions: Ledger | None = None
        self.on_drop: Callable[[], None] = lambda: None

    @property
    def mask(self) -> Mask:
        """[P, num_blocks]: what is staged."""
        staged = np.zeros_like(self._table.owned)
        for blocks, pages in self._pages.items():
            staged[cells(pages.row_pages, blocks)] = True
        return staged

    def check_pull(self, row_pages: RowPages, blocks: Blocks, key_pages: tuple[int, ...]) -> None:
        """Refuse to pull what does not exist or is here already.

        Raises:
            InvalidRequest: With the first such page.
        """
        table = self._table
        check_pages(table, row_pages, blocks, key_pages)
        here = np.argwhere(table.owned[cells(row_pages, blocks)])
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
    def is_empty(self) -> bool:
        """Whether nothing is staged."""
        return not (self._pages or self._heads or self.ledger or self.decisions)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is staged beside the arenas: keys of heads."""
        return sum(keys.nbytes for keys in self._heads.values())

    def new_bytes(self, row_pages: RowPages, blocks: Blocks, key_pages: tuple[int, ...]) -> int:
        """Bytes that these would take beside what is here and staged."""
        heads = sum(head not in self._heads for head in key_pages)
        count = len(self._new(row_pages, blocks))
        return self._table.new_bytes({blocks: count} if count else {}, heads=heads)

    def _new(self, row_pages: RowPages, blocks: Blocks) -> RowPages:
        pages = self._pages.get(blocks)
        return row_pages if pages is None else row_pages[~pages.has(row_pages)]

    def reserve(self, row_pages: RowPages, blocks: Blocks) -> None:
        """Make room for row pages that are to come in batches. Raises InvalidRequest where there is none."""
        self._table.on_change("its pages move")
        new = self._new(row_pages, blocks)
        if len(new):
            self._table.arena(blocks).reserve(len(new))

    def put(self, batch: PageBatch) -> int:
        """Stage a batch; pages staged before are overwritten. Returns its bytes.

        Raises:
            InvalidRequest: A page of it is owned here already, or there is no memory for it.
            Internal: The batch is not what the table's schema says. Nothing was changed in any case.
        """
        table = self._table
        self.check_pull(batch.row_pages, batch.blocks, batch.key_pages)
        _check_batch(table, batch)
        # Copied: a view would keep the whole frame in memory.
        heads = {
            head: keys.to(table.device, copy=True)
            for head, keys in zip(batch.key_pages, batch.arrays.get(HEAD_KEYS, ()), strict=True)
        }
        if len(batch.row_pages):
            self._put_rows(batch)
        self._heads |= heads
        self.version = max(self.version or 0, batch.version)
        return sum(rows.nbytes for rows in batch.arrays.values())

    def _put_rows(self, batch: PageBatch) -> None:
        table, count = self._table, len(batch.row_pages)
        arena = table.arena(batch.blocks)
        new = self._new(batch.row_pages, batch.blocks)
        taken = arena.take(len(new))
        pages = self._pages.setdefault(batch.blocks, StagedPages())
        pages.add(new, taken)
        places = pages.places(batch.row_pages)
        at = torch.from_numpy(places).to(table.device)
        side_by_side = slice(int(places[0]), int(places[0]) + count) if bool((np.diff(places) == 1).all()) else None
        with arena.writing(pages=at):
            for array in arena.arrays:
                held = arena.pages(array.name)
                rows = batch.arrays[array.name].view(count, *held.shape[1:])
                held[at if side_by_side is None else side_by_side] = rows.to(table.device)

    def lacks_ledger(self, version: int) -> bool:
        """Whether what was applied to staged pages is not known here and did not come yet. version: the table's here.

        It is known where the table has pages already and got all commits that they got.
        """
        if self.version is None or (self.ledger is not None and self.ledger.version == self.version):
            return False
        return self.version > version or not self._table.num_pages + self._table.num_lost

    def put_ledger(self, ledger: Ledger, *, decisions: bool = False) -> None:
        """Stage what was applied to the pages, as their owner knows it; or what the gate, whose ledger it is, decided.

        Raises:
            Internal: It is of another version than they. Nothing was changed.
        """
        if decisions:  # it may come before the pages do
            self.decisions = ledger
            return
        if ledger.version != self.version:
            raise Internal(
                f"pages of table {self._table.schema.name!r} came at version {self.version} and their ledger at "
                f"{ledger.version}: their owner did not stand still. Nothing was changed."
            )
        self.ledger = ledger

    def drop(self) -> None:
        """Forget what is staged and free its memory."""
        if not self.is_empty:
            self.on_drop()
        for blocks, pages in self._pages.items():
            self._table.arenas[blocks].give_back(pages.arena_pages)
        self._clear()
        self._table.drop_idle_arenas()

    def adopt(self, placement: Placement, *, version: int) -> None:
        """Own what ``placement`` gives this shard: staged pages come alive, pages not owned any more are freed.

        Args:
            placement: The new one.
            version: The table's version here so far.

        Raises:
            Internal: It gives pages that are neither here nor staged, or whose ledger is not.
            InvalidRequest: There is not enough memory. Nothing was changed in any case.
        """
        table = self._table
        owned = placement.owners == table.shard
        self._check_complete(placement, owned, version)
        heads = tuple(np.flatnonzero((placement.key_owners == table.shard) & ~table.key_lost).tolist())
        adoption = Adoption(table, self._pages)
        try:
            adoption.prepare(owned & ~table.lost)
            head_keys = adopted_head_keys(table, self._heads, heads)
        except BaseException:
            adoption.undo()
            raise
        adoption.publish()
        table.set_head_keys(heads, head_keys)
        self._clear()
        table.drop_idle_arenas()
        table.own(placement)

    def _clear(self) -> None:
        self._pages.clear()
        self._heads.clear()
        self.version = self.ledger = self.decisions = None

    def _check_complete(self, placement: Placement, owned: Mask, version: int) -> None:
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
        if self.lacks_ledger(version):
            raise Internal(
                f"epoch {placement.epoch} gives shard {table.shard} pages of table {table.schema.name!r} at version "
                f"{self.version} whose ledger did not come; pull them again. Nothing was changed."
            )


def check_pages(table: Storage, row_pages: RowPages, blocks: Blocks, key_pages: tuple[int, ...]) -> None:
    """Refuse pages that the table has not, or that are named twice. Raises InvalidRequest."""
    schema = table.schema
    for what, asked, limit in (
        ("row page", row_pages, schema.num_row_pages),
        ("block", np.asarray(blocks, dtype=np.int64), schema.num_blocks),
        ("key page", np.asarray(key_pages, dtype=np.int64), schema.num_key_pages),
    ):
        bad = asked[(asked < 0) | (asked >= limit)]
        if len(bad):
            raise InvalidRequest(f"table {schema.name!r} has no {what} {bad[0]}: it has {limit} (0 to {limit - 1})")
        if len(asked) > limit or len(np.unique(asked)) != len(asked):
            more = " ..." if len(asked) > 8 else ""
            raise InvalidRequest(f"a {what} of table {schema.name!r} is named twice in {asked[:8].tolist()}{more}")
    if (np.diff(np.asarray(blocks, dtype=np.int64)) < 0).any():
        raise InvalidRequest(f"blocks {blocks[:8]} are not ascending")


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
            f"pages of table {table.schema.name!r} came as {str(got)[:1000]}, and its schema says {expected}; do all "
            "shards run the same version of mempool?"
        )
