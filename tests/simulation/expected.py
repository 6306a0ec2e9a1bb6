"""What a shard is to answer of one version, by the oracle: of the pages that a placement gives it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mempool.types import Placement, TableSchema
from tests.simulation.network import Call
from tests.simulation.oracle import Oracle
from tests.simulation.tables import TRAINED


class Sums:
    """What lookups of one version are to be answered with, all asked of the oracle in one.

    A shard sums by itself what lies in pages of which it has the same blocks, then these sums.
    """

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._bags: list[tuple[Tensor, Tensor, Tensor]] = []
        self._calls: list[tuple[Call, list[tuple[int, int]]]] = []

    def ask(self, call: Call, placement: Placement) -> None:
        request, schema = call.request, self._oracle.schema
        first = schema.num_blocks - 1
        codes = (placement.owners == call.reply.stamp.shard) @ (1 << np.arange(first, -1, -1))  # of each page
        here = codes[request.ids.numpy() // schema.page_slots]
        asked = []
        for code in sorted(set(here.tolist()) - {0}):
            asked.append((code, len(self._bags)))
            self._bags.append(_only(torch.from_numpy(here == code), request))
        self._calls.append((call, asked))

    def found(self) -> Iterator[tuple[Call, Tensor]]:
        """Each call, and what it is to be answered with."""
        sums = self._oracle.gather_all(self._bags)
        first = self._oracle.schema.num_blocks - 1
        for call, asked in self._calls:
            parts = []
            for block in call.reply.blocks:
                begin, end = self._oracle.schema.block_columns(block)
                part = torch.zeros(len(call.request.offsets) - 1, end - begin)
                for code, number in asked:
                    if code >> (first - block) & 1:
                        part += sums[number][:, begin:end]
                parts.append(part)
            yield call, torch.cat(parts, dim=1).to(call.reply.values.dtype)


def rows_of(oracle: Oracle, call: Call, placement: Placement) -> tuple[Tensor, Tensor]:
    """What rows are to be answered, and what was."""
    request, reply, schema = call.request, call.reply, oracle.schema
    trained = request.ids < TRAINED
    ids, found = request.ids[trained], reply.rows[trained]
    if not ids.numel():
        return found, found
    rows = oracle.read(request.array, ids)
    if rows.shape[1] == schema.value_dim:
        columns = torch.cat([torch.arange(*schema.block_columns(block)) for block in reply.blocks])
        blocks = torch.cat([torch.full((_width(schema, block),), block) for block in reply.blocks])
    else:
        columns = blocks = torch.tensor(reply.blocks)
    owners = torch.tensor(placement.owners)[(ids // schema.page_slots)[:, None], blocks[None, :]]
    return torch.where(owners == reply.stamp.shard, rows[:, columns], torch.zeros_like(rows[:, columns])), found


def _only(here: Tensor, request: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of a request with no weight where they are not here: as a shard reads zeros there."""
    weights = torch.ones(request.ids.shape[0]) if request.weights is None else request.weights
    return request.ids, torch.where(here, weights, torch.zeros_like(weights)), request.offsets


def _width(schema: TableSchema, block: int) -> int:
    first, end = schema.block_columns(block)
    return end - first
