"""Commits the steps of several tables of a pool together: carries out what ``mempool.agreement.step`` says.

A step is acknowledged when its decider has answered; the other owners are told in the background, on the same loop, and
whoever prepares or commits on these tables next waits for that. How messages reach shards is the router's.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from mempool.agreement.step import Goal, StepOfTables, TableStep
from mempool.agreement.step_events import Begun, Decided, Reached
from mempool.client.routing.router import Router
from mempool.client.routing.together import Together
from mempool.client.training.alone import Alone
from mempool.client.training.commitment import Commitment, Others, Prepared, Stepping
from mempool.client.training.heartbeats import Heartbeats, Rank
from mempool.client.training.joint import Joint, as_prepared, discard_given_up, distinct, notices_of, waiting_for
from mempool.errors import DataLoss, MempoolError, NotFound, ShardUnavailable
from mempool.types import ShardInfo

if TYPE_CHECKING:
    from mempool.client.training.session import Session

# How long a call leaves the telling of other owners to the background before it does that itself.
_BACKGROUND_S = 5.0
_MAX_NOTICES = 64

_LeftS = Callable[[], float]


class Coordinator:
    """The steps of one client on the tables of one pool.

    Args:
        router: Carries the calls.

    Attributes:
        heartbeats: Keep what shards hold for it alive.
        group: The group that it has joined; None: it steps alone.
        others: While it commits for other ranks.
        alone: It is to step alone, as its user says.
        found: Joins the group that this process turns out to be of, at its first step; None: it has, or is of none.
    """

    def __init__(self, router: Router) -> None:
        self.heartbeats = Heartbeats(router, self._holdings)
        self._router = router
        self._sessions: list[weakref.ref[Session]] = []  # added to by any thread
        self._telling: set[asyncio.Task[None]] = set()
        self._notices: deque[str] = deque(maxlen=_MAX_NOTICES)
        self.group: Stepping | None = None
        self.others: Others | None = None
        self.alone = False
        self.found: Callable[[], Awaitable[None]] | None = None

    def add(self, session: Session) -> None:
        """Take one more table's session."""
        self._sessions.append(weakref.ref(session))
        if self.group is not None:
            self.group.adopt(session)

    @property
    def sessions(self) -> list[Session]:
        """Those of all tables."""
        return [session for reference in tuple(self._sessions) if (session := reference()) is not None]

    async def joined(self) -> Stepping | None:
        """The group, joined if this process is found to be of one."""
        if self.found is not None:
            await self.found()
        return self.group

    def warn(self, notice: str) -> None:
        """Something that the user is to be warned of, when somebody waits on a thread of theirs."""
        self._notices.append(notice)

    def notices(self) -> list[str]:
        """What a user is to be warned of since this was asked last. For any thread."""
        found = []
        while self._notices:
            found.append(self._notices.popleft())
        return found

    async def prepare(
        self,
        sessions: Sequence[Session],
        *,
        want_norm: bool = True,
        norm_order: float = 0.0,
        timeout_s: float | None = None,
    ) -> list[Prepared | None]:
        """Phase one for everything pending on these tables, together; None for those where nothing is.

        Raises:
            MempoolError: As the router's; nothing is decided, and the same call goes on.
        """
        if (group := await self.joined()) is not None:
            return await group.prepare(list(sessions), want_norm=want_norm, norm_order=norm_order, timeout_s=timeout_s)
        return await self.prepare_own(sessions, want_norm=want_norm, norm_order=norm_order, timeout_s=timeout_s)

    async def prepare_own(
        self, sessions: Sequence[Session], *, want_norm: bool, norm_order: float, timeout_s: float | None
    ) -> list[Prepared | None]:
        """The same of what is pending here, and of ``others``."""
        left_s = self._deadline(timeout_s)
        async with Alone(sessions):
            await self._finish(sessions, left_s)
            joint = await self._sealed(sessions, left_s)
            if joint is None:
                return [None for _ in sessions]
            await self._carry_out(joint, "prepared", left_s, begun=Begun(want_norm=want_norm, norm_order=norm_order))
            return [as_prepared(joint, session) if session.joint is joint else None for session in sessions]

    async def commit(self, commitments: Sequence[Commitment], *, timeout_s: float | None = None) -> list[int]:
        """Apply everything pending on these tables as one step of all of them; see ``Session.commit``.

        Returns:
            How many updates were committed, by table.
        """
        for commitment in commitments:
            commitment.check()
        if (group := await self.joined()) is not None:
            return await group.commit(list(commitments), timeout_s=timeout_s)
        return await self.commit_own(commitments, timeout_s=timeout_s)

    async def commit_own(self, commitments: Sequence[Commitment], *, timeout_s: float | None) -> list[int]:
        """The same of what is pending here, and of ``others``."""
        sessions = [commitment.session for commitment in commitments]
        left_s = self._deadline(timeout_s)
        async with Alone(sessions):
            counts = await self._finish(sessions, left_s)
            joint = await self._sealed(sessions, left_s)
            if joint is not None:
                numbers = {
                    each.session.table_id: (each.lr, each.grad_scale)
                    for each in commitments
                    if each.session.joint is joint
                }
                try:
                    await self._carry_out(joint, "decided", left_s, begun=Begun(), decided=Decided(numbers=numbers))
                except DataLoss as error:
                    if joint.step.state != "open" and await self._lost(joint, error, left_s) == joint.sessions.keys():
                        joint.end()
                    raise
                for session, count in self._acknowledge(joint).items():
                    counts[session] = counts.get(session, 0) + count
                for each in (joint, *joint.apart):
                    self._tell(each)
            return [counts.get(session, 0) for session in sessions]

    async def discard(self, sessions: Sequence[Session], *, timeout_s: float | None = None) -> list[int]:
        """Drop what is pending on these tables; sends nothing where nothing is. A step that is under way stays.

        Returns:
            How many updates were dropped, by table.
        """
        if self.group is not None:
            return await self.group.discard(list(sessions), timeout_s=timeout_s)
        return await self.discard_own(sessions, timeout_s=timeout_s)

    async def discard_own(self, sessions: Sequence[Session], *, timeout_s: float | None) -> list[int]:
        """The same, by this client alone."""
        left_s = self._deadline(timeout_s)
        async with Alone(sessions):
            dropped = []
            concerned = {session.table_id: session for session in sessions}
            for session in sessions:
                dropped.append(session.book.give_up())
                session.counters.updates_discarded += dropped[-1]
                if session.joint is not None and session.book.closing is None:
                    concerned |= self._abandon(session.joint)
            if any(session.book.given_up for session in concerned.values()):
                # What is over at a shard is so with all that came before it: first it hears of the step before.
                for joint in distinct(session.applying for session in concerned.values()):
                    await self._finish_telling(joint, left_s)
            await self._tell_given_up_in_company(sessions, concerned, left_s)
            return dropped

    async def end_earlier(self, sessions: Sequence[Session], *, timeout_s: float | None) -> dict[Session, int]:
        """Learn what became of a Commit without answer, and tell all owners: how many updates were committed."""
        left_s = self._deadline(timeout_s)
        async with Alone(sessions):
            return await self._finish(sessions, left_s)

    async def applied(self, sessions: Iterable[Session], *, timeout_s: float | None = None) -> None:
        """Waits until every owner has applied what was acknowledged.

        Raises:
            MempoolError: One of them has not; the step is decided all the same.
        """
        sessions, left_s = list(sessions), self._deadline(timeout_s)
        async with Alone(sessions):
            for joint in distinct(session.applying for session in sessions):
                await self._finish_telling(joint, left_s)

    async def close(self, *, timeout_s: float) -> None:
        """Let what is decided reach all owners, for so long at most; say nothing any more then."""
        if self.group is not None:
            await self.group.leave()
        if self._telling:
            await asyncio.wait(tuple(self._telling), timeout=timeout_s)
        telling = tuple(self._telling)
        for task in telling:
            task.cancel()
        await asyncio.gather(*telling, return_exceptions=True)
        await self.heartbeats.close()

    async def _finish(self, sessions: Sequence[Session], left_s: _LeftS) -> dict[Session, int]:
        """End what came before: tell all owners what is decided, and learn what became of a Commit without answer."""
        counts: dict[Session, int] = {}
        for session in sessions:
            if session.joint is not None or session.applying is not None:
                break
        else:
            return counts
        for joint in distinct(session.applying for session in sessions):
            await self._finish_telling(joint, left_s)
        for joint in distinct(session.joint for session in sessions):
            if joint.step.state != "open":  # or decided, and cut off before that was noted
                for other in distinct(session.applying for session in joint.sessions.values()):
                    await self._finish_telling(other, left_s)
                await self._end_earlier(joint, "decided", left_s)
                counts |= self._acknowledge(joint)
                for each in (joint, *joint.apart):
                    await self._finish_telling(each, left_s)
        return counts

    async def _sealed(self, sessions: Sequence[Session], left_s: _LeftS) -> Joint | None:
        """The step of everything pending on these tables, closed to further updates; None where nothing is."""
        if self.others is not None:
            self._leave_empty(sessions)
        ready = [
            session
            for session in sessions
            if session.book.closing is not None or session.book.open.updates or self._of_others(session)
        ]
        concerned = {session.table_id: session for session in sessions}
        for session in ready:
            if session.book.merge() and session.joint is not None:
                concerned |= self._abandon(session.joint)
        for session in ready:
            joint = session.joint
            if joint is not None and (set(joint.sessions.values()) != set(ready) or self._has_changed(joint)):
                concerned |= self._abandon(joint)
        for session in concerned.values():
            if session.book.given_up:
                await self._tell_given_up_in_company(sessions, concerned, left_s)
                break
        if not ready:
            return None
        known = ready[0].joint
        if known is not None and all(session.joint is known for session in ready):
            return known
        if len(ready) > 1:
            ready.sort(key=lambda session: session.table_id)
        steps = []
        for session in ready:
            step = session.book.seal(empty=self.others is not None)
            assert step is not None, "something is pending"
            sequences = (*step.sealed, *self._of_others(session))  # a leader's come first: it is rank 0
            steps.append(TableStep(table_id=session.table_id, step_id=step.step_id, sequences=sequences))
        joint = Joint(sessions={session.table_id: session for session in ready}, step=StepOfTables(steps))
        for session in ready:
            session.joint = joint
        return joint

    def _leave_empty(self, sessions: Iterable[Session]) -> None:
        """A step that was of other ranks' updates alone, which they have taken back, is none."""
        for session in sessions:
            closing = session.book.closing
            if closing is not None and not (closing.sealed or closing.committing or self._of_others(session)):
                if session.joint is not None:
                    self._abandon(session.joint)
                session.book.leave_empty()

    def _of_others(self, session: Session) -> tuple[int, ...]:
        return () if self.others is None else self.others.sequences(session.table_id)

    def _has_changed(self, joint: Joint) -> bool:
        """Whether other ranks have more, or less, by now than was prepared."""
        if self.others is None:
            return False
        return any(
            joint.step.tables[table_id].sequences[len(session.book.closing.sealed) :] != self._of_others(session)
            for table_id, session in joint.sessions.items()
            if session.book.closing is not None
        )

    def _abandon(self, joint: Joint) -> dict[int, Session]:
        """It is not committed in this company: its tables' steps go on under other numbers."""
        assert joint.step.state == "open", "a step that may be decided can only be finished"
        for session in joint.sessions.values():
            session.joint = None
            if session.book.closing is not None:
                session.book.renumber()
        return joint.sessions

    async def _tell_given_up_in_company(
        self, sessions: Sequence[Session], concerned: Mapping[int, Session], left_s: _LeftS
    ) -> None:
        """Those that were abandoned with these are told, too; but where that takes long they hold up nothing: shards
        drop what nobody decided, and are told before the next step on those tables."""
        if len(concerned) > len(sessions):
            with suppress(MempoolError):
                await self._tell_given_up(concerned.values(), lambda: min(_BACKGROUND_S, left_s() / 2))
        await self._tell_given_up(sessions, left_s)

    async def _tell_given_up(self, sessions: Iterable[Session], left_s: _LeftS) -> None:
        # Forgotten here before the first message: should one fail, no commit names those updates any more. But a shard
        # that has such a step prepared would refuse the next one, so it is told again before that.
        telling = [session for session in sessions if session.book.given_up]
        if not telling:
            return

        async def once(together: Together) -> None:
            for session in telling:
                await session.pushes.settled()  # what arrives later would be held until the lease ends
            await discard_given_up(together, telling)

        table_ids = [session.table_id for session in telling]
        try:
            await self._router.together(table_ids, once, timeout_s=left_s(), waiting_for=lambda: waiting_for(telling))
        except NotFound:
            gone = [session for session in telling if not self._router.holders(session.table_id)]
            for session in gone:  # with all that was held of them
                session.book.given_up.clear()
            if not gone:
                raise
            await self._tell_given_up(telling, left_s)

    async def _carry_out(
        self, joint: Joint, goal: Goal, left_s: _LeftS, *, begun: Begun, decided: Decided | None = None
    ) -> None:
        joint.others = self.others
        joint.step.handle(begun)
        if decided is not None:
            joint.step.handle(decided)
        try:
            while True:
                try:
                    await self._router.together(
                        list(joint.sessions),
                        partial(joint.carry_out, goal),
                        timeout_s=left_s(),
                        waiting_for=lambda: joint.waiting_for,
                    )
                    return
                except NotFound as error:
                    if self._leave_dropped(joint):
                        continue
                    if joint.step.state == "open" or not all(map(self._router.holders, joint.sessions)):
                        raise
                    # Whoever asks may be about another table, which is not the one that this shard speaks of.
                    raise ShardUnavailable(
                        f"{error.message}: who knows which of the two does not say.",
                        shard=error.shard,
                        address=error.address,
                    ) from error
        except MempoolError as error:
            if not isinstance(error, NotFound):
                joint.add_state(error, self._names(joint.sessions))
            raise
        finally:
            self._note(joint)

    def _leave_dropped(self, joint: Joint) -> bool:
        """Whether the step goes on without tables that were dropped; one that nobody has decided on does not."""
        gone = [table_id for table_id in joint.sessions if not self._router.holders(table_id)]
        if joint.step.state == "open":
            self._abandon(joint)
            return False
        if len(gone) == len(joint.sessions):
            joint.end()
            return False
        for table_id in gone:
            joint.leave(table_id)
        return bool(gone)

    def _acknowledge(self, joint: Joint) -> dict[Session, int]:
        """How many updates each session has in it, and in what of it is a step of its own by now."""
        counts = {}
        for each in (joint, *joint.apart):
            for session in each.sessions.values():
                if session.joint is each:
                    counts[session] = session.book.acknowledged()
                    session.joint, session.applying = None, each
                    session.commits += 1
                    session.counters.steps_committed += 1
                    session.counters.updates_committed += counts[session]
        if isinstance(joint.step.next("applied"), Reached):
            self._over(joint)
        return counts

    def _over(self, joint: Joint) -> None:
        for session in joint.sessions.values():
            if session.applying is joint:
                session.applying = None
                session.book.applied()

    def _tell(self, joint: Joint) -> None:
        """Let the other owners know in the background: whoever comes next on these tables waits for it."""
        if next(iter(joint.sessions.values())).applying is not joint:
            return

        async def tell() -> None:
            try:
                await self._carry_out(joint, "applied", self._deadline(None), begun=Begun())
            except MempoolError:
                return  # the next call on these tables tries again, and raises what it meets
            self._over(joint)

        joint.telling = asyncio.get_running_loop().create_task(tell())
        self._telling.add(joint.telling)
        joint.telling.add_done_callback(self._telling.discard)

    async def _finish_telling(self, joint: Joint, left_s: _LeftS) -> None:
        task, joint.telling = joint.telling, None
        if task is not None:
            try:
                await asyncio.wait({task}, timeout=min(_BACKGROUND_S, left_s() / 2))
            finally:
                if not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
        if next(iter(joint.sessions.values())).applying is joint:
            await self._end_earlier(joint, "applied", left_s)
            self._over(joint)

    async def _end_earlier(self, joint: Joint, goal: Goal, left_s: _LeftS) -> None:
        """Carry out a step that came before: it goes on without tables that have lost pages, where others are left."""
        while True:
            try:
                return await self._carry_out(joint, goal, left_s, begun=Begun())
            except DataLoss as error:
                lost = await self._lost(joint, error, left_s)
                if not lost or joint.step.state == "open":
                    raise
                if lost == joint.sessions.keys():
                    joint.end()
                    raise
                for table_id in lost:
                    joint.leave(table_id)

    async def _lost(self, joint: Joint, error: DataLoss, left_s: _LeftS) -> set[int]:
        """Of which of its tables the shard that said so has lost pages; none where it does not say."""
        holders = (info for table_id in joint.sessions for info in self._router.holders(table_id))
        info = next((info for info in holders if info.shard == error.shard), None)
        if info is None:
            return set()
        try:
            async with asyncio.timeout(left_s()):
                status = await self._router.dial(info).status()
        except (MempoolError, TimeoutError):
            return set()
        return {table.table_id for table in status.tables if table.lost_pages} & joint.sessions.keys()

    def _holdings(self) -> dict[ShardInfo, set[Rank]]:
        """Which ranks hold anything, or let anything be remembered, by shard."""
        found: dict[ShardInfo, set[Rank]] = {}
        remembered = self._router.remembered.shards()
        for reference in tuple(self._sessions):
            session = reference()
            if session is None:
                self._sessions.remove(reference)
                continue
            for info in self._router.holders(session.table_id):
                if session.book.holds or info.shard in remembered.get(session.table_id, ()):
                    found.setdefault(info, set()).add(session.rank)
        return found

    def _note(self, joint: Joint) -> None:
        """Keep for the user what shards dropped."""
        if not joint.dropped:
            return
        self._notices.extend(notices_of(joint, self.heartbeats, self._names))

    def _names(self, table_ids: Collection[int]) -> str:
        names = ", ".join(repr(self._router.name_of(table_id)) for table_id in table_ids)
        return f"table {names}" if len(table_ids) == 1 else f"tables {names}"

    def _deadline(self, timeout_s: float | None) -> _LeftS:
        """One deadline for all messages of a call: the seconds left of it, asked at any time from now."""
        clock = asyncio.get_running_loop()
        end_s = clock.time() + (self._router.timeout_s if timeout_s is None else timeout_s)
        return lambda: end_s - clock.time()
