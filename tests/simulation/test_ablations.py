"""Without each safeguard some seed shows a violation: so the simulation would notice its loss, and it is needed."""

import pytest
import torch

from tests.simulation.ablations import ABLATIONS, SEEN_AT, play_with, play_without


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("safeguard", sorted(ABLATIONS))
@pytest.mark.filterwarnings("ignore")  # of processes that were killed with calls under way
def test_a_safeguard_that_is_off_is_missed(safeguard: str) -> None:
    seed = SEEN_AT[safeguard]
    assert play_without((safeguard, seed)).violations
    assert not play_with((safeguard, seed)).violations
