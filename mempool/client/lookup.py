"""The answer of a lookup with keys in the pool, and the checks of its queries before anything is sent.

Legend: B bags, H heads, K top-k, D key dim, V value dim.
"""

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from mempool.client.counts import as_count
from mempool.client.gathers.untraced import untraced
from mempool.client.opening.waiting import Pending
from mempool.client.routing.attempt import Seen
from mempool.errors import InvalidRequest
from mempool.types import FlatKeySpec, OwnKeySpec, TableSchema, TrainedKeySpec
from mempool.types.keys import grouping_of, topk_problem


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


class PendingLookup:
    """A lookup under way: made by ``Table.lookup_async``. All threads may use it; nothing of it is differentiable.

    Args:
        table: Its table's name.
        pending: What was begun: answers with heads, on the CPU.
        finish: Makes of them what the caller gets.
    """

    def __init__(self, table: str, pending: Pending[tuple[Lookup, Seen]], finish: Callable[[Lookup], Lookup]) -> None:
        self._table = table
        self._pending = pending
        self._finish = finish

    def __repr__(self) -> str:
        return f"PendingLookup({self._table!r}, {'done' if self.done() else 'pending'})"

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            f"a look-up under way in table {self._table!r} cannot be pickled; take its result() in this process"
        )

    @untraced
    def done(self) -> bool:
        """Whether ``result`` would not wait."""
        return self._pending.done()

    @untraced
    def result(self) -> Lookup:
        """Wait for what ``Table.lookup`` answers.

        Raises:
            ShardUnavailable: A shard did not answer within the pool's timeout_s of the start.
            DataLoss: Pages of the table are gone.
            InvalidRequest: The pool was closed meanwhile.
        """
        return self._finish(self._pending.result()[0])


def has_flat_keys(schema: TableSchema) -> bool:
    """Whether queries have no heads."""
    keys = schema.keys
    return isinstance(keys, FlatKeySpec) or (isinstance(keys, TrainedKeySpec) and not keys.product and not keys.groups)


def checked_queries(queries: Tensor, *, schema: TableSchema) -> Tensor:
    """A caller's queries as shards take them, after all checks.

    Args:
        queries: [B, H, D] for product keys, for hierarchical keys of any H, [B, D] for flat keys; floating, on any
            device.

    Returns:
        [B, H, D] (H = 1 for flat keys) float32 on the CPU, a copy of its own.

    Raises:
        InvalidRequest: Naming what is wrong, the value and its position.
    """
    name, keys = schema.name, schema.keys
    if keys is None:
        raise InvalidRequest(
            f"table {name!r} has no keys in the pool, so queries cannot be looked up in it: score in your model and "
            "call gather(ids, weights), or make the table with keys=ProductKeys(...), FlatKeys(...) or "
            "HierarchicalKeys(...)."
        )
    if not isinstance(queries, Tensor) or not queries.is_floating_point():
        kind = str(queries.dtype) if isinstance(queries, Tensor) else type(queries).__name__
        raise InvalidRequest(f"lookup in table {name!r}: queries must be a floating torch.Tensor, not {kind}.")
    if isinstance(keys, OwnKeySpec):
        raise InvalidRequest(f"table {name!r} has the keys of another table: look up in that one.")
    shared = grouping_of(keys, schema.num_slots) is not None and queries.dim() == 3 and queries.shape[1] > 0
    heads = queries.shape[1] if shared else 1 if isinstance(keys, FlatKeySpec) else keys.heads
    tail = [keys.key_dim] if has_flat_keys(schema) else [heads, keys.key_dim]
    if list(queries.shape[1:]) != tail or queries.dim() == 0:
        wanted = ", ".join(map(str, tail)) if grouping_of(keys, schema.num_slots) is None else f"heads, {keys.key_dim}"
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
    grouping = grouping_of(schema.keys, schema.num_slots)
    if isinstance(schema.keys, TrainedKeySpec) and grouping is not None:
        text = topk_problem(grouping, schema.keys.probes, count)
        if text is not None:
            raise InvalidRequest(f"lookup in table {schema.name!r}: topk = {count}, {text}.")
    return count


def answered(lookup: Lookup, *, schema: TableSchema, device: torch.device) -> Lookup:
    """The answer as the caller gets it: on its device, of flat keys without their one head, [B, 1, K] -> [B, K]."""
    if has_flat_keys(schema):
        ids, scores, weights = (part.squeeze(1) for part in lookup[:3])
        lookup = Lookup(ids, scores, weights, lookup.values)
    return Lookup(*(part.to(device) for part in lookup))
