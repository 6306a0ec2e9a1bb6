"""Gathers on the caller's own thread: no event loop, no task and no timer on the way of a call that needs no retry.

What cannot be had so is asked for by the router, from the beginning: it knows of retries, placements and errors.
"""

import asyncio
import os
from collections.abc import Callable

from torch import Tensor

from mempool.client.routing.attempt import LookupRecord, gather_request, gather_slices, lookup_record, require_blocks
from mempool.client.routing.fanout import envelope_of
from mempool.client.routing.plan import Part, TablePlan, merge_values, split
from mempool.client.routing.router import Router
from mempool.errors import MempoolError
from mempool.types import AtOnceShard, GatherReply, ShardInfo
from mempool.types.bags import Bags
from mempool.types.messages import ReplyDtype

DialAtOnce = Callable[[ShardInfo], AtOnceShard | None]
"""The way to a shard for threads that wait themselves; None where there is none now. Raises nothing."""
_NARROW_END = 2**32
_Wait = Callable[[], GatherReply | None]


class DirectGathers:
    """The gathers of one client. Any thread of the process that made it may ask, but its event loop's.

    Args:
        router: What is known of tables and shards.
        dial: Leads to shards.
        loop: The one that all else of this client runs on.
        patience_s: After so much silence of a shard the router is asked.
    """

    def __init__(
        self, router: Router, dial: DialAtOnce, *, loop: asyncio.AbstractEventLoop, patience_s: float = 5.0
    ) -> None:
        self.loop = loop
        self._router = router
        self._dial = dial
        self._patience_s = min(patience_s, router.timeout_s)
        self._pid = os.getpid()

    def gather(
        self, table_id: int, bags: Bags, *, remember: bool, reply_dtype: ReplyDtype = "float32"
    ) -> tuple[Tensor, LookupRecord] | None:
        """As the router's; None where that is to be asked."""
        if self._pid != os.getpid() or asyncio._get_running_loop() is self.loop:
            return None
        plan = self._router.plan_now(table_id)
        if plan is None or len(gather_slices(plan, bags)) > 1:
            return None
        parts = [part for part in split(plan, bags) if part.kept is None or part.bags.num_pairs]
        lookup_id = self._router.next_lookup_id(bags)
        begun: list[_Wait] = []
        found: list[GatherReply | None] = []
        try:
            for part in parts:
                wait = self._begin(plan, part, lookup_id, remember, reply_dtype, alone=len(parts) == 1)
                if wait is None:
                    break
                begun.append(wait)
        finally:
            found += [wait() for wait in begun]  # of all that were asked: their answers come, whatever others say
        replies = [reply for reply in found if reply is not None]
        for reply in replies:
            self._router.versions.saw(table_id, reply.stamp.table_version)
        record = lookup_record(
            plan,
            bags,
            lookup_id=lookup_id,
            lookups=1,
            stamps=[reply.stamp for reply in replies],
            remembered_by=parts[: len(begun)] if remember else (),
        )
        self._router.remembered.add(record)
        if len(replies) < len(parts):
            self._router.release(record)()  # who has answered remembers it, and nobody will ask for it
            return None
        for part, reply in zip(parts, replies, strict=True):
            require_blocks(reply.blocks, part.route)
        values = merge_values(
            plan,
            [(part.route, reply.values) for part, reply in zip(parts, replies, strict=True)],
            num_bags=bags.num_bags,
        )
        return values, record

    def _begin(
        self, plan: TablePlan, part: Part, lookup_id: int, remember: bool, reply_dtype: ReplyDtype, *, alone: bool
    ) -> _Wait | None:
        router, route = self._router, part.route
        shard = self._dial(route.info)
        if shard is None:
            return None
        narrow_ids = plan.schema.num_slots <= _NARROW_END
        released = router.remembered.take(plan.table_id, route.shard)
        request = gather_request(
            part.bags,
            route,
            envelope_of(plan, route.info, router.versions),
            lookup_id=lookup_id,
            remember=remember,
            release=released,
            reply_dtype=reply_dtype,
        )
        try:
            wait = shard.begin_gather(request, timeout_s=self._patience_s, narrow_ids=narrow_ids, alone=alone)
        except MempoolError:  # the router finds it, too
            wait = None
        if wait is None:
            router.remembered.give_back(plan.table_id, route.shard, released)
            return None

        def waited() -> GatherReply | None:
            try:
                reply = wait()
            except MempoolError:  # as before
                reply = None
            if reply is None:
                router.remembered.give_back(plan.table_id, route.shard, released)
            else:
                router.traffic.add(sent=part.bags.num_bytes, received=reply.values.nbytes)
            return reply

        return waited
