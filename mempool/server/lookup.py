"""Coordinates a thin client's lookup: scores at the owners of keys, merges, softmax, gathers at the owners of values.

The router does the work, on the IO loop; calls of other shards are leaf calls (Score, Gather) and never come back here.
"""

import torch

from mempool.client import Router
from mempool.client.keys.layout import KeyLayout
from mempool.client.lookup import checked_queries, checked_topk, has_flat_keys
from mempool.errors import RequestTooLarge
from mempool.types import FlatKeySpec, ShardInfo, Stamp, TableView
from mempool.wire.channels.channel import MAX_ANSWER_BYTES
from mempool.wire.codecs.lookup import LookupReply, LookupRequest

_FOUND_BYTES = 16  # of a slot that was found: its id, score and weight
_SCORED_BYTES = 12  # of one that a shard found: its id and score
_ENVELOPE_BYTES = 1024


class LookupCoordinator:
    """Answers ``MemoryService.Lookup``.

    Args:
        router: Finds the shards.
        info: The shard that coordinates; None on the controller's address, whose stamps say shard 0, incarnation 0.
        max_answer_bytes: What an answer may have; what would be larger is refused before any work.
    """

    def __init__(
        self, router: Router, *, info: ShardInfo | None = None, max_answer_bytes: int = MAX_ANSWER_BYTES
    ) -> None:
        self._router = router
        self._max_answer_bytes = max_answer_bytes
        self._shard, self._incarnation = (0, 0) if info is None else (info.shard, info.incarnation)

    async def lookup(self, request: LookupRequest) -> LookupReply:
        """The answer of a request.

        Raises:
            NotFound: There is no such table.
            InvalidRequest: The queries do not fit the table's keys, or topk is out of range.
            RequestTooLarge: The answer would be larger than a message may be.
            ShardUnavailable: A shard did not answer in time.
            DataLoss: Pages of the table are gone.
        """
        view = await self._router.open(request.table)
        schema = view.schema
        queries = request.queries
        if queries.dim() == 3 and queries.shape[1] == 1 and (schema.keys is None or has_flat_keys(schema)):
            queries = queries.squeeze(1)  # flat keys have no heads
        elif queries.dim() == 2 and getattr(schema.keys, "heads", 0) == 1 and not has_flat_keys(schema):
            queries = queries.unsqueeze(1)
        queries = checked_queries(queries, schema=schema)
        topk = checked_topk(request.topk, schema=schema)
        self._check_answer(view, queries, topk, 4 if request.reply_dtype == "float32" else 2)
        found, seen = await self._router.lookup(
            schema.table_id,
            queries=queries,
            topk=topk,
            reply_dtype=request.reply_dtype,
        )
        return LookupReply(
            stamp=Stamp(
                shard=self._shard,
                incarnation=self._incarnation,
                epoch=seen.epoch,
                table_version=seen.oldest_version,
            ),
            newest_table_version=seen.newest_version,
            ids=found.ids,
            scores=found.scores,
            weights=found.weights,
            values=found.values if request.reply_dtype == "float32" else found.values.to(torch.bfloat16),
        )

    def _check_answer(self, view: TableView, queries: torch.Tensor, topk: int, itemsize: int) -> None:
        """Shards size their own answers; this one has the scores of all heads, their weights and the values too."""
        num_bags, heads, _ = queries.shape
        num_bytes = num_bags * (heads * topk * _FOUND_BYTES + view.schema.value_dim * itemsize) + _ENVELOPE_BYTES
        layout = KeyLayout.of(view.schema)
        if layout is not None or isinstance(view.schema.keys, FlatKeySpec):
            # Every shard answers its best, and they meet here.
            if layout is not None and layout.keys.groups:
                found = heads * max(topk, layout.keys.probes)
            else:
                found = topk if layout is None else layout.sections * layout.candidates(topk)
            num_bytes = max(num_bytes, num_bags * found * _SCORED_BYTES * len(view.shards))
        if num_bytes > self._max_answer_bytes:
            raise RequestTooLarge(
                f"a lookup of {num_bags:,} queries in {heads} heads with topk = {topk:,} takes "
                f"{num_bytes:,} bytes of answers; an answer has at most {self._max_answer_bytes:,}. "
                "Ask for fewer queries at a time. Nothing was changed."
            )
