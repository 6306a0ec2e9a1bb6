"""The table in this process: torch's embedding_bag, beside which all others are measured, and the product's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mempool import kernels
from mempool.bench.cases.inputs import Tables
from mempool.bench.serve.contenders.contender import LookUp
from mempool.bench.serve.shapes import Pairs, TableSize

TORCH_BAG = "torch embedding_bag"
KERNEL = "mempool's kernel"


def table_rows(table: TableSize) -> Tensor:
    """All rows, in huge pages where the system has them, as a shard's are."""
    tables = Tables("cpu", table.seed)
    return table.fill(tables.empty(table.num_slots, table.value_dim, torch.float32))


def embedding_bag(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sums [B, W] of ids and weights [B, K]."""
    return torch.nn.functional.embedding_bag(ids, rows, mode="sum", per_sample_weights=weights)


def here(table: TableSize) -> list[LookUp]:
    """torch's and the product's, on the same memory."""
    rows = table_rows(table)
    shift = max(0, min(12, table.num_slots.bit_length() - 3))
    paged = kernels.Paged(rows, torch.arange(-(-table.num_slots >> shift), dtype=torch.int32), shift)

    def kernel(pairs: Pairs) -> Tensor:
        bags, size = pairs.ids.shape
        offsets = torch.arange(0, bags * size + 1, size)
        return kernels.weighted_sum(paged, pairs.ids.flatten(), pairs.weights.flatten(), offsets)

    return [
        LookUp(TORCH_BAG, table, lambda pairs: embedding_bag(rows, pairs.ids, pairs.weights)),
        LookUp(KERNEL, table, kernel),
    ]
