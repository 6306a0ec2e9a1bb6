"""Counts of use, as a step is applied: each pair of a look-up whose update is in the step is one use of its slot.

They change with the rows, in the same write: so they are journalled, replayed, moved and saved as these are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mempool.kernels import SortedPairs
from mempool.shard.pages.arena import Arena
from mempool.shard.pages.named_arrays import LAST_USE, USES
from mempool.shard.pages.storage import Storage
from mempool.shard.steps.held import HeldUpdate

_AT_ONCE = 2**16
"""Pairs of experts: a step in parts has a bounded temporary memory, however many there are."""


@dataclass(frozen=True, slots=True, eq=False)
class Uses:
    """What a step adds to the counts of an arena. All that needs memory for it is done when it is made.

    Attributes:
        rows: [U] int64 arena rows, all different.
        pairs: [U] int64, how many the step has of each.
    """

    arena: Arena
    rows: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, arena: Arena, pairs: SortedPairs, *, more: int = 0, twice: Sequence[Tensor] = ()) -> "Uses | None":
        """None where the arena counts none: block 0 is not among its own, or the table does not.

        Args:
            pairs: All pairs that the step has of these slots, but for ``more`` where it is one slot.
            more: How many are not among them.
            twice: [L] each, slots: those of pairs of the step that are there twice, each once.
        """
        if not arena.has(USES):
            return None
        counts, slots = pairs.starts.diff() + more, pairs.slots
        for ids in (part for each in twice for part in torch.split(each, _AT_ONCE)) if slots.numel() else ():
            at = torch.searchsorted(slots, ids.to(slots.dtype)).clamp_(max=slots.shape[0] - 1)
            here = at[slots[at] == ids]
            counts.index_add_(0, here, torch.ones_like(here), alpha=-1)
        return cls(arena, pairs.rows, counts)

    def count(self, version: int) -> None:
        """Within ``arena.writing`` of these rows. version: That the step makes."""
        stores = self.arena.stores
        stores[USES].view(-1).index_add_(0, self.rows, self.pairs)
        stores[LAST_USE].view(-1).index_fill_(0, self.rows, version)


def held_twice(table: Storage, held: Sequence[HeldUpdate]) -> list[Tensor]:
    """Of updates of experts, whose pairs are held twice, the slots of their pairs; of a table that counts."""
    if not table.schema.usage:
        return []
    return [update.bags.ids[: update.bags.num_pairs // 2] for update in held if update.input_dim]
