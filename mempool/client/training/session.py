"""One trainer's updates and steps on one table: numbers them, keeps them, pushes them. Committing is ``coordinator``'s.

Everything but what is done at once, on the caller's thread, runs on one event loop.
"""

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mempool.agreement.book import OF_OTHER_RANKS, Book, Step
from mempool.client.direct.asking import Asking
from mempool.client.direct.gathers import gather_directly
from mempool.client.direct.updates import update_directly
from mempool.client.experts.asked import Experts
from mempool.client.opening.waiting import Begin, Pending, Run
from mempool.client.routing.attempt import Attempt, LookupRecord
from mempool.client.routing.plan import TablePlan
from mempool.client.routing.router import Router
from mempool.client.training.commitment import Commitment, Prepared
from mempool.client.training.coordinator import Coordinator
from mempool.client.training.joint import Joint
from mempool.client.training.pushes import Pushes
from mempool.errors import Internal, InvalidRequest, MempoolError, ShardUnavailable, StepConflict
from mempool.types import StepId
from mempool.types.bags import Bags
from mempool.types.messages import ReplyDtype

_WAITED_FOR_BYTES = 2**18
"""Of an update that the one shard of this process holds before the backward pass goes on: to hold it takes less time
than taking turns at the interpreter with whoever does not wait."""

_MOST_PASSED = 1024
"""Numbers of steps that an update which shards refuse goes past at once."""


@dataclass(slots=True, kw_only=True, eq=False)
class Pushed:
    """An update that was pushed: its lookup and its gradient [B, V]; of experts a bag's input and its gradient.

    Attributes:
        held: The step and the plan under which every shard has said that it holds it; None where none was.
    """

    record: LookupRecord
    grads: Tensor
    held: tuple[StepId, TablePlan] | None = None

    @property
    def num_bytes(self) -> int:
        """What keeping it costs, in tensors."""
        experts = self.record.experts
        inputs_bytes = 0 if experts is None else experts.inputs.nbytes
        return self.grads.nbytes + self.record.bags.num_bytes + inputs_bytes


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
    ``prepare`` asks whether everything is there, sends again what is missing; ``commit`` lets the decider decide, tells
    the others, and forgets the updates once all have applied it. A failed call leaves a step that the same call
    continues. Steps of several tables together: ``Coordinator``.

    Args:
        router: Carries the calls.
        table_id: The table.
        group: The name of the trainer's group in ledgers, unique among all groups.
        rank: The trainer's number in its group.
        generation: How often the trainer has gone back to an earlier step.
        coordinator: That of all sessions on the pool; None: one of its own.
        direct: Calls without the loop; None: there is no such way.

    Attributes:
        book: Its steps.
        pushes: Its updates that are on their way.
        joint: The step that is prepared, or whose Commit is under way, with other tables' where they are committed
            together. applying: The one before, decided, which some owners may not have applied yet.
        deciding: Held by whoever prepares, commits or discards.
        commits: Steps of it, or of its group, that were acknowledged: what was read before is of an older version, also
            where the one that the last of them made is not known yet.
    """

    def __init__(
        self,
        router: Router,
        *,
        table_id: int,
        group: str,
        rank: int = 0,
        generation: int = 0,
        coordinator: Coordinator | None = None,
        direct: Asking | None = None,
    ) -> None:
        self.counters = SessionCounters()
        self.table_id = table_id
        self.rank = group, rank
        self.book: Book[Pushed] = Book(group=group, rank=rank, generation=generation)
        self.pushes = Pushes()
        self.joint: Joint | None = None
        self.applying: Joint | None = None
        self.deciding = asyncio.Lock()
        self.commits = 0
        self.coordinator = Coordinator(router) if coordinator is None else coordinator
        self._router = router
        self._direct = direct
        self._counting = threading.Lock()
        self._pushing: dict[int, Attempt] = {}
        self.coordinator.add(self)

    def reading(self, router: Router) -> "Session":
        """One on the same table by another router, which reads at a version: nothing is trained by it."""
        direct = None if self._direct is None else self._direct.by(router)
        return Session(router, table_id=self.table_id, group=router.pin, direct=direct)

    @property
    def pending(self) -> int:
        """Updates pushed and not yet committed or discarded."""
        return self.book.pending

    @property
    def pending_bytes(self) -> int:
        """Bytes of ids, weights and gradients that are kept for them here."""
        return self.book.pending_bytes

    @property
    def nothing_to_drop(self) -> bool:
        """Whether ``discard`` would do nothing. May be asked on any thread."""
        group = self.coordinator.group
        return self.book.nothing_to_drop and not (group is not None and group.waits)

    @property
    def known_version(self) -> int | None:
        """The newest version of the table that is known here. May be asked on any thread."""
        return self._router.known_version(self.table_id)

    @property
    def waiting_for(self) -> tuple[tuple[int, str], ...]:
        """(shard, address) of those that have not answered a push."""
        return tuple(sorted({each for attempt in self._pushing.values() for each in attempt.fanout.waiting_for}))

    def gather_at_once(
        self, bags: Bags, *, remember: bool, reply_dtype: ReplyDtype
    ) -> tuple[Tensor, LookupRecord] | None:
        """As ``gather``, on the caller's thread; None where that is to be awaited."""
        if self._direct is None:
            return None
        answer = gather_directly(self._direct, self.table_id, bags, remember=remember, reply_dtype=reply_dtype)
        if answer is not None:
            with self._counting:
                self.counters.lookups += 1
            if remember:
                self.coordinator.heartbeats.wake_from(self._direct.loop)
        return answer

    @property
    def shards_are_here(self) -> bool:
        """Whether ``gather_at_once`` does the work of shards, instead of waiting for them."""
        return self._direct is not None and self._direct.here

    def left_s(self, began_s: float) -> float | None:
        """Of the time of a call that was begun then at once; None: all."""
        return None if self._direct is None else self._direct.left_s(began_s)

    async def gather(
        self,
        bags: Bags,
        *,
        remember: bool,
        reply_dtype: ReplyDtype = "float32",
        experts: Experts | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Tensor, LookupRecord]:
        """As the router's."""
        with self._counting:
            self.counters.lookups += 1
        answer = await self._router.gather(
            self.table_id,
            bags=bags,
            remember=remember,
            reply_dtype=reply_dtype,
            experts=experts,
            timeout_s=timeout_s,
        )
        if remember:
            self.coordinator.heartbeats.wake()
        return answer

    async def update(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, want_weight_grad: bool, timeout_s: float | None = None
    ) -> Tensor | None:
        """Push the gradient of a lookup.

        Where no d_weights are wanted nobody waits for the shards' answers, but where too many bytes are on their way,
        or the update is a small one for the only shard, of this process: what does not arrive is sent again by the
        commit.

        Args:
            grads: [B, V] float32 or bfloat16, or packed rows, not to be changed by the caller any more.
            hold: It is part of the next commit. False: only d_weights are computed.

        Returns:
            d_weights [L] float32, None if not wanted.

        Raises:
            InvalidRequest: The lookup is of a table that this one has replaced; nothing was sent.
            MempoolError: As the router's, where d_weights are wanted; the update is then no part of the step.
        """
        if not (hold or want_weight_grad):
            return None
        self._require_own(record)
        if want_weight_grad:
            return await self._weight_grad(self._begin(record, grads, hold=hold), timeout_s=timeout_s)
        update = Pushed(record=record, grads=grads)
        await self.pushes.room(update.num_bytes)
        step, sequence = self.book.add(update)
        self.coordinator.heartbeats.wake()
        self._pushed()
        if update.num_bytes <= _WAITED_FOR_BYTES and self._router.one_shard_here(self.table_id):
            await self._push(update, step.step_id, sequence, timeout_s=timeout_s)
        else:
            self.pushes.start(self._push(update, step.step_id, sequence), update.num_bytes)
        return None

    def weight_grad(self, record: LookupRecord, grads: Tensor, *, hold: bool, run: Run) -> Tensor | None:
        """As ``update`` with want_weight_grad, on the caller's thread as far as that can be; ``run`` waits for the
        rest."""
        self._require_own(record)
        began_s = time.monotonic()
        begun = self._begin(record, grads, hold=hold)
        try:
            answer = self._weight_grad_at_once(begun)
            if answer is None:
                answer = run(self._weight_grad(begun, timeout_s=self.left_s(began_s)))
            return answer
        except BaseException:  # also one that comes before the loop has begun it
            self._give_up(begun)
            raise

    def weight_grad_later(
        self, record: LookupRecord, grads: Tensor, *, hold: bool, begin: Begin
    ) -> Pending[Tensor | None]:
        """As ``update`` with want_weight_grad, which is waited for later. It has its number now: sums keep the order in
        which updates are pushed, whoever waits for what."""
        self._require_own(record)
        begun = self._begin(record, grads, hold=hold)
        try:
            return begin(self._weight_grad(begun))
        except BaseException:
            self._give_up(begun)
            raise

    def _require_own(self, record: LookupRecord) -> None:
        if record.table_id != self.table_id:
            raise InvalidRequest(
                f"this is the backward pass of a look-up before table {self._router.name_of(self.table_id)!r} was "
                "restored or made again: its gradient is of values that are gone. Look up again, and call backward() "
                "of that"
            )

    def _begin(self, record: LookupRecord, grads: Tensor, *, hold: bool) -> "_Begun":
        update = Pushed(record=record, grads=grads)
        if hold:
            step, sequence = self.book.add(update)
            return _Begun(update, step, sequence, hold=True)
        return _Begun(update, self.book.open, self.book.next_sequence(), hold=False)

    def _weight_grad_at_once(self, begun: "_Begun") -> Tensor | None:
        update, step_id, direct = begun.update, begun.step.step_id, self._direct
        if direct is None:
            return None
        answer = update_directly(
            direct,
            self.table_id,
            update.record,
            update.grads,
            step_id=step_id,
            sequence=begun.sequence,
            hold=begun.hold,
        )
        if answer is None:
            return None
        weight_grad, plan = answer
        if begun.hold:
            self._pushed()
            self.coordinator.heartbeats.wake_from(direct.loop)
            update.held = step_id, plan
        return weight_grad

    async def _weight_grad(self, begun: "_Begun", *, timeout_s: float | None = None) -> Tensor | None:
        if begun.hold:
            self.coordinator.heartbeats.wake()
        try:
            weight_grad = await self._weight_grad_sent(begun, timeout_s=timeout_s)
        except BaseException:
            self._give_up(begun)
            raise
        if begun.hold:
            self._pushed()
        return weight_grad

    async def _weight_grad_sent(self, begun: "_Begun", *, timeout_s: float | None) -> Tensor | None:
        step_id, group, by = begun.step.step_id, self.coordinator.group, 1
        end_s = time.monotonic() + self._router.timeout_s
        while True:
            sending = partial(
                _send,
                update=begun.update,
                step_id=step_id,
                sequence=begun.sequence,
                hold=begun.hold,
                want_weight_grad=True,
            )
            try:
                return await self._router.call(self.table_id, sending, timeout_s=timeout_s)
            except StepConflict:
                if group is None or time.monotonic() > end_s:
                    raise
                await group.refresh()  # its group may have begun a generation, as a rank came back
                if begun.step.step_id == step_id:
                    self.book.pass_over(step_id, by=by)
                    by = min(2 * by, _MOST_PASSED)
                if begun.step.step_id == step_id:
                    raise
                step_id = begun.step.step_id

    def _give_up(self, begun: "_Begun") -> None:
        # Where a shard holds it all the same, no commit will name it, and the shard drops it with that commit.
        self.book.remove(begun.step, begun.sequence)

    def _pushed(self) -> None:
        with self._counting:
            self.counters.updates_pushed += 1

    async def prepare(
        self, *, want_norm: bool = True, norm_order: float = 0.0, timeout_s: float | None = None
    ) -> Prepared | None:
        """Phase one for everything pending: all owners have it all. Sends nothing, and answers None, where nothing is.

        Updates pushed from here on belong to the step after, unless ``prepare`` is called again.
        """
        return (
            await self.coordinator.prepare([self], want_norm=want_norm, norm_order=norm_order, timeout_s=timeout_s)
        )[0]

    async def commit(self, *, lr: float, grad_scale: float = 1.0, timeout_s: float | None = None) -> int:
        """Apply everything pending as one optimizer step; nothing is sent, and no step counted, where nothing is.

        A commit that failed on its way (its error says so) is continued by the next call, with the lr and grad_scale
        that were decided then, for it may be decided.

        Returns:
            How many updates were committed.

        Raises:
            InvalidRequest: lr or grad_scale is not finite, or lr is negative; nothing was changed.
            MempoolError: As the router's.
        """
        commitment = Commitment(self, lr=lr, grad_scale=grad_scale)
        return (await self.coordinator.commit([commitment], timeout_s=timeout_s))[0]

    async def discard(self, *, timeout_s: float | None = None) -> int:
        """Drop what is pending; sends nothing where nothing is. A step whose commit is under way stays.

        Returns:
            How many updates were dropped.
        """
        return (await self.coordinator.discard([self], timeout_s=timeout_s))[0]

    async def send_again(
        self, attempt: Attempt, step: Step[Pushed], missing: Mapping[int, tuple[int, ...]]
    ) -> set[int]:
        """Send updates of a step to the shards that miss them.

        Args:
            missing: Sequences by shard.

        Returns:
            Shards that had said, under the same plan, that they hold what they miss now.
        """
        forgetful: set[int] = set()
        for sequence in sorted(set().union(*missing.values())):
            update = step.updates.get(sequence)
            if update is None and sequence >= OF_OTHER_RANKS:
                raise ShardUnavailable(
                    f"shards miss updates of rank {sequence // OF_OTHER_RANKS}, which sends them with its next step"
                )
            if update is None:
                raise Internal(f"shards miss update {sequence}, which step {step.step_id.step} does not have.")
            only = [shard for shard, sequences in missing.items() if sequence in sequences]
            if update.held == (step.step_id, attempt.plan):
                forgetful.update(only)
            await _send(
                attempt,
                update=update,
                step_id=step.step_id,
                sequence=sequence,
                hold=True,
                want_weight_grad=False,
                only=only,
            )
        return forgetful

    async def send_mine(self, attempt: Attempt, step_id: StepId, sequences: Iterable[int]) -> None:
        """Send updates of this rank, which shards miss, to all of them, under the step of its group."""
        for sequence in sequences:
            for step in (self.book.closing, self.book.applying):
                update = None if step is None else step.updates.get(sequence)
                if update is not None:
                    await _send(
                        attempt, update=update, step_id=step_id, sequence=sequence, hold=True, want_weight_grad=False
                    )

    def rejoin(self, *, group: str, rank: int, generation: int, first_sequence: int = 1) -> None:
        """From now on its steps are those of a group; nothing is pending."""
        self.rank = group, rank
        self.book = Book(group=group, rank=rank, generation=generation, first_sequence=first_sequence)

    async def _push(self, update: Pushed, step_id: StepId, sequence: int, *, timeout_s: float | None = None) -> None:
        """One try, whose failure is no error: Prepare says what is missing."""

        async def once(attempt: Attempt) -> None:
            self._pushing[sequence] = attempt
            await _send(attempt, update=update, step_id=step_id, sequence=sequence, hold=True, want_weight_grad=False)

        try:
            await self._router.call(self.table_id, once, timeout_s=timeout_s, again=False)
        except MempoolError:
            pass
        finally:
            self._pushing.pop(sequence, None)


@dataclass(frozen=True, slots=True)
class _Begun:
    """An update whose d_weights are asked for. hold: it is part of the step."""

    update: Pushed
    step: Step[Pushed]
    sequence: int
    hold: bool


async def _send(
    attempt: Attempt,
    *,
    update: Pushed,
    step_id: StepId,
    sequence: int,
    hold: bool,
    want_weight_grad: bool,
    only: list[int] | None = None,
) -> Tensor | None:
    answer = await attempt.update(
        update.record,
        update.grads,
        step_id=step_id,
        sequence=sequence,
        hold=hold,
        want_weight_grad=want_weight_grad,
        only=only,
    )
    if hold:
        update.held = step_id, attempt.plan
    return answer
