"""One try of each call on one plan: ask its shards together, await them, merge their replies.

Knows the messages of the ``Shard`` protocol. Retries, views and deadlines are the router's.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mempool.agreement.writes import OpenWrite, Writer
from mempool.client.experts.asked import Experts, merge_bags, merge_expert_grads
from mempool.client.keys.asked import score
from mempool.client.routing.fanout import Fanout
from mempool.client.routing.plan import (
    Part,
    ShardRoute,
    TablePlan,
    merge_values,
    merge_weight_grads,
    pick_grads,
    split,
)
from mempool.client.routing.row_calls import read_rows, write_rows
from mempool.client.routing.slices import MESSAGE_BYTES, as_one, slices, some_at_a_time
from mempool.errors import ContextMissing, Internal, StepConflict
from mempool.types import (
    Envelope,
    GatherReply,
    GatherRequest,
    PinRequest,
    ShardHost,
    Stamp,
    StepCountReply,
    StepCountRequest,
    StepId,
    UpdateReply,
    UpdateRequest,
)
from mempool.types.bags import Bags
from mempool.types.messages import ReplyDtype
from mempool.types.reading.pins import PinAction

_SENT = "sent ids"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What state of a table a call's answers come from. Versions differ where a commit came between."""

    epoch: int
    oldest_version: int
    newest_version: int


class SortedPairs:
    """The parts of a lookup's shards, kept from the gather to the first update: sorting them takes as long as much else
    of a small call. Any thread may use it."""

    __slots__ = ("_kept",)

    def __init__(self, plan: TablePlan | None = None, parts: tuple[Part, ...] = ()) -> None:
        # Where every shard gets all pairs there is nothing to keep.
        self._kept = None if plan is None or all(part.kept is None for part in parts) else (plan, parts)

    def take(self, plan: TablePlan, bags: Bags) -> tuple[Part, ...]:
        """As ``split``."""
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0] is plan else split(plan, bags)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LookupRecord:
    """What is kept of a gather for its updates.

    Attributes:
        lookup_id: Shards know it by this number, and the next ones where they were asked for it in several messages.
        lookups: How many.
        remembered_by: (shard, incarnation) of those that were asked to remember it, under the placement of ``seen``.
        stamps: Of its answers.
        sorted: Its pairs by shard, for one update.
        experts: What was asked of its rows as experts; None: they were summed.
    """

    table_id: int
    lookup_id: int
    lookups: int
    bags: Bags
    seen: Seen
    remembered_by: frozenset[tuple[int, int]]
    stamps: tuple[Stamp, ...] = ()
    sorted: SortedPairs = field(default_factory=SortedPairs)
    experts: Experts | None = None


class Attempt:
    """The calls on one table, on one plan.

    Args:
        fanout: The way to the plan's shards.
        take_released: Gives the lookup ids that this shard may forget, once.
        pin: Of the version that is read; "": the newest.
    """

    def __init__(self, fanout: Fanout, *, take_released: Callable[[int], tuple[int, ...]], pin: str = "") -> None:
        self.plan = fanout.plan
        self._fanout = fanout
        self._traffic = fanout.traffic
        self._take_released = take_released
        self._pin = pin

    @property
    def fanout(self) -> Fanout:
        return self._fanout

    async def gather(
        self,
        bags: Bags,
        *,
        lookup_id: int,
        remember: bool,
        reply_dtype: ReplyDtype,
        experts: Experts | None = None,
    ) -> tuple[Tensor, LookupRecord]:
        """Pooled values [B, V] float32, or sums of experts [B, V - I], and what to keep for the update."""
        every = split(self.plan, bags)
        parts = those_named(every)
        lookups = messages_of(parts)
        cut: dict[Bags, list[Bags]] = {}  # once for all shards that are asked for the same
        for part in parts:
            if part.bags not in cut:
                cut[part.bags] = [piece_of(part.bags, number, lookups) for number in range(lookups)]

        async def ask_some(part: Part, host: ShardHost, envelope: Envelope, number: int) -> GatherReply:
            route = part.route
            some = cut[part.bags][number]
            request = gather_request(
                some,
                route,
                envelope,
                lookup_id=lookup_id + number,
                remember=remember,
                release=self._take_released(route.shard),
                reply_dtype=reply_dtype,
                pin=self._pin,
            )
            if experts is not None:
                request = replace(request, act=experts.act, inputs=experts.inputs_of(part, number, lookups))
            reply = await host.gather(request)
            self._fanout.saw(reply.stamp.table_version)
            require_blocks(reply.blocks, route)
            sent = some.num_bytes + (0 if request.inputs is None else request.inputs.nbytes)
            self._traffic.add(sent=sent, received=reply.values.nbytes)
            return reply

        async def ask(part: Part, host: ShardHost, envelope: Envelope) -> list[GatherReply]:
            return await some_at_a_time([partial(ask_some, part, host, envelope, n) for n in range(lookups)])

        answers = await self._fanout.each([(part.route.info, partial(ask, part)) for part in parts])
        found = [(part, as_one([reply.values for reply in some])) for part, some in zip(parts, answers, strict=True)]
        if experts is None:
            values = merge_values(self.plan, found, num_bags=bags.num_bags)
        else:
            values = merge_bags(found, num_bags=bags.num_bags, width=self.plan.schema.value_dim - experts.input_dim)
        stamps = [reply.stamp for some in answers for reply in some]
        record = lookup_record(
            self.plan,
            bags,
            lookup_id=lookup_id,
            lookups=lookups,
            stamps=stamps,
            remembered_by=parts if remember else (),
            parts=every if remember else (),
        )
        return values, record if experts is None else replace(record, experts=experts)

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
        """Push the gradient of a lookup: [B, V] float32 or bfloat16, or packed rows, in; d_weights [L] float32 out if
        wanted; of experts d_inputs behind, [L + B * I].

        only: The shards to send to; None means all.
        """
        # A shard none of whose row pages are named is told all the same, of no bags: it is asked for this sequence
        # later.
        every = record.sorted.take(self.plan, record.bags)
        parts = [part for part in every if only is None or part.route.shard in only]

        async def ask(part: Part, host: ShardHost, envelope: Envelope) -> UpdateReply:
            route = part.route
            bags, part_grads = part.bags, pick_grads(self.plan, part, grads)

            async def send(*, inline: bool) -> UpdateReply:
                self._traffic.add(sent=part_grads.nbytes + (bags.num_bytes if inline else 0))
                request = update_request(
                    route,
                    envelope,
                    record,
                    part_grads,
                    bags=bags if inline else None,
                    step_id=step_id,
                    sequence=sequence,
                    hold=hold,
                    want_weight_grad=want_weight_grad,
                )
                reply = await host.update(request)
                self._fanout.saw(reply.stamp.table_version)
                return reply

            if remembers(self.plan, route, record):
                try:
                    return await send(inline=False)
                except ContextMissing:
                    pass
            return await send(inline=True)

        replies = await self._fanout.each([(part.route.info, partial(ask, part)) for part in parts])
        if not want_weight_grad:
            return None
        grads_of_parts = []
        for part, reply in zip(parts, replies, strict=True):
            if reply.weight_grad is None:
                raise Internal(f"shard {part.route.shard} was asked for d_weights and answered none.")
            self._traffic.add(received=reply.weight_grad.nbytes)
            grads_of_parts.append((part, reply.weight_grad))
        if record.experts is not None:
            return merge_expert_grads(grads_of_parts, record.bags, input_dim=record.experts.input_dim)
        return merge_weight_grads(grads_of_parts, num_pairs=record.bags.num_pairs)

    async def score(
        self, queries: Tensor, *, topk: int, groups: Tensor | None = None, group_scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Seen]:
        """Top-k of the table's keys by (score descending, id ascending): scores [B, H, K] float32, ids [B, H, K] int64.

        Args:
            queries: [B, H, D] float32 for product keys, [B, 1, D] for flat keys, [B, sections, D] where values are.
            groups, group_scores: As of ``ScoreRequest``.
        """
        scores, ids, stamps = await score(
            self._fanout, queries, topk=topk, pin=self._pin, groups=groups, group_scores=group_scores
        )
        return scores, ids, seen_of(self.plan, stamps)

    async def read_rows(self, array: str, ids: Tensor) -> Tensor:
        """Rows [M, ..] of a named array in its dtype; ids: [M] int64, slots, or heads for the keys of product keys."""
        return await read_rows(self._fanout, array, ids, pin=self._pin)

    async def write_rows(self, array: str, ids: Tensor, rows: Tensor, *, write: OpenWrite, fresh: bool) -> None:
        """Overwrite rows [M, ..] of a named array, in the table's order of columns."""
        await write_rows(self._fanout, array, ids, rows, write=write, fresh=fresh)

    async def pin(
        self, do: PinAction, pin: str, *, version: int = 0, name: str = "", lease_s: float, beside: int | None = None
    ) -> list[int]:
        """What becomes of a pin at every owner: the version of it at each."""

        async def ask(host: ShardHost, envelope: Envelope) -> int:
            request = PinRequest(
                envelope=envelope, do=do, pin=pin, version=version, name=name, lease_s=lease_s, beside=beside
            )
            reply = await host.pin(request)
            self._fanout.saw(reply.version)
            return reply.version

        return await self._fanout.each([(owner, ask) for owner in self.plan.owners])

    async def step_count(self, *, to: int | None, writer: Writer) -> int:
        """How many steps the table's optimizer counts; ``to`` makes it that many.

        The first owner is told first, and what it counts is what all should: where whoever set it has died in between,
        the next one to ask makes the others count so.

        Raises:
            StepConflict: Owners are at different versions: somebody commits meanwhile.
        """
        owners = self.plan.owners

        async def ask(host: ShardHost, envelope: Envelope) -> StepCountReply:
            reply = await host.step_count(StepCountRequest(envelope=envelope))
            self._fanout.saw(reply.stamp.table_version)
            return reply

        replies = await self._fanout.each([(owner, ask) for owner in owners])
        if len({reply.count for reply in replies}) > 1:
            # Asked again: the others may have been told since the first one was asked.
            replies[:1] = await self._fanout.each([(owners[0], ask)])
        seen = seen_of(self.plan, [reply.stamp for reply in replies])
        counts = [reply.count for reply in replies]
        if seen.oldest_version != seen.newest_version:
            raise StepConflict(
                f"owners of table {self.plan.schema.name!r} are at versions {seen.oldest_version} to "
                f"{seen.newest_version} and count {min(counts)} to {max(counts)} steps: somebody commits meanwhile. Do "
                "it again while nobody trains"
            )
        wanted = counts[0] if to is None else to
        if to is None and len(set(counts)) == 1:
            return wanted

        with writer.begin() as write:  # of each try its own: at another version it is another write

            async def tell(host: ShardHost, envelope: Envelope) -> StepCountReply:
                return await host.step_count(
                    StepCountRequest(envelope=envelope, set=wanted, at_version=seen.oldest_version, write_id=write.id)
                )

            if to is not None:
                await self._fanout.each([(owners[0], tell)])
            await self._fanout.each([(owner, tell) for owner in owners[1:]])
        return wanted


def gather_request(
    bags: Bags,
    route: ShardRoute,
    envelope: Envelope,
    *,
    lookup_id: int,
    remember: bool,
    release: tuple[int, ...],
    reply_dtype: ReplyDtype,
    pin: str = "",
) -> GatherRequest:
    """What a shard is asked for some bags, or its part of them."""
    return GatherRequest(
        envelope=envelope,
        lookup_id=lookup_id,
        ids=_sent_ids(bags),
        weights=bags.weights,
        offsets=bags.offsets,
        remember=remember,
        release=release,
        reply_dtype="float32" if route.partial else reply_dtype,
        pin=pin,
        private=True,  # they were copied when they were checked
        bags=None if route.whole else bags,  # nobody else is asked for them
    )


def lookup_record(
    plan: TablePlan,
    bags: Bags,
    *,
    lookup_id: int,
    lookups: int,
    stamps: Sequence[Stamp],
    remembered_by: Sequence[Part],
    parts: tuple[Part, ...],
) -> LookupRecord:
    """What is kept of a gather.

    remembered_by: The parts whose shards were asked to. parts: Of all shards, where an update may come.
    """
    return LookupRecord(
        table_id=plan.table_id,
        lookup_id=lookup_id,
        lookups=lookups,
        bags=bags,
        seen=seen_of(plan, stamps),
        remembered_by=frozenset((part.route.shard, part.route.info.incarnation) for part in remembered_by),
        stamps=tuple(stamps),
        sorted=SortedPairs(plan, parts),
    )


def those_named(parts: Sequence[Part]) -> list[Part]:
    """Those that a gather asks: a shard none of whose row pages are named would answer zeros."""
    return [part for part in parts if part.kept is None or part.bags.num_pairs]


def seen_of(plan: TablePlan, stamps: Sequence[Stamp]) -> Seen:
    """What state answers with these stamps come from."""
    if len(stamps) == 1:
        version = stamps[0].table_version
        return Seen(epoch=plan.epoch, oldest_version=version, newest_version=version)
    versions = [stamp.table_version for stamp in stamps]
    return Seen(epoch=plan.epoch, oldest_version=min(versions, default=0), newest_version=max(versions, default=0))


def messages_of(parts: Sequence[Part]) -> int:
    """Messages that a gather of these parts takes, of each shard as many: so all know it by the same numbers."""
    return max((len(slices(part.bags.num_bags, _bag_bytes(part.route, part.bags))) for part in parts), default=1)


def is_one_message(route: ShardRoute, bags: Bags) -> bool:
    """Whether a gather asks this one for all of these bags at once."""
    return bags.num_bags * _bag_bytes(route, bags) <= MESSAGE_BYTES


def _bag_bytes(route: ShardRoute, bags: Bags) -> int:
    """Of one bag, or of the answer to it where that is more."""
    asked, answered = bags.num_bytes // (bags.num_bags or 1), 4 * route.width
    return asked if asked > answered else answered


def piece_of(bags: Bags, number: int, pieces: int) -> Bags:
    """One of so many messages' share of a part's bags, about as much as the others'; none where they do not suffice."""
    return bags.some(bags.num_bags * number // pieces, bags.num_bags * (number + 1) // pieces)


def remembers(plan: TablePlan, route: ShardRoute, record: LookupRecord) -> bool:
    """Whether a shard may know the bags of a lookup."""
    return record.seen.epoch == plan.epoch and (route.shard, route.info.incarnation) in record.remembered_by


def update_request(
    route: ShardRoute,
    envelope: Envelope,
    record: LookupRecord,
    grads: Tensor,
    *,
    bags: Bags | None,
    step_id: StepId,
    sequence: int,
    hold: bool,
    want_weight_grad: bool,
) -> UpdateRequest:
    """What a shard is sent of an update; bags: None where it is to know them."""
    return UpdateRequest(
        envelope=envelope,
        step_id=step_id,
        sequence=sequence,
        lookup_id=record.lookup_id,
        lookups=record.lookups,
        blocks=route.blocks,
        grads=grads,
        hold=hold,
        want_weight_grad=want_weight_grad,
        ids=None if bags is None else _sent_ids(bags),
        weights=None if bags is None else bags.weights,
        offsets=None if bags is None else bags.offsets,
        private=True,
        bags=bags,
        act="" if record.experts is None else record.experts.act,
        input_dim=0 if record.experts is None else record.experts.input_dim,
    )


def _sent_ids(bags: Bags) -> Tensor:
    """Ids as shards take them, int64 or uint32; those that are kept in 32 bits are none below 0."""
    sent: Tensor | None = bags.made.get(_SENT)
    if sent is None:
        sent = bags.ids.view(torch.uint32) if bags.ids.dtype == torch.int32 else bags.ids
        bags.made[_SENT] = sent
    return sent


def require_blocks(blocks: tuple[int, ...], route: ShardRoute) -> None:
    """Raises Internal where a shard answered other columns than the plan gives it."""
    if blocks != route.blocks:
        raise Internal(f"shard {route.shard} answered blocks {blocks} under a placement that gives it {route.blocks}.")
