"""Calls on a pool's tables: finds the shards, follows placement, tries again within one deadline.

All methods run on one event loop; threads and autograd are not its business. A Replan error (another epoch or
incarnation) makes it ask for the view again and plan the whole call anew; what was answered before is thrown away.
Errors that no retry can heal pass at once.
"""

import asyncio
import random
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch
from torch import Tensor

from mempool.client.lookup import Lookup
from mempool.client.routing.attempt import Attempt, LookupRecord, Seen
from mempool.client.routing.fanout import Dial, Fanout, Traffic
from mempool.client.routing.plan import TablePlan, make_plan, newer_view
from mempool.client.routing.retry import Backoff
from mempool.client.routing.tries import Tries
from mempool.client.routing.whereabouts import Whereabouts
from mempool.errors import NotFound, StalePlacement, Unavailable
from mempool.types import PoolApi, StepId, TableView
from mempool.types.bags import Bags
from mempool.types.messages import ReplyDtype

T = TypeVar("T")

_REFRESH_TIMEOUT_S = 5.0
_MAX_RELEASED = 65_536
_MAX_RELEASED_PER_GATHER = 1_024


class Router:
    """The client's way to a pool's tables.

    Args:
        api: The controller, or what stands for it.
        dial: Gives the host of a shard at once, without waiting; called for every request, so it keeps its connections
            itself. May raise Unavailable.
        pool: The pool, or only its name, for messages.
        timeout_s: Deadline of a call that names none, seconds.
        patience_s: After so much silence of a shard, the view is asked for again, and followed if it is a new one.
        backoff: Waits between tries.
        jitter: Gives a number from 0 to 1 at each call.
    """

    def __init__(
        self,
        api: PoolApi,
        *,
        dial: Dial,
        pool: Whereabouts | str = "",
        timeout_s: float = 30.0,
        patience_s: float = 5.0,
        backoff: Backoff | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        where = Whereabouts(name=pool) if isinstance(pool, str) else pool
        self.tries = Tries(where, timeout_s=timeout_s, backoff=backoff, jitter=jitter)
        self.traffic = Traffic()
        self._api = api
        self._dial = dial
        self._patience_s = patience_s
        self._plans: dict[int, TablePlan] = {}
        self._acknowledged: dict[int, int] = {}
        self._names: dict[int, str] = {}  # of all tables ever seen, for messages
        self._refreshing: dict[int, asyncio.Lock] = {}
        # Shards remember lookups of all their clients by this number alone, so clients start at random places.
        self._next_lookup_id = secrets.randbits(62)
        # Filled by finalizers, on any thread and at any moment: appending to a deque needs no lock.
        self._released: deque[tuple[int, tuple[int, ...], int]] = deque(maxlen=_MAX_RELEASED)
        self._to_release: dict[tuple[int, int], deque[int]] = {}

    @property
    def timeout_s(self) -> float:
        """Deadline of a call that names none, seconds."""
        return self.tries.timeout_s

    def close(self) -> None:
        """Try nothing again any more: calls under way end with their next failure."""
        self.tries.close()

    async def open(self, name: str, *, timeout_s: float | None = None) -> TableView:
        """The view of a table by name, asked for now.

        Raises:
            NotFound: There is no such table.
            PoolUnreachable: Nobody answered within the deadline.
        """

        async def ask() -> TableView:
            return self.adopt(await self._api.table(name))

        return await self.tries.run(name, ask, timeout_s=timeout_s)

    def adopt(self, view: TableView) -> TableView:
        """Take over a view that was heard of elsewhere; answers what is known now, which may be newer."""
        table_id = view.schema.table_id
        self._names[table_id] = view.schema.name
        known = self._plans.get(table_id)
        if known is None:
            self._plans[table_id] = make_plan(view)
        else:
            newer = newer_view(known.view, view)
            if newer is not known.view:
                plan = self._plans[table_id] = make_plan(newer)
                gone = {route.shard for route in known.routes} - {route.shard for route in plan.routes}
                for shard in gone:  # they remember nothing of the table any more
                    self._to_release.pop((table_id, shard), None)
        return self._plans[table_id].view

    def forget(self, table_id: int) -> None:
        """Keep nothing more of a table, which was dropped."""
        self._plans.pop(table_id, None)
        self._acknowledged.pop(table_id, None)
        self._refreshing.pop(table_id, None)
        self._to_release = {key: waiting for key, waiting in self._to_release.items() if key[0] != table_id}

    def release(self, record: LookupRecord) -> Callable[[], None]:
        """A function that lets shards forget a lookup, with the next gather; for any thread, at any moment."""
        shards = tuple(shard for shard, _ in record.remembered_by)
        numbers = range(record.lookup_id, record.lookup_id + record.lookups)
        entries = [(record.table_id, shards, number) for number in numbers]
        released = self._released  # the function keeps neither the router nor the record alive
        return lambda: released.extend(entries)

    async def gather(
        self,
        table_id: int,
        *,
        bags: Bags,
        remember: bool = False,
        reply_dtype: ReplyDtype = "float32",
        timeout_s: float | None = None,
    ) -> tuple[Tensor, LookupRecord]:
        """Weighted sums of rows: values [B, V] float32, and what ``update`` needs to know of this lookup.

        Args:
            remember: Let the shards keep ids and weights for an update to come.
            reply_dtype: Of replies whose columns are not partial sums; those are always float32.

        Raises:
            ShardUnavailable: A shard did not answer within the deadline.
            DataLoss: Pages of the table are gone.
            NotFound: The table was dropped.
        """
        lookup_id = self._next_lookup_id
        self._next_lookup_id += max(1, bags.num_bags)  # as many messages as it may take, whatever the plan

        return await self.call(
            table_id,
            lambda attempt: attempt.gather(bags, lookup_id=lookup_id, remember=remember, reply_dtype=reply_dtype),
            timeout_s=timeout_s,
        )

    async def update(
        self,
        record: LookupRecord,
        grads: Tensor,
        *,
        step_id: StepId,
        sequence: int,
        hold: bool = True,
        want_weight_grad: bool = True,
        timeout_s: float | None = None,
    ) -> Tensor | None:
        """The gradient of a lookup: grads [B, V] float32 or bfloat16 in, d_weights [L] float32 out if wanted.

        ``sequence`` names the update: trying again, or repeating the call, does not make a second one.
        """

        return await self.call(
            record.table_id,
            lambda attempt: attempt.update(
                record, grads, step_id=step_id, sequence=sequence, hold=hold, want_weight_grad=want_weight_grad
            ),
            timeout_s=timeout_s,
        )

    async def discard(self, table_id: int, step_id: StepId, *, timeout_s: float | None = None) -> None:
        """Drop what shards hold of a step."""

        await self.call(table_id, lambda attempt: attempt.discard(step_id), timeout_s=timeout_s)

    async def score(
        self, table_id: int, *, queries: Tensor, topk: int, timeout_s: float | None = None
    ) -> tuple[Tensor, Tensor, Seen]:
        """Top-k of keys in the pool by (score descending, id ascending): scores and ids [B, H, K] (float32, int64)."""

        return await self.call(table_id, lambda attempt: attempt.score(queries, topk=topk), timeout_s=timeout_s)

    async def lookup(
        self,
        table_id: int,
        *,
        queries: Tensor,
        topk: int,
        reply_dtype: ReplyDtype = "float32",
        timeout_s: float | None = None,
    ) -> tuple[Lookup, Seen]:
        """Score, top-k, softmax per head in float32, gather; and what state of the table was seen.

        queries: [B, H, D] float32 ([B, 1, D] for flat keys), checked by the caller.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + (self.timeout_s if timeout_s is None else timeout_s)
        scores, ids, scored = await self.score(table_id, queries=queries, topk=topk, timeout_s=end_s - loop.time())
        weights = torch.softmax(scores, dim=-1)
        num_bags, heads, found = ids.shape
        bags = Bags(
            ids=ids.clamp(min=0).reshape(-1),  # -1 is no candidate: score -inf, weight 0
            weights=weights.reshape(-1),
            offsets=torch.arange(num_bags + 1, dtype=torch.int64, device="cpu") * (heads * found),
        )
        values, record = await self.gather(table_id, bags=bags, reply_dtype=reply_dtype, timeout_s=end_s - loop.time())
        seen = Seen(
            epoch=record.seen.epoch,
            oldest_version=min(scored.oldest_version, record.seen.oldest_version),
            newest_version=max(scored.newest_version, record.seen.newest_version),
        )
        return Lookup(ids=ids, scores=scores, weights=weights, values=values), seen

    async def read_rows(self, table_id: int, *, array: str, ids: Tensor, timeout_s: float | None = None) -> Tensor:
        """Rows [M, ..] of a named array in its dtype; ids [M] int64: slots, or heads for the keys of product keys."""

        return await self.call(table_id, lambda attempt: attempt.read_rows(array, ids), timeout_s=timeout_s)

    async def write_rows(
        self, table_id: int, *, array: str, ids: Tensor, rows: Tensor, timeout_s: float | None = None
    ) -> None:
        """Overwrite rows [M, ..]. Atomic on one shard, not across shards; repeating it is safe."""

        await self.call(table_id, lambda attempt: attempt.write_rows(array, ids, rows), timeout_s=timeout_s)

    async def step_count(self, table_id: int, *, to: int | None = None, timeout_s: float | None = None) -> int:
        """How many steps the table's optimizer counts; ``to`` makes it that many, at every owner."""

        return await self.call(table_id, lambda attempt: attempt.step_count(to=to), timeout_s=timeout_s)

    async def call(
        self, table_id: int, once: Callable[[Attempt], Awaitable[T]], *, timeout_s: float | None = None
    ) -> T:
        """Run ``once`` on the table's plan until it succeeds, the deadline ends, or an error that no retry can heal.

        ``once`` may be cut off anywhere and run again on another plan, so all it sends must bear repetition.
        """
        fanout: Fanout | None = None

        async def run() -> T:
            nonlocal fanout
            plan = await self._plan(table_id)
            fanout = Fanout(plan, dial=self._dial, traffic=self.traffic, acknowledged=self._acknowledged)
            attempt = Attempt(fanout, take_released=lambda shard: self._take_released(table_id, shard))
            return await self._while_current(fanout.plan, once(attempt))

        async def refresh() -> None:
            if fanout is not None:
                await self._refresh(fanout.plan)

        return await self.tries.run(
            self._names.get(table_id, f"with id {table_id}"),
            run,
            refresh=refresh,
            waiting_for=lambda: fanout.waiting_for if fanout else (),
            timeout_s=timeout_s,
        )

    async def _while_current(self, plan: TablePlan, attempt: Awaitable[T]) -> T:
        """The result of ``attempt``, unless its plan gets old while a shard keeps silent.

        A host that is gone sends no error. Where its shard lives again elsewhere the view says so, long before any
        connection notices.

        Raises:
            StalePlacement: There is a newer plan.
        """
        task = asyncio.ensure_future(attempt)
        try:
            while not (await asyncio.wait({task}, timeout=self._patience_s))[0]:
                await self._refresh(plan)
                if self._plans.get(plan.schema.table_id) is not plan:
                    raise StalePlacement(f"table {plan.schema.name!r} has moved while a shard kept silent")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _plan(self, table_id: int) -> TablePlan:
        plan = self._plans.get(table_id)
        if plan is None:
            for view in await self._api.tables():
                self.adopt(view)
            plan = self._plans.get(table_id)
            if plan is None:
                raise self._dropped(table_id)
        return plan

    async def _refresh(self, plan: TablePlan) -> None:
        """Ask for a table's view, unless somebody has done so since ``plan``. Without an answer the old one stays."""
        schema = plan.schema
        async with self._refreshing.setdefault(schema.table_id, asyncio.Lock()):
            if self._plans.get(schema.table_id) is not plan:
                return
            try:
                async with asyncio.timeout(_REFRESH_TIMEOUT_S):
                    view = await self._api.table(schema.name)
            except NotFound:
                self.forget(schema.table_id)
                raise self._dropped(schema.table_id) from None
            except (Unavailable, TimeoutError):
                return  # the shards may answer all the same: the data path does not need the controller
            if view.schema.table_id != schema.table_id:
                self.forget(schema.table_id)
                raise NotFound(
                    f"table {schema.name!r} of {self.tries.where.pool} was dropped and made again "
                    f"(id {schema.table_id}, now {view.schema.table_id}); open the new one with "
                    f"pool.table({schema.name!r})."
                )
            self.adopt(view)

    def _dropped(self, table_id: int) -> NotFound:
        name = self._names.get(table_id)
        pool = self.tries.where.pool
        if name is None:
            return NotFound(f"{pool} has no table with id {table_id}; it may have been dropped.")
        return NotFound(f"table {name!r} of {pool} was dropped; make it again with create_table.")

    def _take_released(self, table_id: int, shard: int) -> tuple[int, ...]:
        while self._released:
            released_table, shards, lookup_id = self._released.popleft()
            plan = self._plans.get(released_table)
            for released_shard in shards:
                if plan is None or not any(route.shard == released_shard for route in plan.routes):
                    continue  # it has left the table, and forgot the lookup with its pages
                waiting = self._to_release.setdefault((released_table, released_shard), deque(maxlen=_MAX_RELEASED))
                waiting.append(lookup_id)
        mine = self._to_release.get((table_id, shard))
        if not mine:
            return ()
        return tuple(mine.popleft() for _ in range(min(len(mine), _MAX_RELEASED_PER_GATHER)))
