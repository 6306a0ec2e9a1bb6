"""What of a ``Table`` is about keys in the pool.

Legend: B bags, M rows, H heads, K top-k, D key dim, n half-keys, V value dim.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from mempool.client.gathers.links import Link
from mempool.client.gathers.untraced import untraced
from mempool.client.keys.autograd import key_scores
from mempool.client.keys.layout import KeyLayout
from mempool.client.lookup import Lookup, PendingLookup, answered, checked_queries, checked_topk, has_flat_keys
from mempool.client.opening.waiting import Begin, Run
from mempool.client.routing.router import Router
from mempool.client.rows import Rows, checked_key_rows, checked_matrix, require_distinct
from mempool.client.training.link import TableLink
from mempool.errors import InvalidRequest
from mempool.types import TableSchema, TrainedKeySpec

if TYPE_CHECKING:
    from mempool.client.table import Table


class Scored(NamedTuple):
    """Slots that queries chose. Tables with flat keys have no dimension H: both are [B, K]. Of hierarchical keys H
    is what the queries have.

    Attributes:
        ids: [B, H, K] int64, slot ids by (score descending, id ascending) per head.
        scores: [B, H, K] float32, dot products of query and key; of hierarchical keys, of query and slot's key, and
            of query and group's, added.
    """

    ids: Tensor
    scores: Tensor


class Keyed:
    """A part of ``Table``."""

    schema: TableSchema
    _router: Router
    _run: Run
    _begin: Begin
    _link: TableLink
    _rows: Rows
    _anchor: Tensor
    _open_keys: "Callable[[Table], Table] | None"
    _keys: "Table | None" = None

    @property
    def trains_keys(self) -> bool:
        """Whether its keys are trained in the pool: it was made with keys that have an optimizer."""
        return isinstance(self.schema.keys, TrainedKeySpec)

    @property
    def keys(self) -> "Table":
        """The keys that are trained in the pool, as a table of their own: to freeze them (``requires_grad_``), for
        their optimizer's state, and for a learning rate of their own in a ``PoolOptimizer``.

        Raises:
            InvalidRequest: The table trains no keys.
            NotFound: It was dropped.
            PoolUnreachable: Nobody answered within the pool's timeout_s.
        """
        if not self.trains_keys:
            raise InvalidRequest(
                f"table {self.schema.name!r} trains no keys in the pool; make it with keys=mempool.ProductKeys(..., "
                "optimizer=...), mempool.FlatKeys(..., optimizer=...) or mempool.HierarchicalKeys(...)"
            )
        if self._keys is None:
            assert self._open_keys is not None, "who opens a table that trains keys says how"
            self._keys = self._open_keys(cast("Table", self))
        return self._keys

    @property
    def step_links(self) -> list[TableLink]:
        """For those who step: what is committed with the table, itself first."""
        return [self._link, *([self.keys.link] if self.trains_keys else ())]

    @untraced
    def score(self, queries: Tensor, topk: int) -> Scored:
        """The slots that queries choose, by keys that are trained in the pool; differentiable in queries and keys.

        Weigh the scores, and ``gather`` the values by them: ``table.gather(ids.flatten(1), weights.flatten(1))``. The
        gradient of the keys is pushed by the backward pass and held for ``commit``, as that of the values is. Scores
        are of the newest keys: every commit that was acknowledged before is in them. A graph break under torch.compile.

        Args:
            queries: [B, H, D] for product keys, for hierarchical keys of any H, [B, D] for flat keys; floating, finite,
                on any device.
            topk: Slots per head, at most num_slots; with hierarchical keys at most the slots of ``probes`` groups.

        Returns:
            ids and scores [B, H, K] ([B, K] for flat keys), on the device of queries.

        Raises:
            InvalidRequest: The table trains no keys, or queries are not what they ask for; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
            DataLoss: Pages of the keys are gone.
        """
        keys = self.keys
        return self.scored_by(keys.link, queries, topk, anchor=keys._anchor, trained=keys.requires_grad)

    @untraced
    def scored_by(self, link: Link, queries: Tensor, topk: int, *, anchor: Tensor, trained: bool) -> Scored:
        """For ``mempool.nn``: as ``score``, whose updates of the keys go through ``link``."""
        own = checked_queries(queries, schema=self.schema)
        count = checked_topk(topk, schema=self.schema)
        layout = KeyLayout.of(self.schema)
        assert layout is not None, "it trains keys"

        def ask(queries: Tensor) -> tuple[Tensor, Tensor]:
            scores, ids, _ = self._run(self._router.score(self.schema.table_id, queries=queries, topk=count))
            return scores, ids

        scores, ids = key_scores(link, layout, queries, own, ask, anchor=anchor, trained=trained)
        if has_flat_keys(self.schema):
            scores, ids = scores.squeeze(1), ids.squeeze(1)
        return Scored(ids, scores)

    @untraced
    def lookup_async(self, queries: Tensor, topk: int) -> PendingLookup:
        """Start a ``lookup``, and go on: ``result()`` of what this answers waits for it and is what ``lookup`` returns,
        without gradients.

        Raises:
            InvalidRequest: As ``lookup``; nothing was sent. Other errors are the result's.
        """
        checked = checked_queries(queries, schema=self.schema)
        count = checked_topk(topk, schema=self.schema)
        pending = self._begin(
            self._router.lookup(self.schema.table_id, queries=checked, topk=count, reply_dtype=self._link.wire_dtype)
        )
        return PendingLookup(self.schema.name, pending, partial(answered, schema=self.schema, device=queries.device))

    @untraced
    def lookup(self, queries: Tensor, topk: int) -> Lookup:
        """Score queries against the keys in the pool, take the best ``topk`` per head, softmax, weighted sum of values.

        Where the keys are trained (``trains_keys``) it is differentiable in queries, keys and values. Otherwise nothing
        of it is: to train the values, pass its ids and weights to ``gather``.

        Args:
            queries, topk: As of ``score``.

        Returns:
            ids, scores, weights [B, H, K] ([B, K] for flat keys) and values [B, value_dim], on the device of queries.

        Raises:
            InvalidRequest: The table has no keys in the pool, or queries are not what they ask for; nothing was sent.
            ShardUnavailable: A shard did not answer within the pool's timeout_s.
            DataLoss: Pages of the table are gone.
        """
        if self.trains_keys and torch.is_grad_enabled():
            ids, scores = self.score(queries, topk)
            weights = torch.softmax(scores, dim=-1)
            return Lookup(ids, scores, weights, self._pooled(ids.flatten(1), weights.flatten(1)))
        checked = checked_queries(queries, schema=self.schema)
        count = checked_topk(topk, schema=self.schema)
        lookup, _ = self._run(
            self._router.lookup(self.schema.table_id, queries=checked, topk=count, reply_dtype=self._link.wire_dtype)
        )
        return answered(lookup, schema=self.schema, device=queries.device)

    def _pooled(self, ids: Tensor, weights: Tensor) -> Tensor:
        """``gather``."""
        raise NotImplementedError

    @untraced
    def read_keys(self, ids: Tensor | None = None) -> Tensor:
        """Keys kept in the pool, float32 on the CPU.

        Args:
            ids: [M] int64: slots for flat keys, heads for product keys; for hierarchical keys group g is g, and slot i
                is i + ``schema.keys.groups``. None means all.

        Returns:
            Flat and hierarchical keys: [M, D]. Product keys: [M, ways, n, D / ways].
        """
        key_ids, shape = checked_key_rows(ids, schema=self.schema)
        layout = KeyLayout.of(self.schema)
        if layout is not None:
            return self.keys.rows(layout.rows_of(key_ids)).reshape(shape)
        return self._rows.read("keys", key_ids).reshape(shape)

    @untraced
    def write_keys(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Overwrite keys kept in the pool; the state of their optimizer stays.

        Args:
            keys: [M, D] for flat and hierarchical keys, [M, ways, n, D / ways] for product keys; floating and finite.
            ids: [M] int64, distinct, as of ``read_keys``; None means all.

        Raises:
            InvalidRequest: The table has no keys in the pool, or keys or ids are not as they must be; nothing was sent.
        """
        key_ids, shape = checked_key_rows(ids, schema=self.schema)
        table = self.schema.name
        checked = checked_matrix("keys", keys, shape, torch.float32, table=table)
        if not bool(torch.isfinite(checked).all()):
            raise InvalidRequest(f"table {table!r}: keys must be finite; a key of NaN or inf makes every lookup NaN.")
        require_distinct(key_ids, table=table)
        layout = KeyLayout.of(self.schema)
        if layout is not None:
            self.keys.write(layout.rows_of(key_ids), checked.reshape(-1, layout.width))
            return
        self._rows.write("keys", key_ids, checked.reshape(key_ids.shape[0], -1))
