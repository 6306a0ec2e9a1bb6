"""Which rows of the table of keys a query meets, and the slots that are chosen by them. Pure.

Legend: B bags, H heads, S sections (2 per head with product keys, 1 with flat keys), K top-k, C candidates of one, D
key dim, n half-keys of one, W width of a row.
"""

from dataclasses import dataclass
from typing import Self

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
        stride: Of its slot ids.
        sections: Of the table of keys; rows: keys of each; slots: distance of two sections' first rows.
        width: Of a row.
    """

    keys: TrainedKeySpec
    stride: int
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
            stride=schema.stride,
            sections=made.keys.sections,
            rows=made.keys.rows,
            slots=made.num_slots // made.keys.sections,
            width=made.value_dim,
        )

    def section_queries(self, queries_BHD: Tensor) -> Tensor:
        """[B, H, D] -> [B, S, W]: with product keys both halves of each head."""
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
        count = scores_BSC.shape[-1]
        # By id, so that places are in the order of ids, which decides among equal sums.
        rows_BSC, order = rows_BSC.sort(dim=-1)
        halves = scores_BSC.gather(-1, order).view(-1, 2, count)
        scores1, scores2 = halves[:, 0].contiguous(), halves[:, 1].contiguous()
        at1, at2 = kernels.product_select(scores1, scores2, topk, count)
        first_S = torch.arange(self.sections, dtype=torch.int64, device=rows_BSC.device) * self.slots
        index = (rows_BSC - first_S[:, None]).view(-1, 2, count)
        ids = index[:, 0].gather(1, at1) * self.stride + index[:, 1].gather(1, at2)
        scores = scores1.gather(1, at1) + scores2.gather(1, at2)
        shape = (scores_BSC.shape[0], self.keys.heads, topk)
        return scores.view(shape), ids.view(shape)

    def key_bags(self, ids_BHK: Tensor, weights_BHK: Tensor) -> Bags:
        """The rows whose products with a query are its slots' scores, as B * S bags in the order of
        ``section_queries``, with these weights."""
        num_bags, heads, found = ids_BHK.shape
        if self.keys.product:
            index = torch.stack((ids_BHK // self.stride, ids_BHK % self.stride), dim=2)
            first_H2 = (
                torch.arange(self.sections, dtype=torch.int64, device=ids_BHK.device).view(heads, 2, 1) * self.slots
            )
            rows, weights = index + first_H2, weights_BHK[:, :, None].expand(-1, -1, 2, -1)
        else:
            rows, weights = ids_BHK, weights_BHK
        ends = torch.arange(num_bags * self.sections + 1, dtype=torch.int64, device=ids_BHK.device) * found
        return Bags(ids=rows.reshape(-1), weights=weights.reshape(-1).contiguous(), offsets=ends)

    def rows_of(self, ids_M: Tensor) -> Tensor:
        """All rows of heads [M], or of slots [M] with flat keys, in order."""
        if not self.keys.product:
            return ids_M
        first_M2 = (2 * ids_M[:, None] + torch.arange(2, dtype=torch.int64, device=ids_M.device)) * self.slots
        rows = torch.arange(self.rows, dtype=torch.int64, device=ids_M.device)
        return (first_M2[:, :, None] + rows).reshape(-1)
