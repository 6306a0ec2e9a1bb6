"""Adopting a placement: where pages lie before (owned or staged), where they go, and the turn from one to the other.

All room is taken and all bytes are copied before the first page is published, so that failing half way changes nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mempool.shard.pages.arena import PageNumbers
from mempool.shard.pages.masks import Mask, RowPages, by_blocks
from mempool.shard.pages.named_arrays import Blocks, head_keys_shape
from mempool.shard.pages.storage import Storage


class StagedPages:
    """Row pages that came with the same blocks, ascending, and the arena pages where they lie, published nowhere."""

    def __init__(self) -> None:
        self.row_pages: RowPages = np.empty(0, dtype=np.int64)
        self.arena_pages: PageNumbers = np.empty(0, dtype=np.int64)

    def has(self, row_pages: RowPages) -> Mask:
        """[M] bool: which of these are staged."""
        return np.isin(row_pages, self.row_pages)

    def add(self, row_pages: RowPages, arena_pages: PageNumbers) -> None:
        """Row pages that are not staged yet."""
        joined = np.append(self.row_pages, row_pages)
        order = np.argsort(joined)
        self.row_pages, self.arena_pages = joined[order], np.append(self.arena_pages, arena_pages)[order]

    def places(self, row_pages: RowPages) -> PageNumbers:
        """The arena pages of row pages that are staged."""
        return self.arena_pages[np.searchsorted(self.row_pages, row_pages)]


@dataclass(frozen=True, slots=True)
class _Group:
    """Row pages that get the same blocks out of the same arenas. arena_pages: where they will lie; taken: anew."""

    row_pages: RowPages
    blocks: Blocks
    arena_pages: PageNumbers
    taken: bool
    owned_in: tuple[Blocks, ...]


class Adoption:
    """One change of a table's row pages: ``prepare``, then either ``publish`` or ``undo``."""

    def __init__(self, table: Storage, staged: dict[Blocks, StagedPages]) -> None:
        self._table = table
        self._staged = staged
        self._groups: list[_Group] = []

    def prepare(self, wanted: Mask) -> None:
        """Take room for the pages whose blocks change and copy what they hold.

        Args:
            wanted: [P, num_blocks]: what is to be here; all of it is owned and not lost, or staged.

        Raises:
            InvalidRequest: There is not so much memory. ``undo`` then.
        """
        changed = np.flatnonzero((wanted != (self._table.owned & ~self._table.lost)).any(axis=1))
        for blocks, places in by_blocks(wanted[changed]).items():
            for row_pages, sources in self._by_sources(changed[places]):
                self._prepare_alike(row_pages, blocks, sources)

    def publish(self) -> None:
        """Pages answer where they are now, and free what they left."""
        arenas = self._table.arenas
        for group in self._groups:
            for blocks in group.owned_in:
                arenas[blocks].give_back(arenas[blocks].withdraw(group.row_pages))
            if group.blocks:
                arenas[group.blocks].publish(group.row_pages, group.arena_pages)
        for blocks, staged in self._staged.items():
            adopted = arenas[blocks].page_of[staged.row_pages] == staged.arena_pages
            arenas[blocks].give_back(staged.arena_pages[~adopted])

    def undo(self) -> None:
        """Give back the room that was taken."""
        for group in self._groups:
            if group.taken:
                self._table.arenas[group.blocks].give_back(group.arena_pages)
        self._groups.clear()
        self._table.drop_idle_arenas()

    def _by_sources(self, row_pages: RowPages) -> list[tuple[RowPages, list[tuple[Blocks, bool]]]]:
        """Row pages by the arenas that they lie in: (blocks, whether they are staged there)."""
        keys = [(blocks, False) for blocks in self._table.arenas] + [(blocks, True) for blocks in self._staged]
        if not keys:
            return [(row_pages, [])]
        lies = [arena.page_of[row_pages] >= 0 for arena in self._table.arenas.values()]
        lies += [staged.has(row_pages) for staged in self._staged.values()]
        return [
            (row_pages[places], [keys[number] for number in numbers])
            for numbers, places in by_blocks(np.stack(lies, axis=1)).items()
        ]

    def _prepare_alike(self, row_pages: RowPages, blocks: Blocks, sources: list[tuple[Blocks, bool]]) -> None:
        arenas = self._table.arenas
        owned_in = tuple(key for key, is_staged in sources if not is_staged)
        if not blocks:
            self._groups.append(_Group(row_pages, blocks, np.empty(0, dtype=np.int64), False, owned_in))
            return
        if (blocks, True) in sources:
            # They lie where they belong already; what is owned of them besides is not wanted any more.
            self._groups.append(_Group(row_pages, blocks, self._staged[blocks].places(row_pages), False, owned_in))
            return
        arena_pages = self._table.arena(blocks).take(len(row_pages))
        self._groups.append(_Group(row_pages, blocks, arena_pages, True, owned_in))
        lacking = set(blocks)
        for key, is_staged in sources:
            part = tuple(block for block in key if block in lacking)
            if part:
                at = self._staged[key].places(row_pages) if is_staged else arenas[key].page_of[row_pages]
                arenas[blocks].copy_from(
                    arenas[key], blocks=part, source_pages=at.astype(np.int64), arena_pages=arena_pages
                )
                lacking.difference_update(part)


def adopted_head_keys(table: Storage, staged: dict[int, Tensor], heads: tuple[int, ...]) -> Tensor:
    """[H, 2, n, key_dim / 2]: the product keys of these heads, each staged or here; a staged one goes before."""
    if heads == table.heads and not any(head in staged for head in heads):
        return table.head_keys
    found = torch.empty((len(heads), *head_keys_shape(table.schema)), dtype=torch.float32, device=table.device)
    present = dict(zip(table.heads, table.head_keys, strict=True))
    for place, head in enumerate(heads):
        found[place] = staged[head] if head in staged else present[head]
    return found
