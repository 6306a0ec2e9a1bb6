"""Which rows of the table of keys a query meets, and the slots that are chosen by them. Pure.

Legend: B bags, H heads, S sections (P per head with product keys of P parts, 1 with flat keys), K top-k, C candidates
of one, D key dim, n half-keys of one, W width of a row.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mempool.client.keys.merging import Winners, best_of_slots, merged
from mempool.types import OwnKeySpec, TableSchema, TrainedKeySpec
from mempool.types.bags import Bags
from mempool.types.keys import Grouping, grouping_of, key_table


class Chosen(NamedTuple):
    """Attributes:
    scores: [B, H, K] float32.
    ids: [B, H, K] int64.
    left_open: [M] int64: the queries for which all keys of their sections are needed; None: none are.
    """

    scores: Tensor
    ids: Tensor
    left_open: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLayout:
    """Where the keys of a table that trains them lie.

    Attributes:
        name: Of the table.
        keys: What it says of them.
        num_slots: Of the table whose keys they are.
        sections: Of the table of keys; rows: keys of each; slots: distance of two sections' first rows.
        width: Of a row.
    """

    name: str
    keys: TrainedKeySpec
    num_slots: int
    sections: int
    rows: int
    slots: int
    width: int

    @classmethod
    def of(cls, schema: TableSchema) -> Self | None:
        """None where the table trains no keys."""
        made = key_table(schema)
        if made is None:
            return None
        assert isinstance(schema.keys, TrainedKeySpec)
        assert isinstance(made.keys, OwnKeySpec)
        return cls(
            name=schema.name,
            keys=schema.keys,
            num_slots=schema.num_slots,
            sections=made.keys.sections,
            rows=made.keys.rows,
            slots=made.num_slots // made.keys.sections,
            width=made.value_dim,
        )

    @property
    def grouping(self) -> Grouping | None:
        """Of hierarchical keys."""
        return grouping_of(self.keys, self.num_slots)

    def section_queries(self, queries_BHD: Tensor) -> Tensor:
        """[B, H, D] -> [B, S, W]: with product keys the parts of each head; with hierarchical keys, whose heads share
        the one section there is, [B * H, 1, W]."""
        if self.keys.groups:
            return queries_BHD.reshape(-1, 1, self.width)
        return queries_BHD.reshape(queries_BHD.shape[0], self.sections, self.width)

    @property
    def cut_off(self) -> int:
        """Half-keys of a first part that are in no slot, or not with all others: where slots are no n^ways, the last
        products are none."""
        return self.rows - self.num_slots // self.rows ** (self.keys.ways - 1) if self.keys.product else 0

    def candidates(self, topk: int) -> int:
        """How many of each section are asked for: as many as have a part in the top-k, and those that are cut off."""
        return min(topk + self.cut_off, self.rows)

    def chosen(self, scores_BSC: Tensor, rows_BSC: Tensor, topk: int) -> Chosen:
        """The slots by (score descending, id ascending), of each section's best: the same as of all keys at once.

        Args:
            scores_BSC: Float32, best first.
            rows_BSC: Int64, of the table of keys.
        """
        if not self.keys.product:
            return Chosen(scores_BSC, rows_BSC, None)
        count, ways = scores_BSC.shape[-1], self.keys.ways
        first_S = torch.arange(self.sections, dtype=torch.int64, device=rows_BSC.device) * self.slots
        index = (rows_BSC - first_S[:, None]).reshape(-1, ways, count)
        parts = scores_BSC.reshape(-1, ways, count)
        lists = [Winners(parts[:, way], index[:, way], self.rows) for way in range(ways)]
        shape = (scores_BSC.shape[0], self.keys.heads, topk)
        if self.cut_off:
            found, left_open = best_of_slots(lists, self.num_slots, topk)
            queries = left_open.view(shape[:2]).any(dim=1).nonzero()[:, 0]
            return Chosen(found.scores.view(shape), found.ids.view(shape), queries if len(queries) else None)
        # In pairs, and then one list after the other, as a layer merges those of keys of its own: to the same bits.
        paired = [merged(lists[way : way + 2], topk) for way in range(0, ways, 2)]
        found = merged(paired, topk)
        return Chosen(found.scores.view(shape), found.ids.view(shape), None)

    def key_bags(self, ids_BHK: Tensor, weights_BHK: Tensor) -> Bags:
        """The rows whose products with a query are its slots' scores, as bags in the order of ``section_queries``, with
        these weights."""
        if self.grouping is not None:
            return group_bags(self.grouping, ids_BHK.flatten(0, 1), weights_BHK.flatten(0, 1))
        num_bags, heads, found = ids_BHK.shape
        if self.keys.product:
            ways = self.keys.ways
            worths = [self.rows ** (ways - 1 - way) for way in range(ways)]
            index = torch.stack([ids_BHK // worth % self.rows for worth in worths], dim=2)
            sections = torch.arange(self.sections, dtype=torch.int64, device=ids_BHK.device).view(heads, ways, 1)
            rows, weights = index + sections * self.slots, weights_BHK[:, :, None].expand(-1, -1, ways, -1)
        else:
            rows, weights = ids_BHK, weights_BHK
        ends = torch.arange(num_bags * self.sections + 1, dtype=torch.int64, device=ids_BHK.device) * found
        return Bags(ids=rows.reshape(-1), weights=weights.reshape(-1).contiguous(), offsets=ends)

    def slot_rows(self, ids_M: Tensor) -> Tensor:
        """The rows of the slots' own keys, where they have any."""
        return ids_M if self.grouping is None else self.grouping.row_of(ids_M)

    def rows_of(self, ids_M: Tensor) -> Tensor:
        """All rows of heads [M], in order; of slots [M] with flat keys; with hierarchical keys of groups [M], and from
        the number of those on of slots."""
        if self.grouping is not None:
            groups = self.grouping.groups
            slots = ids_M - groups
            return torch.where(ids_M < groups, ids_M * self.grouping.pitch, self.grouping.row_of(slots))
        if not self.keys.product:
            return ids_M
        ways = self.keys.ways
        first_MP = (ways * ids_M[:, None] + torch.arange(ways, dtype=torch.int64, device=ids_M.device)) * self.slots
        rows = torch.arange(self.rows, dtype=torch.int64, device=ids_M.device)
        return (first_MP[:, :, None] + rows).reshape(-1)


def group_bags(grouping: Grouping, ids_MK: Tensor, weights_MK: Tensor) -> Bags:
    """Rows of slots, and of their groups, of which each has the weights of its slots together: M bags."""
    num_bags, found = ids_MK.shape
    groups, by_group = (ids_MK // grouping.size).sort(dim=1, stable=True)
    is_first = torch.ones_like(groups, dtype=torch.bool)
    is_first[:, 1:] = groups[:, 1:] != groups[:, :-1]
    which = is_first.flatten().cumsum(0) - 1
    own = groups[is_first]
    sums = torch.zeros(own.numel(), dtype=torch.float32, device=ids_MK.device)
    sums.index_add_(0, which, weights_MK.gather(1, by_group).flatten())
    counts = is_first.sum(dim=1)
    bags = torch.arange(num_bags, dtype=torch.int64, device=ids_MK.device)
    # Of each bag its slots first: a bag's place is what the bags before it have.
    bag = torch.cat((bags.repeat_interleave(found), bags.repeat_interleave(counts)))
    order = bag.argsort(stable=True)
    rows = torch.cat((grouping.row_of(ids_MK.flatten()), own * grouping.pitch))
    ends = torch.zeros(num_bags + 1, dtype=torch.int64, device=ids_MK.device)
    torch.cumsum(counts + found, 0, out=ends[1:])
    return Bags(ids=rows[order], weights=torch.cat((weights_MK.flatten(), sums))[order], offsets=ends)
