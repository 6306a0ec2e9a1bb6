"""One try of asking a table's keys: the queries in messages to all who have some, their best merged.

Legend: B queries, H heads, K top-k, D key dim, G groups of a query.
"""

from functools import partial

import torch
from torch import Tensor

from mempool.client.routing.fanout import Fanout
from mempool.client.routing.plan import merge_candidates
from mempool.client.routing.slices import as_one, slices, some_at_a_time
from mempool.errors import Internal
from mempool.types import Envelope, ProductKeySpec, ScoreReply, ScoreRequest, ShardHost, Stamp

SCORED_BYTES = 12
"""Of one key that a shard found: its score and id; and of a group that a query names."""


async def score(
    fanout: Fanout,
    queries: Tensor,
    *,
    topk: int,
    pin: str = "",
    groups: Tensor | None = None,
    group_scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Stamp]]:
    """See ``Attempt.score``; and the stamps of all answers.

    Args:
        fanout: The way to the shards of the plan.
        pin: Of the version that is read; "": the newest.
    """
    plan = fanout.plan
    num_queries, num_heads, dim = queries.shape
    named = 0 if groups is None else groups.shape[1] * SCORED_BYTES
    pieces = slices(num_queries, num_heads * max(topk * SCORED_BYTES, dim * queries.element_size() + named))

    async def ask_some(host: ShardHost, envelope: Envelope, first: int, end: int) -> ScoreReply:
        request = ScoreRequest(
            envelope=envelope,
            queries=queries[first:end],
            topk=topk,
            pin=pin,
            groups=None if groups is None else groups[first:end],
            group_scores=None if group_scores is None else group_scores[first:end],
        )
        reply = await host.score(request)
        sent = request.queries.nbytes + named * (end - first)
        fanout.traffic.add(sent=sent, received=reply.scores.nbytes + reply.ids.nbytes)
        fanout.saw(reply.stamp.table_version)
        return reply

    async def ask(host: ShardHost, envelope: Envelope) -> list[ScoreReply]:
        return await some_at_a_time([partial(ask_some, host, envelope, *piece) for piece in pieces])

    flat = not isinstance(plan.schema.keys, ProductKeySpec)
    owners = [route.info for route in plan.routes if route.blocks[0] == 0]
    if not flat:
        owners = [owner for owner, _ in plan.head_owners]
    answers = await fanout.each([(owner, ask) for owner in owners])
    stamps = [reply.stamp for some in answers for reply in some]
    found = [(as_one([reply.scores for reply in some]), as_one([reply.ids for reply in some])) for some in answers]
    if flat:
        return *merge_candidates([scores for scores, _ in found], [ids for _, ids in found], topk=topk), stamps
    shape = (queries.shape[0], queries.shape[1], topk)
    scores = torch.empty(shape, dtype=torch.float32, device="cpu")
    ids = torch.empty(shape, dtype=torch.int64, device="cpu")
    for (owner, heads), some, (of_scores, of_ids) in zip(plan.head_owners, answers, found, strict=True):
        for reply in some:
            if reply.heads != heads:
                raise Internal(f"shard {owner.shard} answered heads {reply.heads}; it owns {heads}.")
        scores[:, list(heads)], ids[:, list(heads)] = of_scores, of_ids
    return scores, ids, stamps
