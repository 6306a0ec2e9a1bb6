"""The clock that ranks are taken for dead by."""

import asyncio
from dataclasses import replace
from typing import Any

from mempool.shard.meeting import Meetings
from mempool.types.groups.meeting import MeetKind, MeetReply, MeetRequest, Terms, Word

LEASE_S, FIRST = 10.0, 1_000


def test_ranks_were_not_silent_while_their_home_was_paused() -> None:
    now_s = [50.0]
    meetings = Meetings(lease_s=LEASE_S, clock=lambda: now_s[0], wall_s=lambda: FIRST / 1000)

    def say(rank: int, kind: MeetKind, *, nonce: int = 0) -> str:
        generation = 0 if kind == "join" else FIRST
        request = MeetRequest(
            group="job", rank=rank, nonce=nonce or rank + 1, host=f"host-{rank}", terms=Terms(world_size=2), kind=kind,
            generation=generation,
        )  # fmt: skip
        reply = asyncio.run(meetings.meet(request))
        if reply.ticket:
            reply = asyncio.run(meetings.meet(replace(request, number=reply.ticket)))
        return reply.answer

    assert [say(rank, "join") for rank in (0, 1)] == ["heard", "heard"]
    now_s[0] += 6 * LEASE_S  # stopped, as a whole
    assert say(0, "beat") == "heard"
    assert say(1, "join", nonce=9) == "occupied"
    for _ in range(4):  # one lives, the other does not
        now_s[0] += LEASE_S / 3
        assert say(0, "beat") == "heard"
    assert say(1, "join", nonce=9) == "wait"


def test_ranks_that_wait_are_looked_at_when_all_are_there_and_not_with_each_who_comes() -> None:
    """A meeting would cost its home the cube of the number of ranks."""
    world_size, looked = 24, []
    meetings = Meetings(lease_s=LEASE_S, clock=lambda: 50.0, wall_s=lambda: FIRST / 1000)
    handle = meetings._groups.handle

    def counted(request: MeetRequest, *args: float, **how: Any) -> MeetReply | None:
        looked.append(request.rank)
        return handle(request, *args, **how)

    async def be(rank: int) -> str:
        request = MeetRequest(
            group="job", rank=rank, nonce=rank + 1, host="host", terms=Terms(world_size=world_size), kind="join"
        )
        ticket = (await meetings.meet(request)).ticket
        generation = (await meetings.meet(replace(request, number=ticket))).generation
        arrival = replace(request, kind="arrive", generation=generation, ticket=ticket, meeting=1, number=1)
        while len(looked) < 2 * world_size:  # all have joined
            await asyncio.sleep(0)
        for _ in range(8 * rank):  # one after the other
            await asyncio.sleep(0)
        reply = await meetings.meet(arrival)
        if not rank:
            await meetings.meet(replace(arrival, kind="beat", word=Word(meeting=1, kind="done"), number=0))
        return reply.answer

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(be, range(world_size)))

    meetings._groups.handle = counted  # type: ignore[method-assign]
    assert asyncio.run(all_of_them()) == ["arrived"] + ["word"] * (world_size - 1)
    assert len(looked) <= 2 * world_size + 4 * world_size
