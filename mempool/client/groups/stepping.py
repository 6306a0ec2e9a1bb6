"""A sync group's steps: ranks meet, the leader commits what all have pending as one step, and the others hear of it.

To shards the group is one trainer, rank 0 of the group. Who is there is ``member``'s, how a step is agreed on with
shards the coordinator's, as of a trainer alone. What a rank has pending it keeps until it knows what became of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mempool.agreement.book import OF_OTHER_RANKS
from mempool.agreement.groups.offers import sequences_of
from mempool.client.groups.ending import became_decided
from mempool.client.groups.leading import LedMeeting, OthersChanged
from mempool.client.groups.member import Member, error_of
from mempool.client.routing.router import Router
from mempool.client.training.commitment import Commitment, Prepared
from mempool.client.training.coordinator import Coordinator
from mempool.client.training.joint import distinct
from mempool.errors import MempoolError, RankLost, StepConflict
from mempool.types import StepId
from mempool.types.groups.meeting import (
    Arrival,
    MeetPhase,
    MeetReply,
    MeetRequest,
    OfferedPart,
    Word,
    WordPart,
)

if TYPE_CHECKING:
    from mempool.client.routing.attempt import Attempt
    from mempool.client.training.session import Session


T = TypeVar("T")


class SyncGroup:
    """This client as a rank of a sync group (``Stepping``).

    Args:
        coordinator: Its steps.
        router: Carries its calls.

    Attributes:
        member: Who it is; set before anything else.
    """

    member: Member

    def __init__(self, coordinator: Coordinator, router: Router) -> None:
        self._coordinator = coordinator
        self._router = router
        self._meeting = asyncio.Lock()
        self._giving: asyncio.Task[None] | None = None
        self._ended = False  # what a commit came with that did not hear of its end is committed
        self._late: Counter[int] = Counter()  # updates of steps that turned out to be committed, by table
        self._prepared = False  # what is to be committed next: all were told its norm
        self._in_doubt = False  # what this rank has come to commit may be committed, though it is asked to come again
        self._empty: set[int] = set()  # tables whose step this rank has come to commit, with nothing pending

    @property
    def place(self) -> tuple[int, int]:
        return self.member.steps, self.member.generation

    @property
    def steps_together(self) -> bool:
        return True

    @property
    def counts_steps(self) -> bool:
        return False  # what one skips all do

    @property
    def waits(self) -> bool:
        return self.member.waits and not self.member.leads

    def adopt(self, session: Session) -> None:
        joining = self.member.joining
        session.rejoin(
            group=joining.group,
            rank=0,
            generation=self.member.generation,
            first_sequence=joining.rank * OF_OTHER_RANKS + 1,
        )

    async def prepare(
        self, sessions: list[Session], *, want_norm: bool, norm_order: float, timeout_s: float | None
    ) -> list[Prepared | None]:
        async with self._meeting:
            while True:
                self._prepared = True  # also where the group has begun anew meanwhile
                if self._ended and not any(session.pending for session in sessions):
                    return [None for _ in sessions]  # of a step that is committed, which its commit then says
                offer = self._offer(sessions, "prepare")
                offer = replace(offer, want_norm=want_norm, norm_order=norm_order)
                reply = await self._arrive(sessions, offer)
                if reply is None:
                    continue
                if self.member.leads:
                    preparing = partial(self._prepare_all, sessions=sessions, offer=offer, timeout_s=timeout_s)
                    answer = await self._led(preparing, reply.arrivals)
                    if answer is not None:
                        return answer
                    continue
                word = await self._heard(sessions, reply, committing=False)
                if word is not None:
                    told = {part.table_id: part for part in word.parts}
                    return [_as_prepared(told.get(session.table_id), session) for session in sessions]

    async def commit(self, commitments: list[Commitment], *, timeout_s: float | None) -> list[int]:
        sessions = [each.session for each in commitments]
        async with self._meeting:
            prepared = self._prepared
            while True:
                if self._takes_end(sessions):
                    return [self._late.pop(session.table_id, 0) for session in sessions]
                offer = replace(self._offer(sessions, "commit", commitments), want_norm=self._prepared)
                reply = await self._arrive(sessions, offer)
                done: bool | None = None
                if reply is not None and self.member.leads:
                    committing = partial(self._commit_all, commitments=commitments, offer=offer, timeout_s=timeout_s)
                    done = await self._led(committing, reply.arrivals)
                elif reply is not None:
                    done = await self._heard(sessions, reply, committing=True) is not None
                if done is None and prepared and not self._ended:  # whoever has come back asks for the norm first
                    raise self._begun_anew()
                if not done:
                    continue
                self.member.steps += 1
                self._prepared = False
                return [self._late.pop(session.table_id, 0) for session in sessions]

    async def discard(self, sessions: list[Session], *, timeout_s: float | None) -> list[int]:
        """A rank's own: what no commit of the group names, shards drop with that."""
        if self.member.leads:
            return await self._coordinator.discard_own(sessions, timeout_s=timeout_s)
        async with self._meeting:
            await self._take_back()
            dropped = []
            for session in sessions:
                dropped.append(session.book.give_up())
                session.book.given_up.clear()
                session.counters.updates_discarded += dropped[-1]
            return dropped

    async def _take_back(self) -> None:
        """What this rank has come to commit, in a call that was cut off, is not to be: unless it may be decided."""
        reply = await self.member.take_back() if self.waits else None
        if reply is None:
            return
        if reply.answer == "changed":
            with suppress(MempoolError):  # what cannot be asked for now stays: it may be committed
                await self._renew(reply.generation)
            self._ended = False
        elif reply.answer == "heard" and not self._in_doubt:
            self._empty.clear()
            for session in self._coordinator.sessions:
                session.book.take_back()

    async def refresh(self) -> None:
        await self.member.hear()

    async def leave(self) -> None:
        if self._giving is not None:
            self._giving.cancel()
        await self.member.leave()

    async def again(self, parts: tuple[WordPart, ...], offer: MeetRequest) -> tuple[Arrival, ...]:
        """The leader, whose shards miss updates of other ranks: they send them, and come to the next meeting."""
        member = self.member
        member.say(Word(meeting=member.meeting, kind="again", parts=parts))
        reply = await member.arrive(offer)
        if reply.answer == "changed":
            raise self._begun_anew()
        return reply.arrivals

    def _begun_anew(self) -> RankLost:
        group = self.member.joining.group
        return RankLost(f"group {group!r} has begun anew, as a rank came back meanwhile: the same call goes on")

    async def changed(self, generation: int) -> None:
        """The group has begun a generation: a rank came back."""
        if self._meeting.locked():
            return  # whoever is at a meeting is told there
        async with self._meeting:
            if generation > self.member.generation:  # else the answer was overtaken by one to an arrival
                await self._renew(generation)

    def _takes_end(self, sessions: Sequence[Session]) -> bool:
        """Whether this is the same call as one that was cut off, and whose step turned out to be committed."""
        ended, self._ended = self._ended, False
        return ended and not any(session.pending for session in sessions)

    async def _arrive(self, sessions: list[Session], offer: MeetRequest) -> MeetReply | None:
        """None: come again, with what is pending then."""
        try:
            reply = await self.member.arrive(offer)
        except RankLost as lost:
            if self.member.joining.rank == min(set(range(self.member.joining.terms.world_size)) - set(lost.ranks)):
                self.give_back_soon(sessions)
            raise
        if reply.answer == "changed":
            await self._renew(reply.generation)
            return None
        return reply

    async def _led(
        self, carry_out: Callable[[Sequence[Arrival]], Awaitable[T]], arrivals: Sequence[Arrival]
    ) -> T | None:
        """What the leader does for all. None: shards refuse it, as its group has begun anew meanwhile: come again."""
        while True:
            try:
                return await carry_out(arrivals)
            except OthersChanged as changed:
                arrivals = changed.arrivals
            except StepConflict:
                generation = await self.member.newest_generation()
                if generation == self.member.generation:
                    raise
                await self._renew(generation)
                return None

    def _offer(
        self, sessions: Sequence[Session], phase: MeetPhase, commitments: Sequence[Commitment] = ()
    ) -> MeetRequest:
        numbers = {each.session.table_id: (each.lr, each.grad_scale) for each in commitments}
        parts = []
        for session in sorted(sessions, key=lambda each: each.table_id):
            lr, grad_scale = numbers.get(session.table_id, (0.0, 1.0))
            parts.append(
                OfferedPart(
                    table_id=session.table_id,
                    step=session.book.base if not self.member.leads else session.book.next_committed,
                    sequences=self._sealed(session, committing=phase == "commit"),
                    lr=lr,
                    grad_scale=grad_scale,
                )
            )
        return replace(self.member.offer(), phase=phase, parts=tuple(parts))

    def _sealed(self, session: Session, *, committing: bool) -> tuple[int, ...]:
        """What a rank comes with: from here on, where it is to be committed, it can only be that, or sent anew."""
        book = session.book
        if self.member.leads:
            closing = () if book.closing is None else book.closing.sealed
            return tuple(sorted((*closing, *book.open.updates)))
        book.merge()
        book.given_up.clear()
        step = book.seal()
        if step is None:
            if committing:
                self._empty.add(session.table_id)
            return ()
        step.committing = step.committing or committing
        return step.sealed

    # The leader

    async def _prepare_all(
        self, arrivals: Sequence[Arrival], sessions: list[Session], offer: MeetRequest, timeout_s: float | None
    ) -> list[Prepared | None] | None:
        async with LedMeeting(self, sessions, arrivals, offer) as meeting:
            if await meeting.ended_earlier(timeout_s):
                return None
            answers = await self._coordinator.prepare_own(
                sessions, want_norm=offer.want_norm, norm_order=offer.norm_order, timeout_s=timeout_s
            )
            scale = self._scale
            reduced = [
                each and replace(each, squared_norm=each.squared_norm * scale**2, norm=each.norm * scale)
                for each in answers
            ]
            meeting.prepared(
                WordPart(
                    table_id=session.table_id,
                    step=session.book.open.step_id.step,
                    squared_norm=each.squared_norm,
                    finite=each.finite,
                    norm=each.norm,
                    updates=each.updates,
                )
                for session, each in zip(sessions, reduced, strict=True)
                if each is not None
            )
            return [
                each and replace(each, updates=_pending(session))
                for session, each in zip(sessions, reduced, strict=True)
            ]

    async def _commit_all(
        self,
        arrivals: Sequence[Arrival],
        commitments: list[Commitment],
        offer: MeetRequest,
        timeout_s: float | None,
    ) -> bool:
        sessions = [each.session for each in commitments]
        async with LedMeeting(self, sessions, arrivals, offer) as meeting:
            if await meeting.ended_earlier(timeout_s):
                return False
            scaled = [replace(each, grad_scale=each.grad_scale * self._scale) for each in commitments]
            totals = sequences_of(arrivals)
            counts = await self._coordinator.commit_own(scaled, timeout_s=timeout_s)
            for session, count in zip(sessions, counts, strict=True):
                self._late[session.table_id] += count
            meeting.done(
                WordPart(
                    table_id=session.table_id,
                    step=session.book.open.step_id.step,
                    version=self._router.known_version(session.table_id) or 0,
                    updates=len(totals.get(session.table_id, ())),
                )
                for session in sessions
            )
            return True

    @property
    def _scale(self) -> float:
        terms = self.member.joining.terms
        return 1.0 / terms.world_size if terms.reduction == "mean" else 1.0

    # The others

    async def _heard(self, sessions: list[Session], reply: MeetReply, *, committing: bool) -> Word | None:
        """The leader's word, carried out; None: come again."""
        word = reply.word
        assert word is not None, "the home answers others with nothing else"
        if word.kind == "failed" or (word.kind == "again" and committing):  # its Commit may be on its way
            self._in_doubt = True
        elif word.kind != "again":
            self._in_doubt = False
        if word.kind != "failed":
            self._empty.clear()
        if word.kind == "again":
            await self._send_again(sessions, word)
        elif word.kind in ("prepared", "done", "earlier"):
            self._follow(sessions, word, committed=word.kind != "prepared")
            if word.kind == "done" and not committing:  # it came with that in a call that was cut off
                self.member.steps += not self._ended
                self._ended = True
        elif word.kind == "undone":
            for session in sessions:
                if session.book.closing is not None:
                    session.book.closing.committing = False
        self.member.meeting = word.meeting + 1
        if word.kind in ("undone", "failed"):
            raise error_of(word)
        # What came of a call that was cut off may be another thing than what it comes for now.
        return word if word.kind == ("done" if committing else "prepared") else None

    def _follow(self, sessions: Sequence[Session], word: Word, *, committed: bool) -> None:
        told = {part.table_id: part for part in word.parts}
        for session in sessions:
            part = told.get(session.table_id)
            if part is None:
                continue
            session.commits += committed
            if part.version:
                self._router.versions.saw(session.table_id, part.version)
            if committed and session.book.closing is not None and session.book.closing.committing:
                self._count(session)
            session.book.follow(part.step, committed=committed)

    async def _send_again(self, sessions: Sequence[Session], word: Word) -> None:
        by_table = {session.table_id: session for session in sessions}
        first = self.member.joining.rank * OF_OTHER_RANKS
        for part in word.parts:
            session = by_table.get(part.table_id)
            if session is not None:
                session.book.go_under(part.step)
            mine = [each for each in part.sequences if first < each < first + OF_OTHER_RANKS]
            if session is None or not mine:
                continue
            step_id = StepId(
                group=self.member.joining.group, rank=0, step=part.step, generation=session.book.generation
            )
            sending = partial(_send_mine, session=session, step_id=step_id, sequences=mine)
            with suppress(StepConflict):  # the leader is told so itself
                await self._router.call(session.table_id, sending)

    # When ranks are lost, and come back

    def give_back_soon(self, sessions: Sequence[Session]) -> None:
        """What shards hold for a step that is not to be now is of no use to them: it is sent anew."""
        if self._giving is None or self._giving.done():
            self._giving = asyncio.get_running_loop().create_task(self._give_back(list(sessions)))

    async def _give_back(self, sessions: Sequence[Session]) -> None:
        mine = [each for each in sessions if each.joint is None or each.joint.step.state == "open"]
        step_ids = {
            each.table_id: [*each.book.given_up, (each.book.closing or each.book.open).step_id] for each in mine
        }
        if step_ids:
            with suppress(MempoolError):
                await self._router.together(list(step_ids), lambda together: together.discard(step_ids))

    async def _renew(self, generation: int) -> None:
        """Go on in a generation: what may be decided is asked for first, and everything else is sent anew in it."""
        if self._giving is not None:
            await asyncio.wait({self._giving})
        sessions = self._coordinator.sessions
        for joint in distinct(session.applying for session in sessions):
            with suppress(MempoolError):  # it is decided: shards ask each other
                await self._coordinator.applied(list(joint.sessions.values()))
        asked = [session for session in sessions if self._may_be_decided(session)]
        decided = [session for session in asked if await self._is_decided(session)]  # all of it, before anything counts
        for session in decided:
            session.commits += 1
            if session.book.closing is not None:
                self._count(session)
        if decided:
            self.member.steps += not self._ended
            self._ended = True
        for session in sessions:
            session.joint = session.applying = None
            session.book.renew(generation)
        self._empty.clear()
        self._prepared = self._in_doubt = False
        self.member.begin(generation)

    def _count(self, session: Session) -> None:
        count = session.book.acknowledged()
        session.counters.steps_committed += 1
        session.counters.updates_committed += count
        self._late[session.table_id] += count

    def _may_be_decided(self, session: Session) -> bool:
        closing = session.book.closing
        in_doubt = session.joint is not None and session.joint.step.state != "open"
        return session.table_id in self._empty or (closing is not None and (closing.committing or in_doubt))

    async def _is_decided(self, session: Session) -> bool:
        """Whether the group's step that this rank had arrived with is decided; if not, it never is from here on."""
        known = None if session.joint is None else session.joint.step.tables[session.table_id].step_id
        step_id = known or StepId(
            group=self.member.joining.group, rank=0, step=session.book.base, generation=session.book.generation
        )
        return await became_decided(self._router, session.table_id, step_id)


async def _send_mine(attempt: Attempt, *, session: Session, step_id: StepId, sequences: Sequence[int]) -> None:
    await session.send_mine(attempt, step_id, sequences)


def _as_prepared(part: WordPart | None, session: Session) -> Prepared | None:
    if part is None:
        return None
    return Prepared(updates=_pending(session), squared_norm=part.squared_norm, finite=part.finite, norm=part.norm)


def _pending(session: Session) -> int:
    return 0 if session.book.closing is None else len(session.book.closing.sealed)
