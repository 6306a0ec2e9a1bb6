"""Gathers on the caller's own thread: no event loop, no task and no timer on the way of a call that needs no retry.

What cannot be had so is asked for by the router, from the beginning: it knows of retries, placements and errors.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from mempool.client.direct.asking import NARROW_END, Asking, Wait
from mempool.client.routing.attempt import (
    LookupRecord,
    gather_request,
    is_one_message,
    lookup_record,
    messages_of,
    require_blocks,
    seen_of,
    those_named,
)
from mempool.client.routing.fanout import envelope_of
from mempool.client.routing.plan import ShardRoute, TablePlan, merge_values, split, whole_values
from mempool.types import AtOnceShard, GatherReply
from mempool.types.bags import Bags
from mempool.types.messages import ReplyDtype

_NOBODY: frozenset[tuple[int, int]] = frozenset()


def gather_directly(
    asking: Asking, table_id: int, bags: Bags, *, remember: bool, reply_dtype: ReplyDtype = "float32"
) -> tuple[Tensor, LookupRecord] | None:
    """As the router's; None where that is to be asked."""
    plan = asking.router.plan_now(table_id)
    if plan is None or not asking.possible:
        return None
    if plan.alone is not None:
        if not is_one_message(plan.alone, bags):
            return None
        return _gather_alone(asking, plan, plan.alone, bags, remember=remember, reply_dtype=reply_dtype)
    return _gather_of_several(asking, plan, bags, remember=remember, reply_dtype=reply_dtype)


def _gather_alone(
    asking: Asking, plan: TablePlan, route: ShardRoute, bags: Bags, *, remember: bool, reply_dtype: ReplyDtype
) -> tuple[Tensor, LookupRecord] | None:
    """Where one shard has all of the table: of a small call, what the others need takes as long as the rest."""
    router, table_id, info = asking.router, plan.table_id, route.info
    lookup_id = router.next_lookup_id(bags)
    released = router.remembered.take(table_id, info.shard)

    def begin(shard: AtOnceShard) -> Wait[GatherReply] | None:
        return _begin(asking, plan, lookup_id, remember, reply_dtype, True, route, bags, released, shard)

    reply = asking.one(info, begin)
    record = LookupRecord(
        table_id=table_id,
        lookup_id=lookup_id,
        lookups=1,
        bags=bags,
        seen=seen_of(plan, () if reply is None else (reply.stamp,)),
        remembered_by=frozenset(((info.shard, info.incarnation),)) if remember else _NOBODY,
        stamps=() if reply is None else (reply.stamp,),
    )
    if remember:
        router.remembered.add(record)
    if reply is None:
        router.remembered.give_back(table_id, info.shard, released)
        router.release(record)()
        return None
    router.versions.saw(table_id, reply.stamp.table_version)
    router.traffic.add(sent=bags.num_bytes, received=reply.values.nbytes)
    require_blocks(reply.blocks, route)
    return whole_values(plan, route, reply.values), record


def _gather_of_several(
    asking: Asking, plan: TablePlan, bags: Bags, *, remember: bool, reply_dtype: ReplyDtype
) -> tuple[Tensor, LookupRecord] | None:
    router, table_id = asking.router, plan.table_id
    every = split(plan, bags)
    parts = those_named(every)
    if messages_of(parts) > 1:
        return None
    lookup_id = router.next_lookup_id(bags)
    released = [router.remembered.take(table_id, part.route.shard) for part in parts]
    begin = partial(_begin, asking, plan, lookup_id, remember, reply_dtype, len(parts) == 1)
    answers = asking.each(
        [
            (part.route.info, partial(begin, part.route, part.bags, ids))
            for part, ids in zip(parts, released, strict=True)
        ]
    )
    replies = [reply for reply in answers if reply is not None]
    sent = received = 0
    for part, ids, reply in zip(parts, released, answers, strict=True):
        if reply is None:
            router.remembered.give_back(table_id, part.route.shard, ids)
        else:
            sent, received = sent + part.bags.num_bytes, received + reply.values.nbytes
    router.traffic.add(sent=sent, received=received)
    record = lookup_record(
        plan,
        bags,
        lookup_id=lookup_id,
        lookups=1,
        stamps=[reply.stamp for reply in replies],
        remembered_by=parts if remember else (),
        parts=every if remember else (),
    )
    router.versions.saw(table_id, record.seen.newest_version)
    router.remembered.add(record)
    if len(replies) < len(parts):
        router.release(record)()  # who has answered remembers it, and nobody will ask for it
        return None
    for part, reply in zip(parts, replies, strict=True):
        require_blocks(reply.blocks, part.route)
    found = [(part, reply.values) for part, reply in zip(parts, replies, strict=True)]
    return merge_values(plan, found, num_bags=bags.num_bags), record


def _begin(
    asking: Asking,
    plan: TablePlan,
    lookup_id: int,
    remember: bool,
    reply_dtype: ReplyDtype,
    alone: bool,
    route: ShardRoute,
    bags: Bags,
    released: tuple[int, ...],
    shard: AtOnceShard,
) -> Wait[GatherReply] | None:
    request = gather_request(
        bags,
        route,
        envelope_of(plan, route.info, asking.router.versions),
        lookup_id=lookup_id,
        remember=remember,
        release=released,
        reply_dtype=reply_dtype,
        pin=asking.router.pin,
    )
    narrow = plan.schema.num_slots <= NARROW_END
    return shard.begin_gather(request, timeout_s=asking.patience_s, narrow_ids=narrow, alone=alone)
