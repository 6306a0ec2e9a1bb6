"""The home of groups, event by event."""

from contextlib import suppress
from dataclasses import replace

import pytest

from mempool.agreement.groups.home import MAX_BYTES, MAX_GROUPS, Groups
from mempool.errors import InvalidRequest, Overloaded
from mempool.types.groups.meeting import MeetReply, MeetRequest, OfferedPart, Terms, Word, WordPart

LEASE_S = 10.0
FIRST = 1_000


class Home:
    """A home and what its ranks know. All methods answer what the rank is answered; None: it waits."""

    def __init__(self, world_size: int = 2, **terms: object) -> None:
        self.groups = Groups(lease_s=LEASE_S)
        self.now_s = 0.0
        self.terms = Terms(world_size=world_size, **terms)  # type: ignore[arg-type]
        self.generations: dict[int, int] = {}

    def request(self, rank: int, kind: str, **more: object) -> MeetRequest:
        request = MeetRequest(
            group="job",
            rank=rank,
            nonce=rank + 1,
            host=f"host-{rank}",
            terms=self.terms,
            kind=kind,  # type: ignore[arg-type]
            generation=0 if kind == "join" else self.generations.get(rank, 0),
        )
        return replace(request, **more)  # type: ignore[arg-type]

    def ask(self, rank: int, kind: str = "beat", **more: object) -> MeetReply | None:
        reply = self.groups.handle(self.request(rank, kind, **more), self.now_s, first_generation=FIRST)
        if reply is not None and reply.ticket:
            more["number"] = reply.ticket
            reply = self.groups.handle(self.request(rank, kind, **more), self.now_s, first_generation=FIRST)
        if reply is not None and reply.answer in ("heard", "changed"):
            self.generations[rank] = reply.generation
        return reply

    def join(self, *ranks: int) -> None:
        for rank in ranks:
            reply = self.ask(rank, "join")
            assert reply is not None
            assert reply.answer == "heard"

    def arrive(self, rank: int, meeting: int, **more: object) -> MeetReply | None:
        return self.ask(rank, "arrive", meeting=meeting, **more)


def part(*sequences: int) -> tuple[OfferedPart, ...]:
    return (OfferedPart(table_id=1, step=1, sequences=sequences),)


def test_the_leader_is_given_what_all_have_and_the_others_its_word() -> None:
    home = Home(3)
    home.join(0, 1, 2)
    assert home.arrive(1, 1, parts=part(8)) is None
    assert home.arrive(0, 1, parts=part(1)) is None
    assert home.arrive(2, 1, parts=part(9)) is None
    reply = home.arrive(0, 1, parts=part(1))
    assert reply is not None
    assert [(each.rank, each.parts) for each in reply.arrivals] == [(0, part(1)), (1, part(8)), (2, part(9))]
    assert home.arrive(1, 1, parts=part(8)) is None
    word = Word(meeting=1, kind="done")
    home.ask(0, word=word)
    for rank in (1, 2, 1):  # also whoever did not get the answer
        reply = home.arrive(rank, 1)
        assert reply is not None
        assert reply.word == word
    assert home.arrive(1, 2) is None


def test_a_home_that_begins_anew_knows_from_ranks_what_was() -> None:
    home = Home(2)
    home.join(0, 1)
    home.arrive(0, 4)
    home.groups = Groups(lease_s=LEASE_S)
    assert home.arrive(1, 4, parts=part(8)) is None
    reply = home.arrive(0, 4, word=Word(meeting=3, kind="done"))
    assert reply is not None
    assert (reply.answer, reply.generation) == ("arrived", FIRST)
    home.groups = Groups(lease_s=LEASE_S)
    assert home.arrive(1, 4) is None
    home.ask(0, meeting=4, word=Word(meeting=4, kind="done"))
    reply = home.arrive(1, 4)
    assert reply is not None
    assert reply.answer == "word"


def test_a_rank_that_is_silent_for_its_lease_is_lost_to_whoever_waits_or_comes() -> None:
    home = Home(3)
    home.join(0, 1, 2)
    assert home.arrive(0, 1) is None
    home.now_s = LEASE_S
    home.ask(0)
    home.ask(1)
    home.now_s = LEASE_S + 0.1
    for rank in (0, 1):
        reply = home.arrive(rank, 1)
        assert reply is not None
        assert [(each.rank, each.host, each.state) for each in reply.others] == [(2, "host-2", "lost")]
    home.now_s *= 2  # nobody is lost to itself, however long it waits for an answer
    reply = home.groups.handle(home.request(0, "arrive", meeting=1), home.now_s, heard_s=0.0, first_generation=FIRST)
    assert reply is not None
    assert [each.rank for each in reply.others] == [1, 2]
    for rank in range(3):  # they were only paused
        home.ask(rank)
    assert home.arrive(2, 1) is None
    reply = home.arrive(0, 1)
    assert reply is not None
    assert reply.answer == "arrived"


def test_what_all_have_arrived_for_is_waited_for_though_one_dies_meanwhile() -> None:
    home = Home(3)
    home.join(0, 1, 2)
    for rank in (1, 2, 0):
        home.arrive(rank, 1)
    home.now_s = LEASE_S + 0.1
    home.ask(0, meeting=1)
    assert home.arrive(1, 1) is None
    assert home.ask(2, "join", nonce=77).answer == "wait"  # type: ignore[union-attr]
    home.now_s *= 3
    reply = home.arrive(1, 1)
    assert reply is not None
    assert 0 in [each.rank for each in reply.others]


def test_a_rank_that_comes_back_begins_a_generation_which_all_who_live_know_of_first() -> None:
    home = Home(3)
    home.join(0, 1, 2)
    home.arrive(0, 1)
    home.now_s = LEASE_S / 2
    home.ask(0)
    home.ask(1)
    home.now_s = LEASE_S + 0.1
    reply = home.ask(2, "join", nonce=77)
    assert reply is not None
    assert (reply.answer, sorted(each.rank for each in reply.others)) == ("wait", [0, 1])
    assert home.arrive(0, 1).answer == "changed"  # type: ignore[union-attr]
    home.ask(0)
    home.ask(1)
    home.ask(1)
    reply = home.ask(2, "join", nonce=77)
    assert reply is not None
    assert (reply.answer, reply.generation) == ("heard", FIRST + 1)
    assert home.arrive(0, 1) is None
    with pytest.raises(InvalidRequest, match=r"rank 2 .* is host-2 by now, which joined after host-old"):
        home.ask(2, host="host-old")


def test_an_unknown_past_is_none_that_a_newcomer_may_repeat() -> None:
    home = Home(2)
    home.join(0, 1)
    home.groups = Groups(lease_s=LEASE_S)
    home.arrive(0, 3)  # the generation is known again, but not who else was in it
    reply = home.ask(1, "join", nonce=77)
    assert reply is not None
    assert reply.generation == FIRST + 1
    home.generations[0] = FIRST + 50  # of a home whose clock was ahead
    home.groups = Groups(lease_s=LEASE_S)
    home.ask(1, "join", nonce=78)
    reply = home.ask(0)
    assert reply is not None
    assert (reply.answer, reply.generation) == ("changed", FIRST + 51)


def test_a_rank_that_lives_is_no_other_process_unless_its_launcher_says_so() -> None:
    home = Home(2)
    home.join(0, 1)
    reply = home.ask(1, "join", nonce=77, host="host-b")
    assert reply is not None
    assert (reply.answer, reply.others[0].host) == ("occupied", "host-1")
    # Another job's launcher starts its ranks again, too, as they were refused: they take nobody's place.
    other = {"nonce": 77, "restart": 1, "host": "host-b", "launcher": "another"}
    assert home.ask(1, "join", **other).answer == "occupied"  # type: ignore[union-attr]
    assert home.ask(1, "join", nonce=77, restart=1).answer == "wait"  # type: ignore[union-attr]


def test_ranks_that_a_home_has_never_heard_of_are_lost_where_the_others_say_that_they_were_there() -> None:
    home = Home(3)
    home.join(0, 1, 2)
    home.groups = Groups(lease_s=LEASE_S)
    home.now_s = 100.0
    assert home.arrive(0, 3) is None
    assert home.groups.next_s("job", home.now_s) == LEASE_S
    home.now_s += LEASE_S / 2
    assert home.arrive(1, 3) is None
    home.ask(0)
    home.now_s += LEASE_S / 2 + 0.1
    for rank in (0, 1):
        reply = home.arrive(rank, 3)
        assert reply is not None
        assert [(each.rank, each.state) for each in reply.others] == [(2, "lost")]
    # At the first meeting of all they may not have come yet.
    home.groups = Groups(lease_s=LEASE_S)
    home.ask(0)
    home.now_s += LEASE_S + 0.1
    assert home.arrive(0, 1) is None


def test_a_generation_that_others_have_not_heard_of_is_not_begun_again() -> None:
    """Of ranks that go apart each has its own: those who live may know none of the newest ones."""
    home = Home(2, consistency="async")
    home.join(0, 1)
    for nonce in (71, 72, 73):
        home.ask(1, "leave", nonce=70 if nonce == 71 else nonce - 1)
        home.now_s += LEASE_S + 0.1
        home.ask(0)
        newest = home.ask(1, "join", nonce=nonce).generation  # type: ignore[union-attr]
    assert newest == FIRST + 3
    home.groups = Groups(lease_s=LEASE_S)
    home.ask(0)
    request = home.request(1, "join", nonce=74, number=FIRST + 500)
    reply = home.groups.handle(request, home.now_s, first_generation=FIRST + 500)
    assert reply is not None
    assert reply.generation > newest


@pytest.mark.parametrize(
    "other",
    [
        {"world_size": 3},
        {"consistency": "async"},
        {"consistency": "bounded", "staleness": 1},
        {"reduction": "sum"},
        {"elastic": True},
    ],
)
def test_terms_that_differ_are_refused_with_both_sides(other: dict[str, object]) -> None:
    home = Home(2)
    home.join(0)
    home.terms = replace(home.terms, **other)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"rank 1 \(host-1\) with .*, and rank 0 \(host-0\) is in it with 2 ranks"):
        home.ask(1, "join")


def test_another_number_of_ranks_needs_all_to_be_elastic() -> None:
    for elastic in (False, True):
        home = Home(3, elastic=elastic)
        home.join(0, 1, 2)
        home.now_s = LEASE_S + 1.0
        home.terms = replace(home.terms, world_size=2)
        if not elastic:
            with pytest.raises(InvalidRequest, match=r"had 3 ranks .* say elastic=True"):
                home.ask(0, "join", nonce=77)
            continue
        home.now_s -= 2.0  # those of before were ended a moment ago: there is nothing amiss, but a lease to wait for
        assert home.ask(0, "join", nonce=77).answer == "occupied"  # type: ignore[union-attr]
        home.now_s += 2.0
        assert home.ask(0, "join", nonce=77).generation == FIRST + 1  # type: ignore[union-attr]
        home.ask(1, "join", nonce=78)
        home.generations[1] = home.generations[0]
        assert home.arrive(1, 1, nonce=78) is None
        assert home.arrive(0, 1, nonce=77).answer == "arrived"  # type: ignore[union-attr]


def test_a_bounded_rank_waits_for_the_slowest() -> None:
    home = Home(2, consistency="bounded", staleness=2)
    home.join(0, 1)
    answers = [home.arrive(0, meeting) for meeting in (1, 2, 3)]
    assert [each and each.answer for each in answers] == ["arrived", "arrived", None]
    assert home.arrive(1, 1).answer == "arrived"  # type: ignore[union-attr]
    assert home.arrive(0, 3).answer == "arrived"  # type: ignore[union-attr]
    assert home.arrive(0, 4) is None
    home.ask(1, "leave")
    assert home.arrive(0, 4).answer == "arrived"  # type: ignore[union-attr]


def test_a_job_whose_ranks_have_all_closed_their_pools_is_the_same_when_its_launcher_starts_it_again() -> None:
    home = Home(2)
    for rank in (0, 1):
        home.ask(rank, "join", launcher="agent")
    home.ask(0, step=7)
    for rank in (0, 1):  # an error that all of them met
        home.ask(rank, "leave")
    reply = home.ask(1, "join", nonce=12, launcher="agent", restart=1)
    assert reply is not None
    assert (reply.answer, reply.step, reply.generation) == ("heard", 7, FIRST + 1)
    reply = home.ask(0, "join", nonce=11, launcher="agent", restart=1)
    assert reply is not None
    assert (reply.answer, reply.step, reply.generation) == ("heard", 7, FIRST + 1)
    for rank in (0, 1):
        home.ask(rank, "leave", nonce=11 + rank)
    assert home.ask(0, "join", nonce=21, launcher="another").step == 0  # type: ignore[union-attr]


def test_groups_whose_ranks_are_dead_take_no_room_of_others() -> None:
    home = Home(2)
    parts = part(*range(MAX_BYTES // 8 // 3))
    for number in range(3):
        home.ask(0, "join", group=f"dead-{number}")
        if number < 2:
            home.arrive(0, 1, group=f"dead-{number}", parts=parts)
    home.join(0, 1)
    with pytest.raises(Overloaded, match="bytes at their home"):
        home.arrive(0, 1, parts=parts)
    home.now_s = LEASE_S + 1.0
    home.ask(0), home.ask(1)
    assert home.arrive(0, 1, parts=parts) is None
    assert home.arrive(1, 1) is None


def test_the_ranks_that_a_home_knows_are_bounded_too() -> None:
    home, name, rank = Home(4096), "x" * 1000, 0

    def known() -> bool:
        with suppress(Overloaded):
            home.ask(rank % 4096, "join", group=f"{rank // 4096}", host=name, launcher=name)
            return True
        return False

    while known():
        rank += 1
    assert 4 * 2 * len(name) * rank <= MAX_BYTES < 10 * len(name) * rank
    home.now_s = LEASE_S + 1.0
    home.join(0, 1)


def test_what_a_home_holds_is_bounded() -> None:
    home = Home(2)
    home.join(0, 1)
    many = tuple(range(65_536))
    parts = tuple(OfferedPart(table_id=table, step=1, sequences=many) for table in range(MAX_BYTES // (8 * 65_536) + 1))
    with pytest.raises(Overloaded, match="bytes at their home"):
        home.arrive(0, 1, parts=parts)
    assert home.arrive(0, 1, parts=parts[:100]) is None
    for number in range(MAX_GROUPS - 1):
        home.ask(0, "join", group=f"other-{number}")
    with pytest.raises(Overloaded, match="groups of ranks"):
        home.ask(0, "join", group="one more")
    home.now_s = LEASE_S + 1.0
    home.ask(0, "join", group="one more")  # those that are dead make room
    home.join(0, 1)
    for _ in range(3):  # and give back what they held
        assert home.arrive(1, 1, parts=parts[:100]) is None
    home.arrive(1, 1)
    word = Word(
        meeting=1, kind="again", parts=tuple(WordPart(table_id=each.table_id, sequences=many) for each in parts)
    )
    with pytest.raises(Overloaded, match="bytes at their home"):
        home.ask(0, meeting=1, word=word)
    word = replace(word, parts=word.parts[:100])
    for meeting in (1, 2, 3):  # in place of the one before
        home.ask(0, meeting=meeting, word=replace(word, meeting=meeting))
    for rank in (0, 1):  # nor is anything kept of what is said besides
        home.ask(rank, parts=parts, word=None)
        said = home.groups._groups["job"].members[rank].said
        assert (said.parts, said.word) == ((), None)


@pytest.mark.parametrize(
    ("rank", "more", "why"),
    [
        (2, {}, "ranks are counted from 0"),
        (0, {"terms": Terms(world_size=0)}, "a group has 1 to"),
        (0, {"host": "h" * 2_000}, "named in at most"),
        (0, {"kind": "arrive", "meeting": 1}, "has not joined"),
        (0, {"kind": "arrive", "generation": 5}, "meetings are counted from 1"),
    ],
)
def test_what_makes_no_sense_is_refused(rank: int, more: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        Home(2).ask(rank, **{"kind": "join", **more})  # type: ignore[arg-type]


def test_an_arrival_that_comes_late_takes_the_place_of_none() -> None:
    home = Home(2)
    home.join(0, 1)
    home.arrive(1, 1, parts=part(8), number=1)
    home.arrive(1, 1, parts=part(9), number=2)  # it had dropped the other one
    home.arrive(1, 1, parts=part(8), number=1)
    reply = home.arrive(0, 1)
    assert reply is not None
    assert [each.parts for each in reply.arrivals] == [(), part(9)]
    home.ask(0, word=Word(meeting=1, kind="done"))
    home.arrive(1, 2, parts=part(10), number=3)
    home.arrive(1, 1, parts=part(9), number=2)
    reply = home.arrive(0, 2)
    assert reply is not None
    assert reply.arrivals[1].parts == part(10)


def test_a_copy_of_a_join_takes_the_place_of_nobody() -> None:
    home = Home(2)
    asked = [home.request(0, "join", nonce=70), home.request(0, "join", nonce=70, number=FIRST)]
    home.join(1)
    home.ask(0, "join", nonce=70)
    home.now_s = LEASE_S + 0.1
    home.ask(1)
    home.ask(0, "join", nonce=71)
    for first in (FIRST, FIRST + 100):
        home.now_s += LEASE_S + 0.1  # the new one is not heard of just now, but lives
        for late in asked:
            reply = home.groups.handle(late, home.now_s, first_generation=first)
            assert reply is not None
            assert reply.answer == "wait"
        home.ask(0, nonce=71, generation=FIRST + 1)
        home.groups = Groups(lease_s=LEASE_S)  # also where nothing is known of either


def test_what_a_process_has_said_before_it_left_brings_it_back_to_nobody() -> None:
    home = Home(3)
    home.join(0, 1, 2)
    assert home.arrive(1, 1) is None  # waits there
    home.ask(1, "leave")
    for kind in ("arrive", "beat", "join"):
        reply = home.groups.handle(home.request(1, kind, meeting=1), home.now_s, heard_s=0.0, first_generation=FIRST)
        assert reply is not None
    assert [(each.rank, each.state) for each in home.arrive(0, 1).others] == [(1, "left")]  # type: ignore[union-attr]
    assert home.ask(1, "join", nonce=77).answer == "wait"  # type: ignore[union-attr]


def test_a_job_of_the_same_name_begins_where_all_of_another_have_left() -> None:
    home = Home(2)
    home.join(0, 1)
    home.ask(0, step=7)
    for rank in (0, 1):
        home.ask(rank, "leave")
    home.terms = replace(home.terms, world_size=3)
    reply = home.ask(2, "join", nonce=77)
    assert reply is not None
    assert (reply.answer, reply.step) == ("heard", 0)


def test_what_a_rank_has_come_with_it_may_take_back_until_all_are_there() -> None:
    home = Home(2)
    home.join(0, 1)
    home.arrive(1, 1, parts=part(8), number=1)
    assert home.ask(1, number=1).answer == "heard"  # type: ignore[union-attr]
    home.arrive(1, 1, parts=part(8), number=1)  # a copy
    assert home.arrive(0, 1) is None
    home.arrive(1, 1, parts=part(9), number=2)
    reply = home.arrive(0, 1)
    assert reply is not None
    assert reply.arrivals[1].parts == part(9)
    assert home.ask(1, number=2).answer == "wait"  # type: ignore[union-attr]
    home.groups = Groups(lease_s=LEASE_S)  # where all may have been there before, and the leader knows
    assert home.ask(1, number=2).answer == "wait"  # type: ignore[union-attr]


def test_who_joins_is_told_of_a_step_that_nobody_has_said_the_end_of() -> None:
    step = (OfferedPart(table_id=1, step=2, sequences=(8,)),)
    home = Home(3)
    home.join(0, 1, 2)
    for rank in (0, 1, 2):
        home.arrive(rank, 1, parts=step, step=1)
    home.now_s = LEASE_S + 0.1
    for rank in (1, 2):
        reply = home.ask(rank, "join", nonce=77 + rank)
        assert reply is not None
        assert reply.undecided is not None
        assert (reply.undecided.generation, reply.undecided.step) == (FIRST, 2)
        assert reply.undecided.parts == (OfferedPart(table_id=1, step=2, sequences=()),)
    home.ask(1, nonce=78, step=2)  # it was decided
    assert home.ask(2, "join", nonce=79).undecided is None  # type: ignore[union-attr]


def test_who_missed_a_meeting_that_the_leader_has_given_up_hears_of_it() -> None:
    home = Home(2)
    home.join(0, 1)
    home.arrive(1, 1, number=1)
    home.arrive(0, 1)
    home.ask(0, meeting=1, word=Word(meeting=1, kind="again"))
    word = Word(meeting=2, kind="undone")  # it has waited at the second one for long enough
    home.ask(0, meeting=2, word=word)
    reply = home.arrive(1, 1, number=2)
    assert reply is not None
    assert reply.word == word


def test_at_a_home_anew_who_has_joined_last_is_the_rank_whoever_is_heard_first() -> None:
    home = Home(2)
    late = home.request(0, "beat", nonce=70, generation=FIRST, ticket=FIRST)  # of a process that is gone
    living = home.request(0, "beat", nonce=71, generation=FIRST + 1, ticket=FIRST + 5)
    for _ in range(2):
        home.groups.handle(late, home.now_s, first_generation=FIRST + 100)
        reply = home.groups.handle(living, home.now_s, first_generation=FIRST + 100)
        assert reply is not None
        assert reply.answer == "changed"  # it goes on, in a generation that neither was in
        with pytest.raises(InvalidRequest, match="rank 0 of group 'job' is host-0 by now"):
            home.groups.handle(late, home.now_s, first_generation=FIRST + 100)
        home.groups = Groups(lease_s=LEASE_S)
