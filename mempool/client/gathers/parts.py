"""Several gathers of rows as one: each row that they name is asked for once, and each takes its own of the answer.

Legend: L rows of a part, U of the whole, V value dim.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mempool.client.routing.attempt import LookupRecord, SortedPairs
from mempool.types.bags import Bags


def merged(parts: Sequence[Bags]) -> tuple[Bags, list[Tensor]]:
    """Every row of parts once, [U] as bags of one pair each, and where each part's are, [L] int64."""
    ids, places = torch.unique(torch.cat([part.ids for part in parts]), return_inverse=True)
    ends = torch.arange(ids.shape[0] + 1, dtype=torch.int64, device=ids.device)
    return Bags(ids=ids, weights=None, offsets=ends), list(places.split([part.num_pairs for part in parts]))


def part_of(values_UV: Tensor, record: LookupRecord, part: Bags, places_L: Tensor) -> tuple[Tensor, LookupRecord]:
    """What a gather of a part would answer, [L, V]. Shards remember nothing of it: its update says which rows it is of.

    Args:
        record: Of the whole, which shards were not asked to remember.
    """
    return values_UV.index_select(0, places_L), replace(record, bags=part, lookups=1, sorted=SortedPairs())
