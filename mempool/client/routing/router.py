"""Calls on a pool's tables: finds the shards, follows placement, tries again within one deadline.

All methods run on one event loop; threads and autograd are not its business. A Replan error (another epoch or
incarnation) makes it ask for the view again and plan the whole call anew; what was answered before is thrown away.
Errors that no retry can heal pass at once.
"""

import asyncio
import random
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mempool.agreement.writes import MAX_OPEN, Writer
from mempool.client.experts.asked import Experts
from mempool.client.keys.layout import KeyLayout
from mempool.client.keys.scoring import KeyTables
from mempool.client.lookup import Lookup
from mempool.client.routing.attempt import Attempt, LookupRecord, Seen
from mempool.client.routing.fanout import Dial, Fanout, Traffic, Versions
from mempool.client.routing.patience import WaitingFor
from mempool.client.routing.plan import TablePlan, make_plan, newer_view
from mempool.client.routing.remembered import Remembered
from mempool.client.routing.retry import Backoff
from mempool.client.routing.together import Together
from mempool.client.routing.tries import Tries
from mempool.client.routing.whereabouts import Whereabouts
from mempool.errors import NotFound, PoolUnreachable, StalePlacement, Unavailable
from mempool.types import PoolApi, ShardHost, ShardInfo, TableView, TrainedKeySpec
from mempool.types.bags import Bags
from mempool.types.messages import ReplyDtype
from mempool.types.running import Clock

T = TypeVar("T")

_REFRESH_TIMEOUT_S = 5.0


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
        clock: Seconds, monotonic: what deadlines that go along with calls are told by.
        first_lookup_id: Where its numbers of lookups begin, and what its writes are told from others' by; shards
            remember those of all clients by them alone, so it must be a random one. None: it is.

    Attributes:
        pin: Of the version that is read; "": the newest.
        keys: By which keys are read that are trained in a table of their own, at a pin of theirs; None: by this.
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
        clock: Clock = time.monotonic,
        first_lookup_id: int | None = None,
    ) -> None:
        where = Whereabouts(name=pool) if isinstance(pool, str) else pool
        self.tries = Tries(where, timeout_s=timeout_s, backoff=backoff, jitter=jitter, clock=clock)
        self.traffic = Traffic()
        self._api = api
        self._dial = dial
        self._patience_s = patience_s
        self._plans: dict[int, TablePlan] = {}
        self.versions = Versions()
        self._names: dict[int, str] = {}  # of all tables ever seen, for messages
        self._refreshing: dict[int, asyncio.Lock] = {}
        self._numbering = threading.Lock()
        self._next_lookup_id = secrets.randbits(62) if first_lookup_id is None else first_lookup_id
        self._writer = Writer(self._next_lookup_id + 1)
        self._room_for_writes = asyncio.Semaphore(MAX_OPEN)
        self.remembered = Remembered()
        self._key_tables = KeyTables()
        self.pin = ""
        self.keys: Router | None = None

    def at(self, pin: str, *, keys: "Router | None" = None) -> "Router":
        """The same way, on which every read is of the version that a pin keeps. No look-up of it is remembered.

        keys: By which keys are read that are trained in a table of their own.
        """
        router = copy(self)
        router.pin, router._next_lookup_id, router.keys = pin, secrets.randbits(62), keys
        return router

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
                self.remembered.left(table_id, gone)
        return self._plans[table_id].view

    def forget(self, table_id: int) -> None:
        """Keep nothing more of a table, which was dropped."""
        self._plans.pop(table_id, None)
        self.versions.forget(table_id)
        self._refreshing.pop(table_id, None)
        self.remembered.forget(table_id)

    def release(self, record: LookupRecord) -> Callable[[], None]:
        """A function that lets shards forget a lookup, with the next gather; for any thread, at any moment."""
        return self.remembered.release(record)

    async def gather(
        self,
        table_id: int,
        *,
        bags: Bags,
        remember: bool = False,
        reply_dtype: ReplyDtype = "float32",
        experts: Experts | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Tensor, LookupRecord]:
        """Weighted sums of rows: values [B, V] float32, and what an update needs to know of this lookup.

        Args:
            remember: Let the shards keep ids and weights for an update to come.
            reply_dtype: Of replies whose columns are not partial sums; those are always float32.
            experts: Rows are experts, of which this is asked: values [B, V - I].

        Raises:
            ShardUnavailable: A shard did not answer within the deadline.
            DataLoss: Pages of the table are gone.
            NotFound: The table was dropped.
        """
        lookup_id = self.next_lookup_id(bags)
        values, record = await self.call(
            table_id,
            lambda attempt: attempt.gather(
                bags, lookup_id=lookup_id, remember=remember, reply_dtype=reply_dtype, experts=experts
            ),
            timeout_s=timeout_s,
        )
        self.remembered.add(record)
        return values, record

    def next_lookup_id(self, bags: Bags) -> int:
        """Of a gather, and of as many messages as it may take, whatever the plan. For any thread."""
        num_bags = bags.num_bags
        with self._numbering:
            lookup_id = self._next_lookup_id
            self._next_lookup_id += num_bags or 1
        return lookup_id

    def plan_now(self, table_id: int) -> TablePlan | None:
        """The plan, if there is one. For any thread."""
        return self._plans.get(table_id)

    async def score(
        self, table_id: int, *, queries: Tensor, topk: int, timeout_s: float | None = None
    ) -> tuple[Tensor, Tensor, Seen]:
        """Top-k of keys in the pool by (score descending, id ascending): scores and ids [B, H, K] (float32, int64)."""
        schema = (await self._plan(table_id)).schema
        layout = KeyLayout.of(schema)
        if layout is not None:
            timeout_s = self.timeout_s if timeout_s is None else timeout_s
            keys = self.keys or self
            return await self._key_tables.score(keys, schema, layout, queries, topk=topk, timeout_s=timeout_s)
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
        keys_elsewhere = isinstance((await self._plan(table_id)).schema.keys, TrainedKeySpec)
        scores, ids, scored = await self.score(table_id, queries=queries, topk=topk, timeout_s=end_s - loop.time())
        weights = torch.softmax(scores, dim=-1)
        num_bags, heads, found = ids.shape
        bags = Bags(
            ids=ids.clamp(min=0).reshape(-1),  # -1 is no candidate: score -inf, weight 0
            weights=weights.reshape(-1),
            offsets=torch.arange(num_bags + 1, dtype=torch.int64, device="cpu") * (heads * found),
        )
        values, record = await self.gather(table_id, bags=bags, reply_dtype=reply_dtype, timeout_s=end_s - loop.time())
        if keys_elsewhere:  # at versions of their own
            return Lookup(ids=ids, scores=scores, weights=weights, values=values), record.seen
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
        self,
        table_id: int,
        *,
        array: str,
        ids: Tensor,
        rows: Tensor,
        fresh: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Overwrite rows [M, ..]. Atomic on one shard, not across shards; repeating it is safe.

        fresh: As of ``WriteRowsRequest``.
        """
        async with self._room_for_writes:
            with self._writer.begin() as write:
                await self.call(
                    table_id,
                    lambda attempt: attempt.write_rows(array, ids, rows, write=write, fresh=fresh),
                    timeout_s=timeout_s,
                )

    async def step_count(self, table_id: int, *, to: int | None = None, timeout_s: float | None = None) -> int:
        """How many steps the table's optimizer counts; ``to`` makes it that many, at every owner."""

        async with self._room_for_writes:
            return await self.call(
                table_id, lambda attempt: attempt.step_count(to=to, writer=self._writer), timeout_s=timeout_s
            )

    async def call(
        self,
        table_id: int,
        once: Callable[[Attempt], Awaitable[T]],
        *,
        timeout_s: float | None = None,
        again: bool = True,
    ) -> T:
        """Run ``once`` on the table's plan until it succeeds, the deadline ends, or an error that no retry can heal.

        ``once`` may be cut off anywhere and run again on another plan, so all it sends must bear repetition.

        Args:
            again: False: one try, whatever it ends with.
        """
        attempt: Attempt | None = None

        async def run() -> T:
            nonlocal attempt
            attempt = self._attempt(await self._plan(table_id))
            return await once(attempt)

        async def check() -> None:
            if attempt is not None:
                await self._require_current((attempt.plan,))

        async def refresh() -> bool:
            return attempt is not None and await self._refresh_all((attempt.plan,))

        return await self.tries.run(
            lambda: self.name_of(table_id),
            run,
            refresh=refresh,
            waiting_for=lambda: attempt.fanout.waiting_for if attempt else (),
            timeout_s=timeout_s,
            again=again,
            check=check,
            silence_s=self._patience_s,
        )

    async def together(
        self,
        table_ids: Sequence[int],
        once: Callable[[Together], Awaitable[T]],
        *,
        waiting_for: WaitingFor = tuple,
        timeout_s: float | None = None,
    ) -> T:
        """As ``call``, on the plans of several tables at once: where one of them is old, all are asked for again.

        Args:
            table_ids: In the order of the step; at least one.
            waiting_for: (shard, address) of others that have not answered yet and are waited for too.
        """
        together: Together | None = None

        async def run() -> T:
            nonlocal together
            together = Together({table_id: self._attempt(await self._plan(table_id)) for table_id in table_ids})
            return await once(together)

        def plans() -> tuple[TablePlan, ...]:
            return () if together is None else tuple(attempt.plan for attempt in together.attempts.values())

        async def check() -> None:
            await self._require_current(plans())

        async def refresh() -> bool:
            return await self._refresh_all(plans())

        return await self.tries.run(
            lambda: ", ".join(self.name_of(table_id) for table_id in table_ids),
            run,
            refresh=refresh,
            waiting_for=lambda: (*waiting_for(), *(together.waiting_for if together else ())),
            timeout_s=timeout_s,
            check=check,
            silence_s=self._patience_s,
        )

    def known_version(self, table_id: int) -> int | None:
        """The newest version of a table that was acknowledged to this client or seen in a reply; None: none yet."""
        return self.versions.get(table_id)

    def name_of(self, table_id: int) -> str:
        """The table's name, for messages."""
        return self._names.get(table_id, f"with id {table_id}")

    def holders(self, table_id: int) -> tuple[ShardInfo, ...]:
        """Those that own anything of a table, as is known; none where nothing is."""
        plan = self._plans.get(table_id)
        return () if plan is None else plan.owners

    def one_shard_here(self, table_id: int) -> bool:
        """Whether all of a table is on one shard of this process, as is known."""
        plan = self._plans.get(table_id)
        return self.tries.where.embedded and plan is not None and len(plan.owners) == 1

    def dial(self, info: ShardInfo) -> ShardHost:
        """The host of a shard, without waiting; may raise Unavailable."""
        return self._dial(info)

    def _attempt(self, plan: TablePlan) -> Attempt:
        table_id = plan.table_id
        fanout = Fanout(plan, dial=self._dial, traffic=self.traffic, versions=self.versions)
        return Attempt(fanout, take_released=partial(self.remembered.take, table_id), pin=self.pin)

    async def _require_current(self, plans: tuple[TablePlan, ...]) -> None:
        """Raises StalePlacement, or NotFound, where one of these plans is old by now."""
        await self._refresh_all(plans)
        for plan in plans:
            if self._plans.get(plan.table_id) is not plan:
                raise StalePlacement(f"table {plan.schema.name!r} has moved while a shard kept silent")

    async def _plan(self, table_id: int) -> TablePlan:
        if table_id not in self._plans:
            for view in await self._api.tables():
                self.adopt(view)
        if table_id not in self._plans and table_id in self._names:
            # The list may be of a shard that has not heard of it yet; NotFound of a name is what the pool itself says.
            try:
                view = await self._api.table(self._names[table_id])
            except NotFound:
                raise self._dropped(table_id) from None
            if view.schema.table_id > table_id:
                raise self._made_again(table_id, view)
            self.adopt(view)
            if view.schema.table_id < table_id:
                raise PoolUnreachable(
                    f"who answers for {self.tries.where.pool} has not heard of table {view.schema.name!r} with the id "
                    f"{table_id} yet"
                )
        plan = self._plans.get(table_id)
        if plan is None:
            raise self._dropped(table_id)
        return plan

    async def _refresh_all(self, plans: Sequence[TablePlan]) -> bool:
        """Ask for the tables' views; answers whether any plan is a newer one now."""
        if len(plans) == 1:
            await self._refresh(plans[0])
        else:
            await asyncio.gather(*(self._refresh(plan) for plan in plans))
        return any(self._plans.get(plan.table_id) is not plan for plan in plans)

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
            if view.schema.table_id < schema.table_id:
                return  # of a shard that has not heard that this one was dropped: ids ascend
            if view.schema.table_id != schema.table_id:
                self.forget(schema.table_id)
                raise self._made_again(schema.table_id, view)
            self.adopt(view)

    def _made_again(self, table_id: int, view: TableView) -> NotFound:
        name = view.schema.name
        return NotFound(
            f"table {name!r} of {self.tries.where.pool} was dropped and made again (id {table_id}, now "
            f"{view.schema.table_id}); open the new one with pool.table({name!r}), or let what uses this one go on "
            f"with the new one: pool.reopen({name!r})."
        )

    def _dropped(self, table_id: int) -> NotFound:
        name = self._names.get(table_id)
        pool = self.tries.where.pool
        if name is None:
            return NotFound(f"{pool} has no table with id {table_id}; it may have been dropped.")
        return NotFound(f"table {name!r} of {pool} was dropped; make it again with create_table.")
