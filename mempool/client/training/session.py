"""Carries out one trainer's steps on one table: pushes updates, prepares, commits, discards. What a step is: ``steps``.

Everything runs on one event loop, so that backward passes of several threads need no lock. What a step of several
tables needs together (a global norm, a gradient scaler) is decided above, between ``prepare`` and ``commit``.
"""

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from mempool.client.routing.attempt import Attempt, LookupRecord
from mempool.client.routing.plan import TablePlan
from mempool.client.routing.router import Router
from mempool.client.training.steps import Decision, Pushed, Step, Steps
from mempool.errors import Internal, InvalidRequest, StepConflict
from mempool.types import CommitReply
from mempool.types.bags import Bags
from mempool.types.messages import ReplyDtype
from mempool.types.norms import joined_norm

# How often one try may find updates missing, send them again and ask again.
_MAX_ROUNDS = 5

_LeftS = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a prepared step looks like.

    Attributes:
        updates: How many updates it has.
        squared_norm: Squared norm of the table's reduced gradient; 0.0 if it was not asked for.
        finite: No inf or NaN in the reduced gradient; True if it was not asked for.
        norm: Of the order that was asked for besides; 0.0 if none was.
    """

    updates: int
    squared_norm: float
    finite: bool
    norm: float = 0.0


@dataclass(slots=True, kw_only=True)
class SessionCounters:
    """What this session has done since it began. Updates are counted as committed when their commit is acknowledged."""

    lookups: int = 0
    updates_pushed: int = 0
    updates_committed: int = 0
    updates_discarded: int = 0
    steps_committed: int = 0


class Session:
    """The updates and steps of one client on one table.

    Life of a step: [TRAINER] ``update`` numbers a gradient, keeps it, sends it; [SHARD] holds it; [TRAINER]
    ``prepare`` asks whether everything is there, sends again what is missing; ``commit`` tells every owner to apply
    it and forgets the updates once all have said so. A failed call leaves a step that the same call continues.

    Args:
        router: Carries the calls.
        table_id: The table.
        group: The name of the trainer's group in ledgers, unique among all groups.
        rank: The trainer's number in its group.
    """

    def __init__(self, router: Router, *, table_id: int, group: str, rank: int = 0) -> None:
        self.counters = SessionCounters()
        self._router = router
        self._table_id = table_id
        self._steps = Steps(group=group, rank=rank)
        self._deciding = asyncio.Lock()

    @property
    def pending(self) -> int:
        """Updates pushed and not yet committed or discarded."""
        return self._steps.pending

    @property
    def pending_bytes(self) -> int:
        """Bytes of ids, weights and gradients that are kept for them here."""
        return self._steps.pending_bytes

    @property
    def nothing_to_drop(self) -> bool:
        """Whether ``discard`` would do nothing. May be asked on any thread."""
        return self._steps.nothing_to_drop

    async def gather(
        self,
        bags: Bags,
        *,
        remember: bool,
        reply_dtype: ReplyDtype = "float32",
        timeout_s: float | None = None,
    ) -> tuple[Tensor, LookupRecord]:
        """As the router's."""
        self.counters.lookups += 1
        return await self._router.gather(
            self._table_id, bags=bags, remember=remember, reply_dtype=reply_dtype, timeout_s=timeout_s
        )

    async def update(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, want_weight_grad: bool, timeout_s: float | None = None
    ) -> Tensor | None:
        """Push the gradient of a lookup.

        Args:
            grads: [B, V] float32 or bfloat16, not to be changed by the caller any more.
            hold: It is part of the next commit. False: only d_weights are computed.

        Returns:
            d_weights [L] float32, None if not wanted.

        Raises:
            MempoolError: As the router's; the update is then no part of the step.
        """
        if not (hold or want_weight_grad):
            return None
        sequence = self._steps.next_sequence()
        step = self._steps.open
        if hold:
            step.add(sequence, Pushed(record=record, grads=grads))
        try:
            weight_grad = await self._router.update(
                record,
                grads,
                step_id=step.step_id,
                sequence=sequence,
                hold=hold,
                want_weight_grad=want_weight_grad,
                timeout_s=timeout_s,
            )
        except BaseException:
            # Where a shard holds it all the same, no commit will name it, and the shard drops it with that commit.
            step.remove(sequence)
            raise
        if hold:
            self.counters.updates_pushed += 1
        return weight_grad

    async def prepare(
        self, *, want_norm: bool = True, norm_order: float = 0.0, timeout_s: float | None = None
    ) -> Prepared | None:
        """Phase one for everything pending: all owners have it all. Sends nothing, and answers None, where nothing is.

        Updates pushed from here on belong to the step after, unless ``prepare`` is called again.
        """
        left_s = self._deadline(timeout_s)
        async with self._deciding:
            await self._finish_decided(left_s)
            step = await self._seal(left_s)
            if step is None:
                return None

            return await self._router.call(
                self._table_id,
                lambda attempt: self._prepare(attempt, step, want_norm=want_norm, norm_order=norm_order),
                timeout_s=left_s(),
            )

    async def commit(self, *, lr: float, grad_scale: float = 1.0, timeout_s: float | None = None) -> int:
        """Apply everything pending as one optimizer step; nothing is sent, and no step counted, where nothing is.

        A commit that failed on its way (its error says so) is continued by the next call, with the lr and grad_scale
        that were decided then, for some shards may have applied it.

        Returns:
            How many updates were committed.

        Raises:
            InvalidRequest: lr or grad_scale is not finite, or lr is negative; nothing was changed.
            MempoolError: As the router's.
        """
        if not (math.isfinite(lr) and lr >= 0.0):
            raise InvalidRequest(f"lr = {lr}: a learning rate must be finite and not negative.")
        if not math.isfinite(grad_scale):
            raise InvalidRequest(
                f"grad_scale = {grad_scale}: must be finite; discard a step whose gradients overflowed."
            )
        left_s = self._deadline(timeout_s)
        async with self._deciding:
            committed = await self._finish_decided(left_s)
            step = await self._seal(left_s)
            if step is None:
                return committed
            return committed + await self._commit(step, Decision(lr=lr, grad_scale=grad_scale), left_s)

    async def discard(self, *, timeout_s: float | None = None) -> int:
        """Drop what is pending; sends nothing where nothing is. A step whose commit is under way stays.

        Returns:
            How many updates were dropped.
        """
        left_s = self._deadline(timeout_s)
        async with self._deciding:
            dropped = self._steps.give_up()
            self.counters.updates_discarded += dropped
            await self._drop_given_up(left_s)
            return dropped

    async def _seal(self, left_s: _LeftS) -> Step | None:
        """The step to prepare: what is pending, closed to further updates."""
        self._steps.merge()
        await self._drop_given_up(left_s)
        return self._steps.seal()

    async def _drop_given_up(self, left_s: _LeftS) -> None:
        # Forgotten here before the first message: should one fail, no commit names those updates any more. But a shard
        # that has such a step prepared would refuse the next one, so it is told again before that.
        given_up = self._steps.given_up
        while given_up:
            await self._router.discard(self._table_id, given_up[0], timeout_s=left_s())
            del given_up[0]

    async def _finish_decided(self, left_s: _LeftS) -> int:
        step = self._steps.decided
        if step is None or step.decision is None:
            return 0
        return await self._commit(step, step.decision, left_s)

    async def _commit(self, step: Step, decision: Decision, left_s: _LeftS) -> int:
        async def once(attempt: Attempt) -> None:
            if len(attempt.plan.owners) == 1 and step.prepared_on is None:
                await self._commit_in_one(attempt, step, decision)
            else:
                await self._commit_in_two(attempt, step, decision)

        await self._router.call(self._table_id, once, timeout_s=left_s())
        self._steps.acknowledged()
        self.counters.steps_committed += 1
        self.counters.updates_committed += len(step.sealed)
        return len(step.sealed)

    async def _commit_in_one(self, attempt: Attempt, step: Step, decision: Decision) -> None:
        for _ in range(_MAX_ROUNDS):
            step.decision = decision
            try:
                replies = await self._send_commit(attempt, step, decision, one_phase=True)
            except InvalidRequest:
                step.decision = None  # the one owner changed nothing, so all is open again
                raise
            missing = {shard: reply.missing for shard, reply in replies.items() if not reply.applied}
            if not missing:
                return
            step.decision = None
            await self._send_missing(attempt, step, missing)
        raise _keeps_missing(attempt.plan, step, missing)

    async def _commit_in_two(self, attempt: Attempt, step: Step, decision: Decision) -> None:
        for more in reversed(range(_MAX_ROUNDS)):
            if step.prepared_on is not attempt.plan:
                await self._prepare(attempt, step, want_norm=False)
            step.decision = decision
            try:
                await self._send_commit(attempt, step, decision, one_phase=False)
                return
            except StepConflict:
                # An owner has forgotten its Prepare: it starts over, and owners that have applied the step say so.
                step.prepared_on = None
                if not more:
                    raise

    async def _send_commit(
        self, attempt: Attempt, step: Step, decision: Decision, *, one_phase: bool
    ) -> dict[int, CommitReply]:
        return await attempt.commit(
            step.step_id,
            lr=decision.lr,
            grad_scale=decision.grad_scale,
            sequences=step.sealed,
            one_phase=one_phase,
        )

    async def _prepare(self, attempt: Attempt, step: Step, *, want_norm: bool, norm_order: float = 0.0) -> Prepared:
        missing: Mapping[int, tuple[int, ...]] = {}
        for _ in range(_MAX_ROUNDS):
            replies = await attempt.prepare(
                step.step_id, sequences=step.sealed, want_norm=want_norm, norm_order=norm_order
            )
            missing = {shard: reply.missing for shard, reply in replies.items() if reply.missing and not reply.applied}
            if not missing:
                step.prepared_on = attempt.plan
                return Prepared(
                    updates=len(step.sealed),
                    squared_norm=math.fsum(reply.squared_norm for reply in replies.values()),
                    finite=all(reply.finite for reply in replies.values()),
                    norm=joined_norm([reply.norm for reply in replies.values()], norm_order) if norm_order else 0.0,
                )
            await self._send_missing(attempt, step, missing)
        raise _keeps_missing(attempt.plan, step, missing)

    async def _send_missing(self, attempt: Attempt, step: Step, missing: Mapping[int, Collection[int]]) -> None:
        for sequence in sorted(set().union(*missing.values())):
            pushed = step.updates.get(sequence)
            if pushed is None:
                raise Internal(f"shards miss update {sequence}, which step {step.step_id.step} does not have.")
            await attempt.update(
                pushed.record,
                pushed.grads,
                step_id=step.step_id,
                sequence=sequence,
                hold=True,
                want_weight_grad=False,
                only=[shard for shard, sequences in missing.items() if sequence in sequences],
            )

    def _deadline(self, timeout_s: float | None) -> _LeftS:
        """One deadline for all messages of a call: the seconds left of it, asked at any time from now."""
        clock = asyncio.get_running_loop()
        end_s = clock.time() + (self._router.timeout_s if timeout_s is None else timeout_s)
        return lambda: end_s - clock.time()


def _keeps_missing(plan: TablePlan, step: Step, missing: Mapping[int, tuple[int, ...]]) -> Internal:
    return Internal(
        f"table {plan.schema.name!r}: shards still miss updates of step {step.step_id.step}, rank {step.step_id.rank}, "
        f"after {_MAX_ROUNDS} rounds of sending them again: {dict(missing)} (shard: sequences). Please report it."
    )
