"""Gathers that are checked, their rows still to be read, and what of them is read at once."""

from collections.abc import Callable, Generator, Hashable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mempool.shard.hosted import HostedTable
from mempool.shard.reading.pieces import parts_of
from mempool.shard.reading.pinned import PinnedTable
from mempool.shard.work.jobs import Begun
from mempool.shard.work.pace import Pace
from mempool.types import GatherRequest
from mempool.types.bags import Bags

T = TypeVar("T")
Space = Callable[[tuple[int, ...], torch.dtype], Tensor | None]
"""Gives memory of the CPU for an answer of that shape and dtype, contiguous; None: it has none, new memory is taken."""
Pieces = Generator[None, None, T]
"""Work in pieces: others are served where it yields."""
Read = HostedTable | PinnedTable
"""What is read: a table, or one of its versions."""


@dataclass(frozen=True, slots=True, eq=False)
class BegunGather(Begun):
    """A gather that is fenced, checked and sized: its rows are still to be summed, in the same turn."""

    request: GatherRequest
    table: Read
    bags: Bags
    dtype: torch.dtype
    out: Tensor | None

    @property
    def like(self) -> Hashable:
        return self.table.table_id, self.dtype, self.bags.weights is None, self.request.remember


def row_bytes(table: Read) -> int:
    """Bytes of a row of values, of all blocks here, taken as float32."""
    return 4 * table.storage.width


def form_of(table: Read, bags: Bags, dtype: torch.dtype) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of a gather's answer as it is sent."""
    storage = table.storage
    if dtype != torch.float8_e4m3fn:
        return (bags.num_bags, storage.width), dtype
    return (bags.num_bags, 0 if storage.packed_sums is None else storage.packed_sums.row_bytes), torch.uint8


def parts_at_once(bags: Bags, row_bytes: int, pace: Pace) -> Iterator[tuple[int, int, Bags]]:
    """Bags some at a time: see ``parts_of``."""
    return parts_of(bags, lambda: pace.piece_bytes // max(1, row_bytes))
