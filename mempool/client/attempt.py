"""One try of each call on one plan: ask its shards together, await them, merge their replies.

Knows the messages of the ``Shard`` protocol. Retries, views and deadlines are the router's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mempool.client.bags import Bags
from mempool.client.plan import (
    Part,
    ShardRoute,
    TablePlan,
    merge_candidates,
    merge_values,
    merge_weight_grads,
    pick_columns,
    place_rows,
    rows_of,
    split,
)
from mempool.errors import ContextMissing, Internal, MempoolError, Replan
from mempool.types import (
    CommitReply,
    CommitRequest,
    DiscardRequest,
    Envelope,
    FlatKeySpec,
    GatherReply,
    GatherRequest,
    PrepareReply,
    PrepareRequest,
    ProductKeySpec,
    ReadRowsRequest,
    ScoreReply,
    ScoreRequest,
    ShardHost,
    ShardInfo,
    Stamp,
    StepId,
    UpdateReply,
    UpdateRequest,
    WriteRowsRequest,
)
from mempool.types.messages import ReplyDtype

T = TypeVar("T")
Call = Callable[[ShardHost, Envelope], Awaitable[T]]
Dial = Callable[[ShardInfo], ShardHost]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What state of a table a call's answers come from. Versions differ where a commit came between."""

    epoch: int
    oldest_version: int
    newest_version: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LookupRecord:
    """What is kept of a gather for its updates.

    Attributes:
        remembered_by: (shard, incarnation) of those that were asked to remember it, under the placement of ``seen``.
    """

    table_id: int
    lookup_id: int
    bags: Bags
    seen: Seen
    remembered_by: frozenset[tuple[int, int]]


class Traffic:
    """Tensor bytes of a router's requests and replies, headers not counted."""

    __slots__ = ("bytes_received", "bytes_sent")

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0


class Attempt:
    """The calls on one table, on one plan.

    Args:
        plan: The plan; every request says its epoch and each shard's incarnation.
        dial: Gives the host of a shard.
        take_released: Gives the lookup ids that this shard may forget, once.
        traffic: Is added to.
    """

    def __init__(
        self, plan: TablePlan, *, dial: Dial, take_released: Callable[[int], tuple[int, ...]], traffic: Traffic
    ) -> None:
        self.plan = plan
        self._dial = dial
        self._take_released = take_released
        self._traffic = traffic
        self._waiting: dict[int, str] = {}

    @property
    def waiting_for(self) -> tuple[tuple[int, str], ...]:
        """(shard, address) of those that were asked and have not answered, ascending."""
        return tuple(sorted(self._waiting.items()))

    async def gather(
        self, bags: Bags, *, lookup_id: int, remember: bool, reply_dtype: ReplyDtype
    ) -> tuple[Tensor, LookupRecord]:
        """Pooled values [B, V] float32, and what to keep for the update."""
        # A shard none of whose row pages are named would answer zeros.
        parts = [part for part in split(self.plan, bags) if part.kept is None or part.bags.num_pairs]

        async def ask(part: Part, host: ShardHost, envelope: Envelope) -> GatherReply:
            route = part.route
            request = GatherRequest(
                envelope=envelope,
                lookup_id=lookup_id,
                ids=part.bags.ids,
                weights=part.bags.weights,
                offsets=part.bags.offsets,
                remember=remember,
                release=self._take_released(route.shard),
                reply_dtype="float32" if route.partial else reply_dtype,
            )
            self._traffic.bytes_sent += part.bags.num_bytes
            reply = await host.gather(request)
            _require_blocks(reply.blocks, route)
            self._traffic.bytes_received += reply.values.nbytes
            return reply

        replies = await self._each([(part.route.info, partial(ask, part)) for part in parts])
        values = merge_values(
            self.plan,
            [(part.route, reply.values) for part, reply in zip(parts, replies, strict=True)],
            num_bags=bags.num_bags,
        )
        asked = frozenset((part.route.shard, part.route.info.incarnation) for part in parts)
        record = LookupRecord(
            table_id=self.plan.schema.table_id,
            lookup_id=lookup_id,
            bags=bags,
            seen=self._seen([reply.stamp for reply in replies]),
            remembered_by=asked if remember else frozenset(),
        )
        return values, record

    async def update(
        self,
        record: LookupRecord,
        grads: Tensor,
        *,
        step_id: StepId,
        sequence: int,
        hold: bool,
        want_weight_grad: bool,
        only: Collection[int] | None = None,
    ) -> Tensor | None:
        """Push the gradient of a lookup: [B, V] float32 or bfloat16 in, d_weights [L] float32 out if wanted.

        only: The shards to send to; None means all.
        """
        # A shard none of whose row pages are named is told all the same, of no bags: it is asked for this sequence
        # later.
        parts = [part for part in split(self.plan, record.bags) if only is None or part.route.shard in only]

        async def ask(part: Part, host: ShardHost, envelope: Envelope) -> UpdateReply:
            route = part.route
            empty = part.kept is not None and part.bags.num_pairs == 0
            bags = _no_bags(part.bags) if empty else part.bags
            part_grads = pick_columns(route, grads[:0] if empty else grads)
            known = (
                record.seen.epoch == self.plan.epoch and (route.shard, route.info.incarnation) in record.remembered_by
            )

            async def send(*, inline: bool) -> UpdateReply:
                self._traffic.bytes_sent += part_grads.nbytes + (bags.num_bytes if inline else 0)
                request = UpdateRequest(
                    envelope=envelope,
                    step_id=step_id,
                    sequence=sequence,
                    lookup_id=record.lookup_id,
                    blocks=route.blocks,
                    grads=part_grads,
                    hold=hold,
                    want_weight_grad=want_weight_grad,
                    ids=bags.ids if inline else None,
                    weights=bags.weights if inline else None,
                    offsets=bags.offsets if inline else None,
                )
                return await host.update(request)

            if known and not empty:
                try:
                    return await send(inline=False)
                except ContextMissing:
                    pass
            return await send(inline=True)

        replies = await self._each([(part.route.info, partial(ask, part)) for part in parts])
        if not want_weight_grad:
            return None
        grads_of_parts = []
        for part, reply in zip(parts, replies, strict=True):
            if reply.weight_grad is None:
                raise Internal(f"shard {part.route.shard} was asked for d_weights and answered none.")
            self._traffic.bytes_received += reply.weight_grad.nbytes
            grads_of_parts.append((part, reply.weight_grad))
        return merge_weight_grads(grads_of_parts, num_pairs=record.bags.num_pairs)

    async def prepare(self, step_id: StepId, *, sequences: tuple[int, ...], want_norm: bool) -> dict[int, PrepareReply]:
        """Ask every owner whether the step is complete there; replies by shard, ascending."""

        async def ask(owner: ShardInfo, host: ShardHost, envelope: Envelope) -> PrepareReply:
            return await host.prepare(
                PrepareRequest(
                    envelope=envelope,
                    step_id=step_id,
                    sequences=self._sequences(owner, sequences),
                    want_norm=want_norm,
                )
            )

        replies = await self._each([(owner, partial(ask, owner)) for owner in self.plan.owners])
        return {owner.shard: reply for owner, reply in zip(self.plan.owners, replies, strict=True)}

    async def commit(
        self, step_id: StepId, *, lr: float, grad_scale: float, sequences: tuple[int, ...], one_phase: bool
    ) -> dict[int, CommitReply]:
        """Tell every owner to apply the step; replies by shard, ascending."""

        async def ask(owner: ShardInfo, host: ShardHost, envelope: Envelope) -> CommitReply:
            return await host.commit(
                CommitRequest(
                    envelope=envelope,
                    step_id=step_id,
                    lr=lr,
                    grad_scale=grad_scale,
                    sequences=self._sequences(owner, sequences),
                    one_phase=one_phase,
                )
            )

        replies = await self._each([(owner, partial(ask, owner)) for owner in self.plan.owners])
        return {owner.shard: reply for owner, reply in zip(self.plan.owners, replies, strict=True)}

    async def discard(self, step_id: StepId) -> None:
        """Tell every owner to drop what it holds of the step."""

        async def ask(host: ShardHost, envelope: Envelope) -> object:
            return await host.discard(DiscardRequest(envelope=envelope, step_id=step_id))

        await self._each([(owner, ask) for owner in self.plan.owners])

    async def score(self, queries: Tensor, *, topk: int) -> tuple[Tensor, Tensor, Seen]:
        """Top-k of the table's keys by (score descending, id ascending): scores [B, H, K] float32, ids [B, H, K] int64.

        queries: [B, H, D] float32 for product keys, [B, 1, D] for flat keys.
        """
        request_bytes = queries.nbytes

        async def ask(host: ShardHost, envelope: Envelope) -> ScoreReply:
            self._traffic.bytes_sent += request_bytes
            reply = await host.score(ScoreRequest(envelope=envelope, queries=queries, topk=topk))
            self._traffic.bytes_received += reply.scores.nbytes + reply.ids.nbytes
            return reply

        if isinstance(self.plan.schema.keys, FlatKeySpec):
            owners = [route.info for route in self.plan.routes if route.blocks[0] == 0]
            replies = await self._each([(owner, ask) for owner in owners])
            scores, ids = merge_candidates(
                [reply.scores for reply in replies], [reply.ids for reply in replies], topk=topk
            )
            return scores, ids, self._seen([reply.stamp for reply in replies])
        shape = (queries.shape[0], queries.shape[1], topk)
        scores, ids = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.int64)
        replies = await self._each([(owner, ask) for owner, _ in self.plan.head_owners])
        for (owner, heads), reply in zip(self.plan.head_owners, replies, strict=True):
            if reply.heads != heads:
                raise Internal(f"shard {owner.shard} answered heads {reply.heads}; it owns {heads}.")
            scores[:, list(heads)], ids[:, list(heads)] = reply.scores, reply.ids
        return scores, ids, self._seen([reply.stamp for reply in replies])

    async def read_rows(self, array: str, ids: Tensor) -> Tensor:
        """Rows [M, ..] of a named array in its dtype; ids: [M] int64, slots, or heads for the keys of product keys."""
        targets = self._row_targets(array, ids)

        async def ask(target: "_RowTarget", host: ShardHost, envelope: Envelope) -> Tensor:
            request_ids = ids if target.kept is None else ids[target.kept]
            self._traffic.bytes_sent += request_ids.nbytes
            reply = await host.read_rows(ReadRowsRequest(envelope=envelope, array=array, ids=request_ids))
            self._traffic.bytes_received += reply.rows.nbytes
            return reply.rows

        replies = await self._each([(target.info, partial(ask, target)) for target in targets])
        return self._merged_rows(array, ids, targets, replies)

    async def write_rows(self, array: str, ids: Tensor, rows: Tensor) -> None:
        """Overwrite rows [M, ..] of a named array, in the table's order of columns."""

        async def ask(target: "_RowTarget", host: ShardHost, envelope: Envelope) -> object:
            kept_ids, kept_rows = (ids, rows) if target.kept is None else (ids[target.kept], rows[target.kept])
            if target.route is not None and array != "keys":
                kept_rows = self._columns_to_write(target.route, kept_rows)
            self._traffic.bytes_sent += kept_ids.nbytes + kept_rows.nbytes
            return await host.write_rows(
                WriteRowsRequest(
                    envelope=envelope, array=array, ids=kept_ids, blocks=self._row_blocks(array, target), rows=kept_rows
                )
            )

        targets = self._row_targets(array, ids)
        await self._each([(target.info, partial(ask, target)) for target in targets])

    def _row_targets(self, array: str, ids: Tensor) -> list["_RowTarget"]:
        schema = self.plan.schema
        if array == "keys" and isinstance(schema.keys, ProductKeySpec):
            owners = torch.tensor(self.plan.view.placement.key_owners)[ids]
            everyone = [
                _RowTarget(info=info, route=None, kept=torch.nonzero(owners == info.shard).reshape(-1))
                for info, _ in self.plan.head_owners
            ]
        else:
            everyone = [
                _RowTarget(info=route.info, route=route, kept=rows_of(route, ids, schema=schema))
                for route in self.plan.routes
                if array != "keys" or route.blocks[0] == 0
            ]
        # Of no ids at all everybody is asked: the width of a row is theirs to say.
        return [target for target in everyone if target.kept is None or target.kept.numel() or not ids.numel()]

    def _merged_rows(
        self, array: str, ids: Tensor, targets: Sequence["_RowTarget"], replies: Sequence[Tensor]
    ) -> Tensor:
        schema, first = self.plan.schema, replies[0]
        if len(targets) == 1 and targets[0].kept is None and targets[0].route is not None and targets[0].route.whole:
            return first
        if array == "keys":
            rows = torch.empty(ids.shape[0], first.shape[1], dtype=first.dtype)
            for target, reply in zip(targets, replies, strict=True):
                at = torch.arange(ids.shape[0]) if target.kept is None else target.kept
                if target.route is None:
                    rows[at] = reply
                else:
                    mine = self.plan.page_owners[ids[at] >> schema.page_shift, 0] == target.info.shard
                    rows[at[mine]] = reply[mine]
            return rows
        route = targets[0].route
        assert route is not None  # only keys are without
        # Where both widths are one number, every block is one column wide and both are one layout.
        per_block = first.shape[1] != route.width
        rows = torch.empty(ids.shape[0], schema.num_blocks if per_block else schema.value_dim, dtype=first.dtype)
        for target, reply in zip(targets, replies, strict=True):
            assert target.route is not None
            place_rows(self.plan, rows, ids, route=target.route, kept=target.kept, rows=reply, per_block=per_block)
        return rows

    def _columns_to_write(self, route: ShardRoute, rows: Tensor) -> Tensor:
        if rows.shape[1] == self.plan.schema.value_dim:
            return pick_columns(route, rows)
        return rows[:, list(route.blocks)]

    def _row_blocks(self, array: str, target: "_RowTarget") -> tuple[int, ...]:
        if target.route is None:
            return ()
        return (0,) if array == "keys" else target.route.blocks

    def _sequences(self, owner: ShardInfo, sequences: tuple[int, ...]) -> tuple[int, ...]:
        """Owners of key pages alone hold no updates, but their ledger follows."""
        return sequences if any(route.shard == owner.shard for route in self.plan.routes) else ()

    def _seen(self, stamps: Sequence[Stamp]) -> Seen:
        versions = [stamp.table_version for stamp in stamps]
        return Seen(
            epoch=self.plan.epoch, oldest_version=min(versions, default=0), newest_version=max(versions, default=0)
        )

    async def _each(self, calls: Sequence[tuple[ShardInfo, Call[T]]]) -> list[T]:
        """All calls together, replies in their order. One that fails ends the others, and the gravest error is
        raised.
        """
        if len(calls) == 1:
            return [await self._one(*calls[0])]
        tasks = [asyncio.ensure_future(self._one(info, call)) for info, call in calls]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
        if errors:
            raise min(errors, key=_leniency)
        return [task.result() for task in tasks]

    async def _one(self, info: ShardInfo, call: Call[T]) -> T:
        envelope = Envelope(table_id=self.plan.schema.table_id, epoch=self.plan.epoch, incarnation=info.incarnation)
        self._waiting[info.shard] = info.address
        try:
            reply = await call(self._dial(info), envelope)
        except MempoolError as error:
            self._waiting.pop(info.shard, None)
            if error.shard is None:
                error.shard = info.shard
            if error.address is None:
                error.address = info.address or None
            raise
        # A cancelled call stays among those waited for: that is what a timeout names.
        self._waiting.pop(info.shard, None)
        return reply


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RowTarget:
    """One shard of a read or write of rows. route: None for key pages. kept: positions of its ids; None where all."""

    info: ShardInfo
    route: ShardRoute | None
    kept: Tensor | None


def _no_bags(bags: Bags) -> Bags:
    """No bags at all, of the same dtypes; ``bags`` has no pairs."""
    return Bags(ids=bags.ids, weights=bags.weights, offsets=torch.zeros(1, dtype=torch.int64))


def _require_blocks(blocks: tuple[int, ...], route: ShardRoute) -> None:
    if blocks != route.blocks:
        raise Internal(f"shard {route.shard} answered blocks {blocks} under a placement that gives it {route.blocks}.")


def _leniency(error: BaseException) -> int:
    """Errors that trying again cannot heal come first: a lost page is not hidden behind a slow shard."""
    if not isinstance(error, MempoolError):
        return 0
    if not error.retryable:
        return 1
    return 2 if isinstance(error, Replan) else 3
