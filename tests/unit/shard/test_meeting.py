"""The clock that ranks are taken for dead by."""

import asyncio
from dataclasses import replace

from mempool.shard.meeting import Meetings
from mempool.types.groups.meeting import MeetKind, MeetRequest, Terms

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
