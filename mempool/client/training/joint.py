"""One step of some tables that is not over, and how what ``mempool.agreement.step`` says of it is carried out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mempool.agreement.step import Goal, StepOfTables
from mempool.agreement.step_events import (
    Acknowledge,
    Action,
    Apply,
    ApplyAnswered,
    ApplyRefused,
    Commit,
    CommitAnswered,
    CommitInvalid,
    CommitSent,
    EndPrepare,
    Fail,
    Gone,
    Parts,
    Placed,
    Prepare,
    PrepareAnswered,
    PrepareEnded,
    Reached,
    Refused,
    Renumber,
    Renumbered,
    SendAgain,
    SendRefused,
    SentAgain,
)
from mempool.client.routing.together import Together
from mempool.client.training.commitment import Others, Prepared
from mempool.errors import InvalidRequest, MempoolError, StalePlacement, StepConflict
from mempool.types import PrepareReply, StepId

if TYPE_CHECKING:
    from mempool.client.training.heartbeats import Heartbeats
    from mempool.client.training.session import Session


@dataclass(frozen=True, slots=True)
class Dropped:
    """Shards dropped what they held, or had prepared, for this process, though nothing has moved.

    table_id: Whose updates are gone; None for a step of all of the joint's tables that its decider dropped.
    """

    table_id: int | None
    shards: frozenset[int]


@dataclass(slots=True, kw_only=True, eq=False)
class Joint:
    """A step of some tables of a pool.

    Attributes:
        sessions: By table, in the step's order.
        step: What is known of it, and what comes next.
        telling: Tells the other owners that it is decided.
        dropped: What shards dropped, and was sent again; for whoever tells the user.
        apart: Tables of it that turned out to be decided, each a step of its own.
        others: Other ranks of the group, who send their updates again.
    """

    sessions: dict[int, Session]
    step: StepOfTables
    telling: asyncio.Task[None] | None = None
    dropped: list[Dropped] = field(default_factory=list)
    apart: list[Joint] = field(default_factory=list)
    others: Others | None = None

    @property
    def waiting_for(self) -> tuple[tuple[int, str], ...]:
        """(shard, address) of those that have not answered a push."""
        return waiting_for(self.sessions.values())

    async def carry_out(self, goal: Goal, together: Together) -> None:
        """Do what has to be done until ``goal``, on these plans. May be cut off anywhere, and done again on others."""
        for session in self.sessions.values():
            await session.pushes.settled()
        self.step.handle(Placed(owners=together.owners))
        if self.step.state == "open":
            await self._send_moved(together)
        while not isinstance(action := self.step.next(goal), Reached):
            if self.step.state == "open":
                # A shard that has a step prepared that was given up would wait for what becomes of that.
                await discard_given_up(together, self.sessions.values())
            try:
                await self._do(together, action)
            finally:
                self._follow_state()  # a gate's word, too, ends a doubt

    def leave(self, table_id: int) -> None:
        """A table was dropped, or is lost: its step is over, the others' goes on."""
        self._release(self.sessions.pop(table_id))
        self.step.handle(Gone(table_id=table_id))
        self._follow_state()

    def end(self) -> None:
        """All its tables were dropped, or are lost: nobody can say any more what became of it."""
        for session in self.sessions.values():
            self._release(session)

    def _release(self, session: Session) -> None:
        if session.joint is self:
            session.joint = None
            if session.book.closing is not None:
                session.book.closing.committing = False  # it may be discarded
        if session.applying is self:
            session.applying = None
            session.book.applied()

    def add_state(self, error: MempoolError, names: str) -> None:
        """Say what is known of the step, and what the same call does next. names: of its tables, for messages."""
        number = next(iter(self.step.tables.values())).step_id.step
        what = f"step {number} of {names}"
        state = {
            "open": f"S{what[1:]} is not decided: the same call goes on with it; discard() or zero_grad() drops it.",
            "in doubt": f"Whether {what} is decided is not known: the same call asks again, and commits it with the lr"
            " that it was sent with.",
            "decided": f"S{what[1:]} is decided, and applied in the end whatever happens here: the same call tells"
            " those who have not applied it yet.",
        }[self.step.state]
        message = error.message.rstrip()
        error.message = f"{message}{'' if message.endswith('.') else '.'} {state}"
        error.args = (error.message,)

    async def _do(self, together: Together, action: Action) -> None:
        step = self.step
        match action:
            case Prepare():
                await self._prepare(together, action)
            case SendAgain():
                missing, of_others = self._dealt(action.missing)
                if self.others is not None and of_others:
                    await self.others.send_again(of_others)
                refusals = await asyncio.gather(
                    *(self._send_again(together, table_id, shards) for table_id, shards in missing.items())
                )
                refusal = next((each for each in refusals if each is not None), None)
                step.handle(SentAgain() if refusal is None else SendRefused(error=refusal))
            case EndPrepare():
                await together.end_prepare(
                    action.to, attempt=action.attempt, heard=lambda shard: step.handle(PrepareEnded(shard=shard))
                )
            case Commit():
                await self._commit(together, action)
            case Apply():
                await together.apply(
                    action.to,
                    heard=lambda shard, parts, reply: step.handle(
                        ApplyRefused(shard=shard)
                        if isinstance(reply, StepConflict)
                        else ApplyAnswered(shard=shard, parts=parts, reply=reply)
                    ),
                )
            case Renumber():
                self._renumber(action.past)
            case Acknowledge():
                self._set_apart(together, action.table_id)
            case Fail():
                raise action.error

    def _dealt(
        self, missing: Mapping[int, Mapping[int, tuple[int, ...]]]
    ) -> tuple[Mapping[int, Mapping[int, tuple[int, ...]]], dict[int, tuple[StepId, tuple[int, ...]]]]:
        """Of what shards miss, what this rank has, and what other ranks have."""
        others = self.others
        if others is None:
            return missing, {}
        mine: dict[int, dict[int, tuple[int, ...]]] = {}
        theirs: dict[int, tuple[StepId, tuple[int, ...]]] = {}
        for table_id, shards in missing.items():
            gone = set().union(*shards.values())
            if found := sorted(each for each in gone if not others.own(each)):
                theirs[table_id] = self.step.tables[table_id].step_id, tuple(found)
            own = {shard: tuple(filter(others.own, each)) for shard, each in shards.items()}
            if own := {shard: each for shard, each in own.items() if each}:
                mine[table_id] = own
        return mine, theirs

    async def _send_moved(self, together: Together) -> None:
        """Send what was held under an earlier placement, which shards drop with that, without being asked for it."""
        sending = []
        for owners in together.owners:
            step, epoch = self.sessions[owners.table_id].book.closing, together.attempts[owners.table_id].plan.epoch
            updates = {} if step is None else step.updates
            gone = tuple(number for number, each in updates.items() if each.held and each.held[1].epoch < epoch)
            if gone:
                sending.append(self._send_again(together, owners.table_id, dict.fromkeys(owners.holders, gone)))
        if not sending:
            return
        refusal = next((each for each in await asyncio.gather(*sending) if each is not None), None)
        if refusal is not None:
            self.step.handle(SendRefused(error=refusal))

    async def _prepare(self, together: Together, action: Prepare) -> None:
        held_off: list[int] = []

        def heard(shard: int, parts: Parts, reply: PrepareReply) -> None:
            if any(part.held_off for part in reply.parts):
                held_off.append(shard)
            self.step.handle(
                PrepareAnswered(
                    shard=shard,
                    parts=parts,
                    reply=reply.parts,
                    want_norm=action.want_norm,
                    norm_order=action.norm_order,
                )
            )

        try:
            await together.prepare(
                action.to,
                want_norm=action.want_norm,
                norm_order=action.norm_order,
                decider=action.decider,
                wait=action.wait,
                attempt=action.attempt,
                heard=heard,
            )
        except StepConflict as refusal:
            self.step.handle(Refused(error=refusal))
            self.dropped.append(Dropped(None, frozenset(action.to if refusal.shard is None else {refusal.shard})))
        if action.wait and held_off:
            raise StalePlacement(f"shard {held_off[0]} still holds off steps, as pages move", shard=held_off[0])

    async def _commit(self, together: Together, action: Commit) -> None:
        step = self.step
        step.handle(CommitSent())
        self._follow_state()  # before anybody can be told
        try:
            reply = await together.commit(action.shard, action.parts, one_phase=action.one_phase)
        except StepConflict as refusal:
            step.handle(Refused(error=refusal))
            self.dropped.append(Dropped(None, frozenset({action.shard})))
        except InvalidRequest:
            step.handle(CommitInvalid())
            raise
        else:
            step.handle(CommitAnswered(shard=action.shard, reply=reply.parts))

    def _follow_state(self) -> None:
        """What may be decided can neither grow nor be dropped."""
        for session in self.sessions.values():
            if session.book.closing is not None:
                session.book.closing.committing = self.step.state != "open"

    async def _send_again(
        self, together: Together, table_id: int, missing: Mapping[int, tuple[int, ...]]
    ) -> StepConflict | None:
        """Send a table's updates; answers the refusal, where a shard has dropped the step meanwhile."""
        session = self.sessions[table_id]
        step = session.book.applying if self.step.state == "decided" else session.book.closing
        assert step is not None
        try:
            forgetful = await session.send_again(together.attempts[table_id], step, missing)
        except StepConflict as refusal:
            self.dropped.append(Dropped(None, frozenset(missing if refusal.shard is None else {refusal.shard})))
            return refusal
        if forgetful:
            self.dropped.append(Dropped(table_id, frozenset(forgetful)))
        return None

    def _set_apart(self, together: Together, table_id: int) -> None:
        session = self.sessions.pop(table_id)
        apart = Joint(sessions={table_id: session}, step=StepOfTables([self.step.tables[table_id]], decided=True))
        session.joint = apart
        self.apart.append(apart)
        self.step.handle(Gone(table_id=table_id))
        self.step.handle(Placed(owners=tuple(each for each in together.owners if each.table_id in self.sessions)))

    def _renumber(self, past: int) -> None:
        step_ids = {}
        for table_id, session in self.sessions.items():
            assert session.book.closing is not None
            session.book.renumber(past)
            step_ids[table_id] = session.book.closing.step_id
        self.step.handle(Renumbered(step_ids=step_ids))


async def discard_given_up(together: Together, sessions: Iterable[Session]) -> None:
    """Tell the shards of steps that were given up, and forget them here."""
    told = {}
    for session in sessions:  # each step passes this
        if session.book.given_up:
            told[session] = tuple(session.book.given_up)
    if not told:
        return
    await together.discard({session.table_id: step_ids for session, step_ids in told.items()})
    for session, step_ids in told.items():
        del session.book.given_up[: len(step_ids)]


def waiting_for(sessions: Iterable[Session]) -> tuple[tuple[int, str], ...]:
    """(shard, address) of those that have not answered a push of these sessions."""
    return tuple(sorted({each for session in sessions for each in session.waiting_for}))


def distinct(joints: Iterable[Joint | None]) -> list[Joint]:
    """Each once; None is left out."""
    found = []
    for joint in joints:
        if joint is not None and joint not in found:
            found.append(joint)
    return found


def as_prepared(joint: Joint, session: Session) -> Prepared:
    """What a session is answered of a step that is prepared."""
    squared_norm, finite, norm = joint.step.norm(session.table_id)
    updates = len(joint.step.tables[session.table_id].sequences)
    return Prepared(updates=updates, squared_norm=squared_norm, finite=finite, norm=norm)


def notices_of(joint: Joint, heartbeats: Heartbeats, names: Callable[[Collection[int]], str]) -> list[str]:
    """What a user is to be warned of: what shards dropped, and why, as far as is known here. Said once."""
    notices = []
    silences_s = {
        shard: heartbeats.silence_s(shard) for shard in {each for one in joint.dropped for each in one.shards}
    }
    for dropped in joint.dropped:
        silence_s = max(silences_s[shard] for shard in dropped.shards)
        # A heartbeat may have reached the shard up to a third of the lease, all that it has, before it was answered.
        was_heard = silence_s < heartbeats.lease_s * 2 / 3
        if dropped.table_id is None and was_heard:
            continue  # pages moved while nobody knew whether it was decided
        what = (
            f"a step of {names(joint.sessions)} was dropped"
            if dropped.table_id is None
            else f"updates of {names([dropped.table_id])} were dropped"
        )
        why = (
            "pages have moved meanwhile, or that shard has begun anew"
            if was_heard
            else f"this process was silent for up to {silence_s:.1f} s, and a shard keeps what a trainer holds for "
            f"{heartbeats.lease_s:g} s after it last heard of it (shard.trainer_lease)"
        )
        notices.append(
            f"{what} by shards {sorted(dropped.shards)}: {why}. All of it was sent again: nothing is lost or applied"
            " twice"
        )
    joint.dropped.clear()
    return notices
