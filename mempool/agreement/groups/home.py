"""The home of groups of ranks: who is there, who is lost, and what the leader of a sync group says to the others.

Pure: ``handle`` takes what a rank says and answers it, or None where there is nothing to say yet; asking again with the
same is harmless. All of it is soft: ranks repeat what they said, so a home that begins anew knows it again. Whose
updates are committed is ``step``'s, as of any trainer.
"""

import math
from dataclasses import dataclass, field, replace

from mempool.agreement.groups.bounds import PART_BYTES, bytes_of, bytes_of_member, bytes_of_word, check_request
from mempool.errors import InvalidRequest, Overloaded
from mempool.types.groups.meeting import (
    Arrival,
    MeetReply,
    MeetRequest,
    RankState,
    Seen,
    Terms,
    Undecided,
    Word,
)

MAX_GROUPS = 256
MAX_BYTES = 64 * 2**20
"""Of ranks, what they arrive with, and leaders' words, of all groups together."""


@dataclass(slots=True)
class _Member:
    """One process that is a rank.

    generation: Of the group, that it has said it knows. meeting: at which it is. number: of its newest arrival, which
    arrival is, where it is not over; of one that it has taken back, the next. ticket: With which it has joined. left:
    It has said its last word: what else comes of it comes late.
    """

    said: MeetRequest
    heard_s: float
    generation: int = 0
    meeting: int = 0
    number: int = 0
    arrival: MeetRequest | None = None
    ticket: int = 0
    left: bool = False


@dataclass(slots=True)
class _Group:
    """complete: The meeting at which all were there last. word: the leader's last one, in this generation. undecided:
    What ranks had arrived to commit when a later generation began. told: The generation is known from what ranks have
    said, as it began before this home did; learned_s: when that was, also in later generations. changes: See there."""

    terms: Terms
    generation: int
    told: bool
    learned_s: float | None
    changes: int = 0
    step: int = 0
    members: dict[int, _Member] = field(default_factory=dict)
    complete: int = 0
    word: Word | None = None
    undecided: Undecided | None = None


class Groups:
    """All groups whose home one shard is.

    Args:
        lease_s: Silence after which a rank is taken for dead.
    """

    def __init__(self, *, lease_s: float) -> None:
        self.lease_s = lease_s
        self._groups: dict[str, _Group] = {}
        self._num_bytes = 0
        self._handling = "", 0.0  # the group that says something, and when
        self._tickets = 0  # the newest that was given
        self._first_ticket = 0  # of this home: all of an earlier one's are lower

    def changes(self, group: str) -> int:
        """Another number whenever somebody who waits is to be looked at again."""
        known = self._groups.get(group)
        return -1 if known is None else known.changes

    def handle(
        self, request: MeetRequest, now_s: float, *, heard_s: float | None = None, first_generation: int
    ) -> MeetReply | None:
        """What a rank is answered; None: nothing yet.

        Args:
            heard_s: When it asked; None: now.
            first_generation: Of a group that nothing is known of, above any that a home has given before: the time.

        Raises:
            InvalidRequest: The group is joined under other terms, or the rank was replaced.
            Overloaded: There are too many groups, or they hold too much.
        """
        check_request(request)
        heard_s = now_s if heard_s is None else heard_s
        self._handling = request.group, now_s
        if request.kind == "leave":
            return self._leave(request, now_s)
        if request.kind == "join" and not self._is_due(request, first_generation):
            self._tickets = max(self._tickets + 1, first_generation)
            return MeetReply(answer="wait", lease_s=self.lease_s, ticket=self._tickets)
        group = self._group(request, now_s, first_generation)
        if isinstance(group, MeetReply):
            return group
        member = group.members.get(request.rank)
        if member is not None and member.left and member.said.nonce == request.nonce:
            return self._reply(group, "wait")  # nobody waits for this answer any more
        if member is None or member.said.nonce != request.nonce:
            reply = self._admit(group, request, member, now_s, first_generation)
            if reply is not None:
                return reply
            member = group.members[request.rank]
        member.said, member.heard_s = _brief(request, member.said), max(heard_s, member.heard_s)
        if request.kind != "join" or not group.step:  # who joins says where its model is, which may be elsewhere
            group.step = max(group.step, request.step)
        if request.generation > group.generation:  # this home has begun anew, and somebody has joined it since
            self._begin(group, request.generation + 1)
        if request.generation > member.generation:
            member.generation = request.generation
            group.changes += 1
        if request.kind == "join":
            return self._joined(group, request, now_s)
        if request.generation < group.generation and group.terms.consistency == "sync":
            return self._reply(group, "changed")
        if request.meeting > member.meeting:
            member.meeting = request.meeting
            group.changes += group.terms.consistency == "bounded"  # ranks of a sync group wait until all are there
        if request.rank == 0 and request.word is not None and _is_newer(request.word, group.word):
            self._take_word(group, request.word)
            group.changes += 1
        if request.kind == "beat":
            return self._take_back(group, member, request, now_s) if request.number else self._reply(group, "heard")
        if self._is_late(member, request):
            return self._reply(group, "wait")  # nobody waits for this answer: what came after it counts
        member.number = request.number
        return self._arrived(group, member, request, now_s)

    def _leave(self, request: MeetRequest, now_s: float) -> MeetReply:
        group = self._groups.get(request.group)
        member = None if group is None else group.members.get(request.rank)
        if group is None or member is None or member.said.nonce != request.nonce:
            return MeetReply(answer="heard", generation=request.generation, lease_s=self.lease_s)
        member.left, member.heard_s = True, now_s
        group.changes += 1
        self._take(member, None)
        return self._reply(group, "heard")

    def _is_due(self, request: MeetRequest, first_generation: int) -> bool:
        """Whether who joins was given a ticket here, and nobody has joined as that rank with a later one: a copy that
        comes late, of a process that is gone, takes nobody's place."""
        self._first_ticket = self._first_ticket or first_generation
        group = self._groups.get(request.group)
        known = None if group is None else group.members.get(request.rank)
        if known is not None and known.said.nonce == request.nonce:
            return True
        return request.number >= self._first_ticket and (known is None or request.number > known.ticket)

    def _take_back(self, group: _Group, member: _Member, request: MeetRequest, now_s: float) -> MeetReply:
        """Its rank does not want to be at the meeting any more: it is not, unless all are, or may have been."""
        arrival = member.arrival
        unknown = group.learned_s is not None and member.number < request.number  # it may have been at an earlier home
        if unknown or (arrival is not None and group.complete == arrival.meeting):
            return self._reply(group, "wait", others=(self._seen(group, 0, now_s),))
        member.number = max(member.number, request.number + 1)
        self._take(member, None)
        return self._reply(group, "heard")

    def next_s(self, group: str, now_s: float) -> float:
        """How long until somebody of the group is lost by silence alone."""
        known = self._groups.get(group)
        heard_s = [] if known is None else [each.heard_s for each in known.members.values()]
        if known is not None and known.learned_s is not None:
            heard_s.append(known.learned_s)
        left = [each + self.lease_s - now_s for each in heard_s]
        return min((each for each in left if each > 0.0), default=self.lease_s)

    def _group(self, request: MeetRequest, now_s: float, first_generation: int) -> _Group | MeetReply:
        group = self._groups.get(request.group)
        joins = request.kind == "join"
        if group is not None and joins and all(each.left for each in group.members.values()):
            said = [each.said for each in group.members.values()]
            if not any(each.nonce == request.nonce or _restarts(request, each) for each in said):  # another job's name
                self._forget(request.group, group)
                group = None
        if group is None:
            self._make_room()
            generation = first_generation if joins else request.generation
            learned_s = None if joins else now_s
            group = _Group(request.terms, generation, told=not joins, learned_s=learned_s)
            self._groups[request.group] = group
        elif group.terms != request.terms and (reply := self._take_terms(group, request, now_s)) is not None:
            return reply
        return group

    def _take_terms(self, group: _Group, request: MeetRequest, now_s: float) -> MeetReply | None:
        """Other terms than the group's, which hold while anybody of it is there. None: they are the group's now."""
        others = [each for each in group.members.values() if each.said.nonce != request.nonce]
        there = next((each for each in others if self._lives(each, now_s)), None)
        both_elastic = group.terms.elastic and request.terms.elastic
        if there is not None and both_elastic and _restarts(request, there.said):
            there = None  # their launcher has started all of them again
        resized = replace(group.terms, world_size=request.terms.world_size) == request.terms
        if there is not None and both_elastic and resized and request.kind == "join":  # it may be dead for a moment
            return self._reply(group, "occupied", others=(self._seen(group, there.said.rank, now_s),))
        if there is not None:
            raise InvalidRequest(
                f"group {request.group!r} is joined by rank {request.rank} ({request.host}) with "
                f"{request.terms.words}, and rank {there.said.rank} ({there.said.host}) is in it with "
                f"{group.terms.words}: all ranks of a group say the same. Nothing was changed."
            )
        was_of = group.terms.world_size
        if others and was_of != request.terms.world_size and not both_elastic:
            raise InvalidRequest(
                f"group {request.group!r} had {was_of} ranks (rank {others[0].said.rank} was {others[0].said.host}), "
                f"and is joined by rank {request.rank} ({request.host}) with {request.terms.world_size}: say "
                "elastic=True in all of them where it may go on with another number. Nothing was changed."
            )
        self._begin(group, group.generation + 1)
        self._forget_members(group)
        group.terms, group.learned_s = request.terms, None
        return None

    def _admit(
        self, group: _Group, request: MeetRequest, known: _Member | None, now_s: float, first_generation: int
    ) -> MeetReply | None:
        """A process that is not known as its rank; None: it is from now on."""
        if known is not None and not known.left:
            if request.kind != "join" and request.ticket <= known.ticket:
                raise InvalidRequest(
                    f"rank {request.rank} of group {request.group!r} is {known.said.host} by now, which joined after "
                    f"{request.host}: a rank is one process at a time. Nothing was changed."
                )
            joins = request.kind == "join"  # else it has: what is known here is of one that is gone, and came late
            if joins and self._lives(known, now_s) and not _restarts(request, known.said):
                return self._reply(group, "occupied", others=(self._seen(group, request.rank, now_s),))
        if known is not None and request.kind != "join":
            self._take(known, None)
        elif known is not None:
            under_way = group.complete and not self._word_is_out(group) and self._lives(group.members.get(0), now_s)
            if under_way and request.rank:  # what all have arrived for is carried out first
                return self._reply(group, "wait", others=(self._seen(group, 0, now_s),))
            self._take(known, None)
        # Whoever was this rank before may have numbered updates in this generation: they must not be taken for others.
        if request.kind == "join" and (group.told or (known is not None and known.generation >= group.generation)):
            # Where what was before is known from others, that rank may have been in a later one than they know of.
            self._begin(group, max(group.generation + 1, first_generation if group.told else 0))
        ticket = request.number if request.kind == "join" else request.ticket
        before = 0 if known is None else bytes_of_member(known.said)
        self._account(bytes_of_member(request) - before, f"rank {request.rank} of {request.group!r}")
        group.members[request.rank] = _Member(_brief(request, request), now_s, ticket=ticket)
        group.changes += 1
        return None

    def _joined(self, group: _Group, request: MeetRequest, now_s: float) -> MeetReply | None:
        """Nobody begins in a generation before all who live know of it: shards refuse the older one from then on."""
        member = group.members[request.rank]
        member.generation = group.generation
        if group.terms.consistency == "sync":
            late = [
                rank
                for rank, each in group.members.items()
                if each.generation < group.generation and self._lives(each, now_s)
            ]
            if late:
                return self._reply(group, "wait", others=tuple(self._seen(group, rank, now_s) for rank in late))
        undecided = group.undecided
        if undecided is not None and undecided.step <= group.step:  # what became of it was said since
            undecided = None
        return self._reply(group, "heard", undecided=undecided)

    def _arrived(self, group: _Group, member: _Member, request: MeetRequest, now_s: float) -> MeetReply | None:
        if group.terms.consistency == "bounded":
            return self._within_bounds(group, request, now_s)
        # A later one is that of a meeting that the leader has given up before all were there: it says so.
        if request.rank and group.word is not None and group.word.meeting >= request.meeting:
            self._take(member, request)
            return self._reply(group, "word", word=group.word)
        self._take(member, request)
        if group.complete != request.meeting and len(here := _here(group, request.meeting)) == group.terms.world_size:
            group.complete = request.meeting
            group.changes += 1
        if group.complete == request.meeting:
            if request.rank and self._lives(group.members.get(0), now_s):
                return None
            if not request.rank and len(here := _here(group, request.meeting)) == group.terms.world_size:
                arrivals = tuple(
                    Arrival(
                        rank=each.rank,
                        host=each.host,
                        phase=each.phase,
                        parts=each.parts,
                        want_norm=each.want_norm,
                        norm_order=each.norm_order,
                    )
                    for each in here
                )
                return self._reply(group, "arrived", arrivals=arrivals)
        return self._lost(group, request.rank, now_s, request.meeting)

    def _within_bounds(self, group: _Group, request: MeetRequest, now_s: float) -> MeetReply | None:
        slow = [
            rank
            for rank in range(group.terms.world_size)
            if _progress(group.members.get(rank)) < request.meeting - group.terms.staleness
        ]
        if not slow:
            return self._reply(group, "arrived")
        lost = self._lost(group, request.rank, now_s, request.meeting - group.terms.staleness)
        if lost is None or not {each.rank for each in lost.others} & set(slow):
            return None
        return lost

    def _is_late(self, member: _Member, request: MeetRequest) -> bool:
        return request.number < member.number

    def waiting(self, request: MeetRequest, now_s: float) -> MeetReply:
        """What a rank is told that has waited for long enough: who is not there yet."""
        group = self._groups[request.group]
        bound = request.meeting - (group.terms.staleness if group.terms.consistency == "bounded" else 0)
        others = tuple(
            self._seen(group, rank, now_s)
            for rank in range(group.terms.world_size)
            if rank != request.rank
            and ((each := group.members.get(rank)) is None or each.meeting < bound or not self._lives(each, now_s))
        )
        return self._reply(group, "wait", others=others)

    def _lost(self, group: _Group, asking: int, now_s: float, meeting: int) -> MeetReply | None:
        """Those who are gone, but who asks, if any. meeting: At which all were, or are to be."""
        lost = [
            self._seen(group, rank, now_s)
            for rank, member in sorted(group.members.items())
            if rank != asking and not self._lives(member, now_s)
        ]
        silent_s = 0.0 if group.learned_s is None else now_s - group.learned_s
        if silent_s > self.lease_s and meeting > 1:  # all were there before this home was: who lives has said so
            lost += [
                replace(self._seen(group, rank, now_s), state="lost", silent_s=silent_s)
                for rank in range(group.terms.world_size)
                if rank not in group.members
            ]
        return self._reply(group, "lost", others=tuple(lost)) if lost else None

    def _seen(self, group: _Group, rank: int, now_s: float) -> Seen:
        member = group.members.get(rank)
        if member is None:
            return Seen(rank=rank, host="", state="awaited", silent_s=0.0, meeting=0)
        state: RankState = "left" if member.left else "here" if self._lives(member, now_s) else "lost"
        if state == "here" and member.generation < group.generation:
            state = "awaited"
        return Seen(
            rank=rank,
            host=member.said.host,
            state=state,
            silent_s=max(0.0, now_s - member.heard_s),
            meeting=member.meeting,
            step=member.said.step,
        )

    def _lives(self, member: _Member | None, now_s: float) -> bool:
        return member is not None and not member.left and now_s - member.heard_s <= self.lease_s

    def _word_is_out(self, group: _Group) -> bool:
        return group.word is not None and group.word.meeting >= group.complete

    def _begin(self, group: _Group, generation: int) -> None:
        """What was agreed on before is over: meetings are counted anew."""
        undecided = _undecided(group) or group.undecided
        group.generation, group.told, group.complete = generation, False, 0
        self._take_word(group, None)
        group.changes += 1
        for member in group.members.values():
            self._take(member, None)
            member.meeting = 0 if group.terms.consistency == "sync" else member.meeting
        self._take_undecided(group, undecided)

    def _take(self, member: _Member, arrival: MeetRequest | None) -> None:
        """What a member has arrived with, in place of what it had."""
        if member.arrival is arrival:
            return
        self._account(bytes_of(arrival) - bytes_of(member.arrival), f"rank {member.said.rank} of {member.said.group!r}")
        member.arrival = None if arrival is None else replace(arrival, word=None)

    def _take_word(self, group: _Group, word: Word | None) -> None:
        """The leader's, in place of the one before."""
        self._account(bytes_of_word(word) - bytes_of_word(group.word), "the leader")
        group.word = word

    def _take_undecided(self, group: _Group, undecided: Undecided | None) -> None:
        more = PART_BYTES * (len(undecided.parts) if undecided else 0)
        less = PART_BYTES * (len(group.undecided.parts) if group.undecided else 0)
        self._account(more - less, "a step that nobody knows the end of")
        group.undecided = undecided

    def _account(self, more: int, whose: str) -> None:
        if more > 0 and self._num_bytes + more > MAX_BYTES:
            self._forget_dead()
        if more > 0 and self._num_bytes + more > MAX_BYTES:
            raise Overloaded(
                f"groups hold {self._num_bytes:,} bytes at their home, and at most {MAX_BYTES:,} are taken: {whose} is "
                "to come again in a moment",
                retry_after_s=1.0,
            )
        self._num_bytes += more

    def _forget_dead(self) -> None:
        """Groups none of whose ranks live, but the one that says something."""
        handling, now_s = self._handling
        for name, group in list(self._groups.items()):
            if name != handling and not any(self._lives(member, now_s) for member in group.members.values()):
                self._forget(name, group)

    def _make_room(self) -> None:
        if len(self._groups) >= MAX_GROUPS:
            self._forget_dead()
        if len(self._groups) >= MAX_GROUPS:
            raise Overloaded(
                f"{MAX_GROUPS} groups of ranks are at work on this pool, and no more are taken", retry_after_s=10.0
            )

    def _forget_members(self, group: _Group) -> None:
        for member in group.members.values():
            self._take(member, None)
            self._num_bytes -= bytes_of_member(member.said)
        group.members.clear()

    def _forget(self, name: str, group: _Group) -> None:
        self._forget_members(group)
        self._take_word(group, None)
        self._take_undecided(group, None)
        del self._groups[name]

    def _reply(self, group: _Group, answer: str, **more: object) -> MeetReply:
        return MeetReply(
            answer=answer,  # type: ignore[arg-type]
            generation=group.generation,
            step=group.step,
            lease_s=self.lease_s,
            **more,  # type: ignore[arg-type]
        )


def _here(group: _Group, meeting: int) -> list[MeetRequest]:
    """What ranks have come with to a meeting, by rank; of those before the first who is not there."""
    found = []
    for rank in range(group.terms.world_size):
        member = group.members.get(rank)
        if member is None or member.arrival is None or member.generation != group.generation:
            break
        if member.arrival.meeting != meeting:
            break
        found.append(member.arrival)
    return found


def _is_newer(word: Word, known: Word | None) -> bool:
    return known is None or (word != known and known.meeting <= word.meeting)


def _undecided(group: _Group) -> Undecided | None:
    """What ranks have arrived to commit, newest, where the leader has not said that it is over."""
    arrivals = [each.arrival for each in group.members.values() if each.arrival is not None]
    arrivals = [each for each in arrivals if each.phase == "commit" and each.generation == group.generation]
    if not arrivals or group.terms.consistency != "sync":
        return None
    newest = max(each.meeting for each in arrivals)
    if group.word is not None and group.word.meeting >= newest and group.word.kind != "failed":
        return None
    there = [each for each in arrivals if each.meeting == newest]
    parts = {part.table_id: replace(part, sequences=()) for each in there for part in each.parts}
    step = max(each.step for each in there) + 1
    return Undecided(generation=group.generation, step=step, parts=tuple(parts.values()))


def _progress(member: _Member | None) -> float:
    """Of a bounded rank: the step that it is at; one that has left holds nobody up."""
    return 0.0 if member is None else math.inf if member.left else float(member.meeting)


def _brief(request: MeetRequest, first: MeetRequest) -> MeetRequest:
    """Who says it, as it was named first, and where it is: without what it comes with."""
    return replace(request, host=first.host, launcher=first.launcher, parts=(), word=None)


def _restarts(request: MeetRequest, known: MeetRequest) -> bool:
    """Whether a newcomer's launcher has ended that process to start it; another job's has not, whatever it tries."""
    return request.kind == "join" and request.launcher == known.launcher and request.restart > known.restart
