"""Coordinates a thin client's lookup: scores at the owners of keys, merges, softmax, gathers at the owners of values.

The router does the work, on the IO loop; calls of other shards are leaf calls (Score, Gather) and never come back here.
"""

import torch

from mempool.client import Router
from mempool.client.lookup import checked_queries, checked_topk
from mempool.types import ShardInfo, Stamp
from mempool.wire.codecs.lookup import LookupReply, LookupRequest


class LookupCoordinator:
    """Answers ``MemoryService.Lookup``.

    Args:
        router: Finds the shards.
        info: The shard that coordinates; None on the controller's address, whose stamps say shard 0, incarnation 0.
    """

    def __init__(self, router: Router, *, info: ShardInfo | None = None) -> None:
        self._router = router
        self._shard, self._incarnation = (0, 0) if info is None else (info.shard, info.incarnation)

    async def lookup(self, request: LookupRequest) -> LookupReply:
        """The answer of a request.

        Raises:
            NotFound: There is no such table.
            InvalidRequest: The queries do not fit the table's keys, or topk is out of range.
            ShardUnavailable: A shard did not answer in time.
            DataLoss: Pages of the table are gone.
        """
        view = await self._router.open(request.table)
        schema = view.schema
        queries = request.queries
        if queries.dim() == 3 and queries.shape[1] == 1 and schema.num_key_pages == 0:
            queries = queries.squeeze(1)  # flat keys have no heads
        elif queries.dim() == 2 and schema.num_key_pages == 1:
            queries = queries.unsqueeze(1)
        found, seen = await self._router.lookup(
            schema.table_id,
            queries=checked_queries(queries, schema=schema),
            topk=checked_topk(request.topk, schema=schema),
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
