"""What ranks arrive with, compared."""

import pytest

from mempool.agreement.groups.offers import check_offers
from mempool.errors import InvalidRequest, RankLost
from mempool.types.groups.meeting import Arrival, MeetPhase, OfferedPart


def arrival(rank: int, phase: MeetPhase, *, want_norm: bool) -> Arrival:
    return Arrival(rank=rank, host=f"host-{rank}", phase=phase, parts=(), want_norm=want_norm)


def test_a_rank_that_commits_what_it_has_prepared_begins_anew_with_those_who_were_told_of_a_lost_one() -> None:
    prepares, commits = arrival(0, "prepare", want_norm=True), arrival(1, "commit", want_norm=True)
    with pytest.raises(RankLost, match="'job' prepares its step anew"):
        check_offers("job", [prepares, commits], str)
    with pytest.raises(InvalidRequest, match=r"rank 0 .* asks for the norm of its gradient, and rank 1"):
        check_offers("job", [prepares, arrival(1, "commit", want_norm=False)], str)
    check_offers("job", [arrival(0, "commit", want_norm=False), commits], str)


def test_scales_that_differ_in_their_last_bits_are_one() -> None:
    """Each rank clips by a norm of its own making."""

    def commits(rank: int, grad_scale: float) -> Arrival:
        part = OfferedPart(table_id=1, step=1, sequences=(), lr=0.5, grad_scale=grad_scale)
        return Arrival(rank=rank, host=f"host-{rank}", phase="commit", parts=(part,), want_norm=True, norm_order=0.0)

    check_offers("job", [commits(0, 0.3), commits(1, 0.3 * (1 + 1e-7))], str)
    with pytest.raises(InvalidRequest, match=r"with grad_scale = 0.3, and rank 1 \(host-1\) with grad_scale = 0.3003"):
        check_offers("job", [commits(0, 0.3), commits(1, 0.3003)], str)
