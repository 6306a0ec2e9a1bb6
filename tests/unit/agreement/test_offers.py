"""What ranks arrive with, compared."""

import pytest

from mempool.agreement.groups.offers import check_offers
from mempool.errors import InvalidRequest, RankLost
from mempool.types.groups.meeting import Arrival, MeetPhase


def arrival(rank: int, phase: MeetPhase, *, want_norm: bool) -> Arrival:
    return Arrival(rank=rank, host=f"host-{rank}", phase=phase, parts=(), want_norm=want_norm)


def test_a_rank_that_commits_what_it_has_prepared_begins_anew_with_those_who_were_told_of_a_lost_one() -> None:
    prepares, commits = arrival(0, "prepare", want_norm=True), arrival(1, "commit", want_norm=True)
    with pytest.raises(RankLost, match="'job' prepares its step anew"):
        check_offers("job", [prepares, commits], str)
    with pytest.raises(InvalidRequest, match=r"rank 0 .* asks for the norm of its gradient, and rank 1"):
        check_offers("job", [prepares, arrival(1, "commit", want_norm=False)], str)
    check_offers("job", [arrival(0, "commit", want_norm=False), commits], str)
