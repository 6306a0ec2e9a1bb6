"""Which rows of the table of keys a query meets, and the slots that are chosen by them. Pure.

Legend: B bags, H heads, S sections (P per head with product keys of P parts, 1 with flat keys), K top-k, C candidates
of one, D key dim, n half-keys of one, W width of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mempool import kernels
from mempool.types import OwnKeySpec, TableSchema, TrainedKeySpec
from mempool.types.bags import Bags
from mempool.types.keys import key_table


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLayout:
    """Where the keys of a table that trains them lie.

    Attributes:
        keys: What the table says of them.
        sections: Of the table of keys; rows: keys of each; slots: distance of two sections' first rows.
        width: Of a row.
    """

    keys: TrainedKeySpec
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
            keys=schema.keys,
            sections=made.keys.sections,
            rows=made.keys.rows,
            slots=made.num_slots // made.keys.sections,
            width=made.value_dim,
        )

    def section_queries(self, queries_BHD: Tensor) -> Tensor:
        """[B, H, D] -> [B, S, W]: with product keys the parts of each head."""
        return queries_BHD.reshape(queries_BHD.shape[0], self.sections, self.width)

    def candidates(self, topk: int) -> int:
        """How many of each section have a part in the top-k."""
        return min(topk, self.rows)

    def chosen(self, scores_BSC: Tensor, rows_BSC: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """The slots by (score descending, id ascending), of each section's best: the same as of all keys at once.

        Args:
            scores_BSC: Float32, best first.
            rows_BSC: Int64, of the table of keys.

        Returns:
            Scores [B, H, K] float32 and slot ids [B, H, K] int64.
        """
        if not self.keys.product:
            return scores_BSC, rows_BSC
        count, ways = scores_BSC.shape[-1], self.keys.ways
        first_S = torch.arange(self.sections, dtype=torch.int64, device=rows_BSC.device) * self.slots
        index = (rows_BSC - first_S[:, None]).view(-1, ways, count)
        parts = scores_BSC.view(-1, ways, count)
        lists = [_List(parts[:, way], index[:, way], self.rows) for way in range(ways)]
        # In pairs, and then one list after the other, as a layer merges those of keys of its own: to the same bits.
        paired = [_merged(lists[way : way + 2], topk) for way in range(0, ways, 2)]
        found = _merged(paired, topk)
        shape = (scores_BSC.shape[0], self.keys.heads, topk)
        return found.scores.view(shape), found.ids.view(shape)

    def key_bags(self, ids_BHK: Tensor, weights_BHK: Tensor) -> Bags:
        """The rows whose products with a query are its slots' scores, as B * S bags in the order of
        ``section_queries``, with these weights."""
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

    def rows_of(self, ids_M: Tensor) -> Tensor:
        """All rows of heads [M], or of slots [M] with flat keys, in order."""
        if not self.keys.product:
            return ids_M
        ways = self.keys.ways
        first_MP = (ways * ids_M[:, None] + torch.arange(ways, dtype=torch.int64, device=ids_M.device)) * self.slots
        rows = torch.arange(self.rows, dtype=torch.int64, device=ids_M.device)
        return (first_MP[:, :, None] + rows).reshape(-1)


class _List(NamedTuple):
    """The best of a part of the keys, or of several together, best first.

    Attributes:
        scores: [M, C] float32.
        ids: [M, C] int64, below ``worth``.
        worth: What an id of the parts before counts for.
    """

    scores: Tensor
    ids: Tensor
    worth: int


def _merged(lists: Sequence[_List], topk: int) -> _List:
    """The best sums of one of each, one list after the other."""
    found = lists[0]
    for other in lists[1:]:
        # By id, so that places are in the order of ids, which decides among equal sums.
        (scores1, ids1), (scores2, ids2) = _by_id(found), _by_id(other)
        at1, at2 = kernels.best_sums(scores1, scores2, min(topk, scores1.shape[1] * scores2.shape[1]))
        ids = ids1.gather(1, at1) * other.worth + ids2.gather(1, at2)
        found = _List(scores1.gather(1, at1) + scores2.gather(1, at2), ids, found.worth * other.worth)
    return found


def _by_id(found: _List) -> tuple[Tensor, Tensor]:
    ids, order = found.ids.sort(dim=-1)
    return found.scores.gather(-1, order), ids
