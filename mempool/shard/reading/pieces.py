"""How long reads are cut: bags, queries and rows that are read before others have their turn."""

from collections.abc import Callable, Iterator

import torch

from mempool.shard.pages.storage import Storage
from mempool.shard.work.pace import BAG_ROWS
from mempool.types import FlatKeySpec, OwnKeySpec, ProductKeySpec
from mempool.types.bags import Bags
from mempool.types.keys import grouping_of

SCORE_PIECE_PRODUCTS = 2**32
"""Products that scoring makes at once, but of at least ``_LEAST_QUERIES`` where these share each key that is read."""
_LEAST_QUERIES = 16
_GROUP_PRODUCTS = 2**17
"""That are made in the time which it takes to begin with the slots of another group."""


def queries_at_once(storage: Storage, topk: int, *, probes: int = 0) -> int:
    """How many queries are scored before others have their turn. probes: Groups that each looks into, if it does."""
    products, candidates = _products(storage, topk, probes)
    least = _LEAST_QUERIES if candidates <= products else 1  # candidates are each query's own
    return max(least, SCORE_PIECE_PRODUCTS // max(1, products + candidates))


def _products(storage: Storage, topk: int, probes: int) -> tuple[int, int]:
    """Products that one query takes, of all heads here, and the candidates that it chooses among by them."""
    schema = storage.schema
    if (grouping := grouping_of(schema.keys, schema.num_slots)) is not None:
        if not probes:
            return grouping.groups * schema.value_dim, 0
        return probes * max(grouping.size * schema.value_dim, _GROUP_PRODUCTS), 0
    if isinstance(schema.keys, OwnKeySpec):
        return schema.keys.sections * schema.keys.rows * schema.value_dim, 0
    if not isinstance(schema.keys, FlatKeySpec | ProductKeySpec):
        return 0, 0
    if schema.num_key_pages:
        _, _, half_keys, half_dim = storage.head_keys.shape
        best = min(topk, half_keys)  # of each half
        return len(storage.heads) * 2 * half_keys * half_dim, len(storage.heads) * best * best
    return schema.num_slots * schema.keys.key_dim, 0


def parts_of(bags: Bags, most: Callable[[], int]) -> Iterator[tuple[int, int, Bags]]:
    """Bags some at a time, as views: first, end, and they. A bag is never cut.

    most: Answers, of each part anew, the rows that it may read, but for one bag that alone reads more.
    """
    first = 0
    while first < bags.num_bags:
        rows = max(1, most())
        start = bags.offsets[first]
        # Empty bags are answered too, so there are so many bags at most as well.
        end = int(torch.searchsorted(bags.offsets, start + rows, right=True)) - 1
        end = max(min(end, first + max(1, rows // BAG_ROWS), bags.num_bags), first + 1)
        yield first, end, bags.some(first, end)
        first = end
