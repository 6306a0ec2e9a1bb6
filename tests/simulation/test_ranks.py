"""Groups of ranks on seeds, and that the simulation would miss what keeps them right."""

import pytest
import torch

from tests.simulation.ranks import ABLATIONS, play, play_with, play_without

SEEN_AT = {
    "generation of a group": 1,
    "what became of a step": 3,
    "lease of a rank": 1,
    "sending again": 4,
    "end of earlier generations": 16,
    "arrivals that are not given back": 11,
    "ticket of a join": 13,
}

FOUND_AT = (278, 3538, 8897, 9390)
"""Numbers passed over one by one; rounds that moves used up; a norm that nobody asked for anew; a drop of what an
earlier home had let be committed."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("seed", [*range(4, 8), *FOUND_AT])
@pytest.mark.filterwarnings("ignore")  # of processes that were killed with calls under way
def test_nothing_happens_that_may_not(seed: int) -> None:
    assert not play(seed).violations, f"python -m tests.simulation.ranks --seeds 1 --seed {seed}"


@pytest.mark.parametrize("safeguard", sorted(ABLATIONS))
@pytest.mark.filterwarnings("ignore")
def test_a_safeguard_that_is_off_is_missed(safeguard: str) -> None:
    asked = safeguard, SEEN_AT[safeguard]
    assert play_without(asked).violations
    assert not play_with(asked).violations
