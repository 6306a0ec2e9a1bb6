"""The answer of a lookup with keys in the pool, and the checks of its queries before anything is sent.

Legend: B bags, H heads, K top-k, D key dim, V value dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mempool.client.counts import as_count
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, TableSchema


class Lookup(NamedTuple):
    """What a lookup found. Tables with flat keys have no dimension H: their first three are [B, K].

    Attributes:
        ids: [B, H, K] int64, slot ids by (score descending, id ascending) per head.
        scores: [B, H, K] float32, dot products of query and key.
        weights: [B, H, K] float32, softmax of the scores per head.
        values: [B, V] float32, the weighted sum over all heads.
    """

    ids: Tensor
    scores: Tensor
    weights: Tensor
    values: Tensor


def checked_queries(queries: Tensor, *, schema: TableSchema) -> Tensor:
    """A caller's queries as shards take them, after all checks.

    Args:
        queries: [B, H, D] for product keys, [B, D] for flat keys; floating, on any device.

    Returns:
        [B, H, D] (H = 1 for flat keys) float32 on the CPU, a copy of its own.

    Raises:
        InvalidRequest: Naming what is wrong, the value and its position.
    """
    name, keys = schema.name, schema.keys
    if keys is None:
        raise InvalidRequest(
            f"table {name!r} has no keys in the pool, so queries cannot be looked up in it: score in your model and "
            "call gather(ids, weights), or make the table with keys=ProductKeys(...) or FlatKeys(...)."
        )
    if not isinstance(queries, Tensor) or not queries.is_floating_point():
        kind = str(queries.dtype) if isinstance(queries, Tensor) else type(queries).__name__
        raise InvalidRequest(f"lookup in table {name!r}: queries must be a floating torch.Tensor, not {kind}.")
    heads = 1 if isinstance(keys, FlatKeySpec) else keys.heads
    tail = [keys.key_dim] if isinstance(keys, FlatKeySpec) else [heads, keys.key_dim]
    if list(queries.shape[1:]) != tail or queries.dim() == 0:
        wanted = ", ".join(map(str, tail))
        raise InvalidRequest(
            f"lookup in table {name!r}: queries has shape {list(queries.shape)}, its keys ask for [B, {wanted}]."
        )
    own = queries.detach().to(device="cpu", dtype=torch.float32, copy=True, memory_format=torch.contiguous_format)
    bad = torch.nonzero(~torch.isfinite(own))
    if bad.numel():
        position = bad[0].tolist()
        raise InvalidRequest(
            f"lookup in table {name!r}: queries{position} = {float(own[tuple(position)])}; queries must be finite."
        )
    return own.reshape(own.shape[0], heads, keys.key_dim)


def checked_topk(topk: object, *, schema: TableSchema) -> int:
    """How many slots per head, from 1 to num_slots, any kind of integer.

    Raises:
        InvalidRequest: It is something else.
    """
    count = as_count(topk)
    if count is None or not 1 <= count <= schema.num_slots:
        raise InvalidRequest(
            f"lookup in table {schema.name!r}: topk = {topk!r} must be a whole number from 1 to its "
            f"{schema.num_slots} slots."
        )
    return count


def without_heads(lookup: Lookup) -> Lookup:
    """The lookup of flat keys, whose one head is nobody's concern: [B, 1, K] -> [B, K]."""
    return Lookup(
        ids=lookup.ids.squeeze(1),
        scores=lookup.scores.squeeze(1),
        weights=lookup.weights.squeeze(1),
        values=lookup.values,
    )
