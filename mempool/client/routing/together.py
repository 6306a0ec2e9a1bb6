"""The messages of a step of several tables, on one plan of each: one message a shard, with the parts of all tables.

What is sent when is ``mempool.agreement.step``'s; when to try again, and on which plans, is the router's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mempool.agreement.step_events import Owners, Part, Parts
from mempool.client.routing.attempt import Attempt
from mempool.client.routing.fanout import Fanout
from mempool.errors import StepConflict
from mempool.types import (
    CommitPart,
    CommitReply,
    CommitRequest,
    CommittedPart,
    DiscardPart,
    DiscardRequest,
    Envelope,
    PreparePart,
    PrepareReply,
    PrepareRequest,
    ShardHost,
    ShardInfo,
    Stamp,
    StepId,
)

_MOST_DISCARDED = 500
"""Steps that one Discard names: a shard takes no more than 1,000. A client that was cut off for long has many."""

HeardPrepare = Callable[[int, Parts, PrepareReply], None]
HeardCommit = Callable[[int, Parts, Sequence[CommittedPart] | StepConflict], None]


class Together:
    """The calls of a step, on one plan of each table.

    Args:
        attempts: One for each table, in the step's order; at least one.
    """

    def __init__(self, attempts: Mapping[int, Attempt]) -> None:
        self.attempts = attempts
        self._fanouts: dict[int, Fanout] = {table_id: attempt.fanout for table_id, attempt in attempts.items()}
        # One asks for all, so that who has not answered is known in one place. Envelopes are each table's own.
        self._fanout = next(iter(self._fanouts.values()))
        self._infos: dict[int, ShardInfo] = {}
        for attempt in attempts.values():
            for info in attempt.plan.owners:
                known = self._infos.get(info.shard)
                if known is None or known.incarnation < info.incarnation:
                    self._infos[info.shard] = info

    @property
    def waiting_for(self) -> tuple[tuple[int, str], ...]:
        """(shard, address) of those that were asked and have not answered."""
        return tuple(sorted({each for fanout in self._fanouts.values() for each in fanout.waiting_for}))

    @property
    def owners(self) -> tuple[Owners, ...]:
        """Who owns the tables, on these plans."""
        return tuple(attempt.plan.agreeing for attempt in self.attempts.values())

    async def prepare(
        self,
        to: Mapping[int, Parts],
        *,
        want_norm: bool,
        norm_order: float,
        decider: Part,
        wait: bool,
        attempt: int,
        heard: HeardPrepare,
    ) -> None:
        """Phase one at these shards. heard: called with each answer as it comes."""

        async def ask(shard: int, parts: Parts, host: ShardHost, _: Envelope) -> None:
            request = PrepareRequest(
                parts=tuple(
                    PreparePart(envelope=self._envelope(part, shard), step_id=part.step_id, sequences=part.sequences)
                    for part in parts
                ),
                want_norm=want_norm,
                norm_order=norm_order,
                decider_table=decider.table_id,
                decider_step=decider.step_id.step,
                wait=wait,
                attempt=attempt,
            )
            reply = await host.prepare(request)
            self._saw(parts, [answer.stamp for answer in reply.parts])
            heard(shard, parts, reply)

        await self._fanout.each([(self._infos[shard], partial(ask, shard, parts)) for shard, parts in to.items()])

    async def commit(self, shard: int, parts: Parts, *, one_phase: bool) -> CommitReply:
        """Phase two at the decider."""

        async def ask(host: ShardHost, _: Envelope) -> CommitReply:
            return await host.commit(self._commit_request(shard, parts, decided=False, one_phase=one_phase))

        reply: CommitReply = (await self._fanout.each([(self._infos[shard], ask)]))[0]
        self._saw_committed(parts, reply)
        return reply

    async def apply(self, to: Mapping[int, Parts], *, heard: HeardCommit) -> None:
        """Tell these shards that the step is decided; one that fails does not end the others.

        heard: Called with each answer, or StepConflict, as it comes.
        """

        async def ask(shard: int, parts: Parts, host: ShardHost, _: Envelope) -> None:
            try:
                reply = await host.commit(self._commit_request(shard, parts, decided=True, one_phase=False))
            except StepConflict as refusal:
                heard(shard, parts, refusal)
                return
            self._saw_committed(parts, reply)
            heard(shard, parts, reply.parts)

        calls = [(self._infos[shard], partial(ask, shard, parts)) for shard, parts in to.items()]
        await self._fanout.each(calls, to_the_end=True)

    async def discard(
        self, step_ids: Mapping[int, Sequence[StepId]], *, heard: Callable[[int], None] | None = None
    ) -> None:
        """Tell every owner to drop what it holds of these steps, by table, and to end their Prepare."""
        to: dict[int, list[tuple[int, StepId]]] = {}
        for table_id, ids in step_ids.items():
            for info in self.attempts[table_id].plan.owners:
                to.setdefault(info.shard, []).extend((table_id, step_id) for step_id in ids)
        await self._discard({shard: steps for shard, steps in to.items() if steps}, heard=heard)

    async def end_prepare(self, to: Mapping[int, Parts], *, attempt: int, heard: Callable[[int], None]) -> None:
        """Let these shards end their Prepares up to that attempt, and keep the updates. heard: called with each that
        has."""
        steps = {shard: [(part.table_id, part.step_id) for part in parts] for shard, parts in to.items()}
        await self._discard(steps, keep_updates=True, attempt=attempt, heard=heard)

    async def _discard(
        self,
        to: Mapping[int, Sequence[tuple[int, StepId]]],
        *,
        keep_updates: bool = False,
        attempt: int = 0,
        heard: Callable[[int], None] | None,
    ) -> None:
        async def ask(shard: int, steps: Sequence[tuple[int, StepId]], host: ShardHost, _: Envelope) -> None:
            parts = tuple(
                DiscardPart(envelope=self._fanouts[table_id].envelope(self._info(table_id, shard)), step_id=step_id)
                for table_id, step_id in steps
            )
            for first in range(0, len(parts), _MOST_DISCARDED):
                some = parts[first : first + _MOST_DISCARDED]
                await host.discard(DiscardRequest(parts=some, keep_updates=keep_updates, attempt=attempt))
            if heard is not None:
                heard(shard)

        await self._fanout.each([(self._infos[shard], partial(ask, shard, steps)) for shard, steps in to.items()])

    def _commit_request(self, shard: int, parts: Parts, *, decided: bool, one_phase: bool) -> CommitRequest:
        return CommitRequest(
            parts=tuple(
                CommitPart(
                    envelope=self._envelope(part, shard),
                    step_id=part.step_id,
                    lr=part.lr,
                    grad_scale=part.grad_scale,
                    sequences=part.sequences,
                    version=part.version if decided else 0,
                )
                for part in parts
            ),
            decided=decided,
            one_phase=one_phase,
        )

    def _envelope(self, part: Part, shard: int) -> Envelope:
        return self._fanouts[part.table_id].envelope(self._info(part.table_id, shard))

    def _info(self, table_id: int, shard: int) -> ShardInfo:
        """As the table's own plan knows it: where that is old, the shard says so, and the table's view is asked for."""
        if len(self.attempts) == 1:
            return self._infos[shard]
        owners = self.attempts[table_id].plan.owners
        return next((info for info in owners if info.shard == shard), self._infos[shard])

    def _saw(self, parts: Parts, stamps: Sequence[Stamp]) -> None:
        for part, stamp in zip(parts, stamps, strict=True):
            if stamp.epoch:  # a decider that owns nothing of a table has no stamp of its own for it
                self._fanouts[part.table_id].saw(stamp.table_version)

    def _saw_committed(self, parts: Parts, reply: CommitReply) -> None:
        for part, answer in zip(parts, reply.parts, strict=True):
            self._fanouts[part.table_id].saw(max(answer.version, answer.stamp.table_version))
