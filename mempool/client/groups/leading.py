"""A meeting as the leader of a sync group carries it out: with what all have arrived with, and a word at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mempool.agreement.book import OF_OTHER_RANKS
from mempool.agreement.groups.offers import check_offers, sequences_of
from mempool.errors import MempoolError, RankLost
from mempool.types import StepId
from mempool.types.groups.meeting import Arrival, MeetRequest, Word, WordKind, WordPart

if TYPE_CHECKING:
    from mempool.client.groups.stepping import SyncGroup
    from mempool.client.training.session import Session

_MAX_MESSAGE = 1000


class OthersChanged(Exception):
    """Ranks that were to send updates again have come with others: they have dropped some, or pushed more."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        super().__init__()
        self.arrivals = arrivals


class _Others:
    """The other ranks of a meeting (``Others``)."""

    def __init__(self, group: SyncGroup, arrivals: Sequence[Arrival], offer: MeetRequest) -> None:
        self._group = group
        self._sequences = sequences_of([each for each in arrivals if each.rank])
        self._offer = offer
        self._one = asyncio.Lock()

    def sequences(self, table_id: int) -> tuple[int, ...]:
        return self._sequences.get(table_id, ())

    def own(self, sequence: int) -> bool:
        return sequence < OF_OTHER_RANKS

    async def send_again(self, missing: Mapping[int, tuple[StepId, tuple[int, ...]]]) -> None:
        parts = tuple(
            WordPart(table_id=table_id, step=step_id.step, sequences=sequences)
            for table_id, (step_id, sequences) in missing.items()
        )
        async with self._one:
            arrivals = await self._group.again(parts, self._offer)
        if sequences_of([each for each in arrivals if each.rank]) != self._sequences:
            raise OthersChanged(arrivals)


class LedMeeting:
    """What the leader does between the arrival of all and its word, which it says however that ends."""

    def __init__(
        self, group: SyncGroup, sessions: list[Session], arrivals: Sequence[Arrival], offer: MeetRequest
    ) -> None:
        self._group = group
        self._sessions = sessions
        self._arrivals = arrivals
        self._offer = offer

    async def __aenter__(self) -> LedMeeting:
        group = self._group
        try:
            check_offers(group.member.joining.group, self._arrivals, group._router.name_of)
        except MempoolError as error:
            self._say("undone", error=error)
            raise
        group._coordinator.others = _Others(group, self._arrivals, self._offer)
        return self

    async def ended_earlier(self, timeout_s: float | None) -> bool:
        """Whether a step was in doubt, which is committed now: what is pending beside it comes with the next."""
        group = self._group
        doubtful = [each for each in self._sessions if each.joint is not None and each.joint.step.state != "open"]
        if not doubtful:
            return False
        counts = await group._coordinator.end_earlier(doubtful, timeout_s=timeout_s)
        for session, count in counts.items():
            group._late[session.table_id] += count
        self._say(
            "earlier",
            [
                WordPart(
                    table_id=each.table_id,
                    step=each.book.open.step_id.step,
                    version=group._router.known_version(each.table_id) or 0,
                )
                for each in doubtful
            ],
        )
        return True

    def prepared(self, parts: Iterable[WordPart]) -> None:
        """It ends well: a norm is known."""
        self._say("prepared", parts)

    def done(self, parts: Iterable[WordPart]) -> None:
        """It ends well: a step is committed."""
        self._say("done", parts)

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._group._coordinator.others = None
        if isinstance(error, RankLost):
            self._group.give_back_soon(self._sessions)
        elif isinstance(error, MempoolError):
            doubt = any(each.joint is not None and each.joint.step.state != "open" for each in self._sessions)
            self._say("failed" if doubt else "undone", error=error)

    def _say(self, kind: WordKind, parts: Iterable[WordPart] = (), *, error: MempoolError | None = None) -> None:
        member = self._group.member
        message, code = ("", 0) if error is None else (error.message[:_MAX_MESSAGE], int(error.code))
        member.say(Word(meeting=member.meeting, kind=kind, parts=tuple(parts), message=message, code=code))
